"""Faults done to the embedded stack: signals to processes, cut cables, a small file system."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil

from libs.objectstore import ObjectStore
from stack import servers
from stack.ports import LOOPBACK
from tests.chaos import proxied, proxy
from tests.chaos.controls import Ground
from tests.running import READY_S, ROOT, STOP_S, Stack, until

VOLUME_MIB = 512
FILLER = "filler"
FILL_CHUNK = bytes(1 << 20)
SLOW_START_S = 180.0
PROGRAMS = 11
STOP_SIGNALS = {"postgres": signal.SIGINT}
"""How the supervisor stops it; all others get SIGTERM."""


class ProcessControls:
    """`tests.chaos.controls.Controls` on processes."""

    kind = "embedded"

    def __init__(self, stack: Stack, volume: Path | None) -> None:
        self.stack = stack
        self.volume = volume
        self.plan = proxy.load(stack.data_dir / proxied.FILE)
        self.cut: set[str] = set()
        self.ended: dict[str, int] = {}
        """Victim -> the pid that was told to end."""

    @property
    def can_fill(self) -> bool:
        return self.volume is not None

    async def kill(self, victim: str) -> None:
        await self.end(victim, signal.SIGKILL)

    async def restart(self, victim: str) -> None:
        await self.end(victim, STOP_SIGNALS.get(victim, signal.SIGTERM))

    async def end(self, victim: str, number: int) -> None:
        pid = await self.pid(victim)
        os.kill(pid, number)
        self.ended[victim] = pid

    async def pid(self, victim: str) -> int:
        """Of the one that runs, once one does."""

        async def alive() -> int | None:
            pid = self.stack.state["processes"].get(victim, {}).get("pid")
            return pid if pid and pid != self.ended.get(victim) else None

        found: int = await until(alive, f"{victim} does not run", READY_S)
        return found

    async def pause(self, victim: str) -> None:
        signal_tree(await self.pid(victim), signal.SIGSTOP)

    async def resume(self, victim: str) -> None:
        signal_tree(await self.pid(victim), signal.SIGCONT)

    async def disconnect(self, victim: str) -> None:
        self.cut.add(victim)
        await proxy.cut(self.plan, self.cut)

    async def connect(self, victim: str) -> None:
        self.cut.discard(victim)
        await proxy.cut(self.plan, self.cut)

    async def fill(self) -> None:
        assert self.volume is not None
        await asyncio.to_thread(fill, self.volume / FILLER)

    async def unfill(self) -> None:
        assert self.volume is not None
        (self.volume / FILLER).unlink()

    async def back(self, victim: str) -> None:
        async def ready() -> bool:
            entry = self.stack.state["processes"][victim]
            return entry["pid"] != self.ended.get(victim) and bool(entry["ready"])

        await until(ready, f"{victim} is not back", READY_S)


def signal_tree(pid: int, number: int) -> None:
    """To a process and to all that it started, the youngest last."""
    parent = psutil.Process(pid)
    for one in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(number)


def fill(filler: Path) -> None:
    """Until the kernel says that there is no space left."""
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(FILL_CHUNK)


@contextlib.contextmanager
def small_volume(folder: Path) -> Iterator[Path | None]:
    """The S3 server's folder as a file system of `VOLUME_MIB`; only root may mount one."""
    if os.geteuid() != 0:
        yield None
        return
    folder.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={VOLUME_MIB}m", "tmpfs", str(folder)], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[Ground]:
    """The stack with its cables, and what breaks it."""
    with small_volume(data_dir / "s3" / "data") as volume, up_log(data_dir) as output:
        options = ("--data-dir", str(data_dir), "--ports", "auto")
        process = subprocess.Popen(  # noqa: ASYNC220 - fork and exec take 2 ms
            [sys.executable, "-m", "tests.chaos.proxied", *options],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        stack = Stack(data_dir)
        try:
            await until(lambda: is_up(stack, process), "the stack is not ready", SLOW_START_S)
            yield ground_of(stack, ProcessControls(stack, volume))
        finally:
            await stack.http.aclose()
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, STOP_S)


def ground_of(stack: Stack, controls: ProcessControls) -> Ground:
    keys = stack.state["secrets"]
    objects = ObjectStore(
        stack.endpoint("s3"), keys["s3_access_key"], keys["s3_secret_key"], "leptonic"
    )
    plan = controls.plan
    nats = servers.nats_url(plan.port(proxy.STRANGER, "nats"))
    inference = f"{LOOPBACK}:{plan.port(proxy.STRANGER, 'inference_grpc')}"
    return Ground(stack, controls, objects, nats, inference)


@contextlib.contextmanager
def up_log(data_dir: Path) -> Iterator[int]:
    file = os.open(data_dir.parent / "up.log", os.O_CREAT | os.O_WRONLY, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def is_up(stack: Stack, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise RuntimeError((stack.data_dir.parent / "up.log").read_text()[-3000:])
    try:
        entries = stack.state["processes"]
    except (FileNotFoundError, KeyError):
        return False
    return len(entries) == PROGRAMS and all(entry["ready"] for entry in entries.values())
