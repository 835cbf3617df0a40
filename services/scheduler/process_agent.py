"""`python -m services.scheduler.process_agent`: runs jobs of kind `command` as local processes.

Each worker has a folder, and a shim (`shim.py`) that holds its command and outlives the agent. Its
memory is limited by RLIMIT_DATA; its share of the CPU is not: that takes a container.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import uvloop

from libs import telemetry
from libs.contracts.events import Resources
from libs.settings import load
from services.scheduler.agent import Offer
from services.scheduler.agents import Settings, serve
from services.scheduler.workers import TAIL_BYTES_MAX, Seen, Spec, Unusable, Worker

SHIM = Path(__file__).with_name("shim.py")
PASSED_ON = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "USER", "LD_LIBRARY_PATH")
"""Of the agent's environment: the rest may hold the platform's secrets."""
GONE = "its supervisor is gone"
NEW, OLD = ".new", ".old"
"""Of folders that are no worker's yet, or any more."""


class ProcessEngine:
    kind = "command"

    def __init__(self, folder: Path, offer: Offer) -> None:
        self.folder = folder / "workers"
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"*{OLD}"):
            shutil.rmtree(left, ignore_errors=True)
        self.offered = offer
        self.shims: list[int] = []
        """Of this process, to be reaped; an earlier agent's are init's."""

    async def offer(self) -> Offer:
        return self.offered

    async def workers(self) -> list[Seen]:
        return await asyncio.to_thread(self.look)

    async def start(self, share: Sequence[Worker], spec: Spec) -> None:
        if spec.image:
            raise Unusable(f"spec.image: {spec.image!r}, and this node runs no containers")
        for worker in share:
            await asyncio.to_thread(self.launch, worker, spec)

    async def stop(self, share: Sequence[Worker]) -> None:
        for worker in share:
            end(self.folder / worker.name, signal.SIGTERM)

    async def remove(self, share: Sequence[Worker]) -> None:
        for worker in share:
            await asyncio.to_thread(self.clear, worker)

    def clear(self, worker: Worker) -> None:
        """Gone at once: who looks meanwhile sees no half of it."""
        folder = self.folder / worker.name
        shutil.rmtree(folder.rename(folder.with_suffix(OLD)))

    def launch(self, worker: Worker, spec: Spec) -> None:
        """Complete before it is there: under its name the folder has everything it needs."""
        folder = self.folder / worker.name
        if folder.exists():
            return
        new = folder.with_suffix(NEW)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        (new / "worker.json").write_bytes(msgspec.json.encode(worker))
        (new / "task.json").write_text(json.dumps(task_of(worker, spec, folder)))
        with (new / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            new.rename(folder)
            os.set_inheritable(lock.fileno(), True)
            self.shims.append(spawn([sys.executable, "-I", "-S", str(SHIM), str(folder)]))

    def look(self) -> list[Seen]:
        self.shims = [shim for shim in self.shims if os.waitpid(shim, os.WNOHANG) == (0, 0)]
        folders = (one for one in self.folder.iterdir() if one.suffix not in (NEW, OLD))
        return [seen for folder in sorted(folders) if (seen := seen_in(folder)) is not None]


def spawn(command: list[str]) -> int:
    """In a session of its own; it has no more of our files than the lock. Its process id.

    No `Popen`: that wants its child to end before it.
    """
    quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
    return os.posix_spawn(command[0], command, os.environ, file_actions=quiet, setsid=True)


def task_of(worker: Worker, spec: Spec, folder: Path) -> dict[str, object]:
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {
        "argv": spec.argv,
        "env": {**passed_on, **spec.env, **worker.environment()},
        "cwd": spec.cwd or str(folder),
        "grace_s": spec.grace_s,
        "memory_bytes": worker.resources.memory_mib << 20,
    }


def seen_in(folder: Path) -> Seen | None:
    """None when it was removed meanwhile."""
    try:
        return read(folder)
    except FileNotFoundError:
        if folder.exists():
            raise
        return None


def read(folder: Path) -> Seen:
    worker = msgspec.json.decode((folder / "worker.json").read_bytes(), type=Worker)
    with taking(folder) as free:
        if not free:
            return Seen(worker, running=True)
        tail = tail_of(folder / "log")
        if not (folder / "exit.json").exists():
            return Seen(worker, running=False, problem=GONE, lost=True, tail=tail)
        ended = json.loads((folder / "exit.json").read_text())
        return Seen(worker, False, ended["code"], ended["problem"], tail=tail)


def end(folder: Path, number: signal.Signals) -> None:
    """The process id is the shim's for as long as its lock is held."""
    with taking(folder) as free:
        if not free:
            with contextlib.suppress(FileNotFoundError):  # not written yet: asked again
                os.kill(int((folder / "pid").read_text()), number)


def tail_of(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - TAIL_BYTES_MAX))
        return log.read(TAIL_BYTES_MAX).decode(errors="replace")


@contextlib.contextmanager
def taking(folder: Path) -> Iterator[bool]:
    """Whether the worker's lock was free; it is given back with the block."""
    with (folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def offer_of(settings: Settings) -> Offer:
    cpu_milli = settings.cpu_milli or (os.cpu_count() or 1) * 1000
    gpu_milli = 1000 if settings.gpus else 0
    gpus = max(1, settings.gpus)
    capacity = Resources(cpu_milli, settings.memory_mib, gpu_milli, gpus)
    return Offer(capacity, settings.gpu_model)


async def main(settings: Settings) -> None:
    await serve(settings, ProcessEngine(settings.folder_of_node, offer_of(settings)))


if __name__ == "__main__":
    telemetry.log_everything("agent")
    uvloop.run(main(load(Settings, "agent", os.environ)))
