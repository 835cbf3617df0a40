"""The driver of a Ray job that is one attempt's share on a cluster.

`ray_agent.py` sends this text with the job, so that the cluster needs nothing but Ray. Reserves a
bundle for each worker (a placement group), runs each worker's command under an actor in its bundle,
and says in its last line which one decided, and how. When it ends, however it ends, Ray takes
the actors and the placement group back.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

TASK = "LEPTONIC_SHARE"
ROOM_S = 900.0
"""For the cluster to make room: an autoscaler's machine takes minutes."""
POLL_S = 0.2
ASK_S = 1.0
READ_BYTES = 64 << 10
DRAIN_S = 2.0
PASSED_ON = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "USER", "LD_LIBRARY_PATH")
"""Of an actor's environment, and the GPUs that Ray gave it."""
CONFINED = """
import ctypes, os, resource, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its actor
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if limit := int(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
signal.pthread_sigmask(signal.SIG_SETMASK, [])  # Ray's workers block SIGINT
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error}")
"""

Ended = dict[str, Any]


class Holder:
    """Holds one command in its bundle; `stop` is called beside `run`."""

    def __init__(self, task: dict[str, Any], local: int) -> None:
        self.task = task
        self.local = local
        self.guard = threading.Lock()
        self.stopping = False
        self.over = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self.tail = b""

    def run(self) -> Ended:
        try:
            return self.ended(self.hold())
        except OSError as error:
            return self.ended(None, str(error))
        finally:
            self.over.set()

    def hold(self) -> int:
        with self.guard:
            if self.stopping:
                return -signal.SIGTERM
            process = self.process = self.start()
        reading = threading.Thread(target=self.read, daemon=True)
        reading.start()
        code = process.wait()
        self.send(signal.SIGKILL)  # what it left behind in its group
        reading.join(DRAIN_S)
        return code

    def start(self) -> subprocess.Popen[bytes]:
        names = (*PASSED_ON, "CUDA_VISIBLE_DEVICES")
        passed_on = {name: os.environ[name] for name in names if name in os.environ}
        limit = str(self.task["memory_bytes"])
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CONFINED, limit, *self.task["argv"]],
            env={**passed_on, **self.task["env"], **self.task["told"][self.local]},
            cwd=self.task["cwd"] or None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def read(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        while piece := os.read(self.process.stdout.fileno(), READ_BYTES):
            self.tail = (self.tail + piece)[-self.task["tail_bytes"] :]

    def stop(self) -> None:
        with self.guard:
            self.stopping = True
        if self.process is not None:
            self.send(signal.SIGTERM)
            if not self.over.wait(self.task["grace_s"]):
                self.send(signal.SIGKILL)
            self.over.wait()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):  # nobody of its group is left
            os.killpg(self.process.pid, number)

    def ended(self, code: int | None, problem: str = "") -> Ended:
        tail = self.tail.decode(errors="replace")
        return {"local": self.local, "code": code, "problem": problem, "tail": tail, "lost": False}


def run(task: dict[str, Any], stopping: threading.Event) -> Ended:
    group = placement_group([task["bundle"]] * len(task["told"]), strategy="PACK")
    if not has_room(group, stopping):
        return lost(0, f"Ray made no room within {ROOM_S:g} s for {task['bundle']}")
    holders = [holder_in(group, task, local) for local in range(len(task["told"]))]
    runs = {holder.run.remote(): local for local, holder in enumerate(holders)}
    left = list(runs)
    ends: dict[int, Ended] = {}
    while left and not stopping.is_set() and not any(map(has_failed, ends.values())):
        done, left = ray.wait(left, timeout=POLL_S)
        ends.update({runs[one]: outcome(one, runs[one]) for one in done})
    if left:
        ray.wait([holders[runs[one]].stop.remote() for one in left], num_returns=len(left))
    failed = [ends[local] for local in sorted(ends) if has_failed(ends[local])]
    return failed[0] if failed else ends.get(0, lost(0, "it was told to stop"))


def has_room(group: PlacementGroup, stopping: threading.Event) -> bool:
    asks = int(ROOM_S / ASK_S)
    return (
        any(group.wait(ASK_S) or stopping.is_set() for _ in range(asks)) and not stopping.is_set()
    )


def holder_in(group: PlacementGroup, task: dict[str, Any], local: int) -> Any:
    bundle = task["bundle"]
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=local)
    options = ray.remote(Holder).options(
        num_cpus=bundle.get("CPU", 0),
        num_gpus=bundle.get("GPU", 0),
        memory=bundle.get("memory"),
        max_concurrency=2,
        scheduling_strategy=place,
    )
    return options.remote(task, local)


def outcome(of: Any, local: int) -> Ended:
    try:
        ended: Ended = ray.get(of)
    except RayError as error:
        return lost(local, f"its actor is gone: {str(error).strip().splitlines()[0]}")
    return ended


def has_failed(ended: Ended) -> bool:
    return bool(ended["lost"] or ended["code"] != 0)


def lost(local: int, problem: str) -> Ended:
    return {"local": local, "code": None, "problem": problem, "tail": "", "lost": True}


def main() -> int:
    task = json.loads(os.environ[TASK])
    stopping = threading.Event()

    def on_term(number: int, frame: FrameType | None) -> None:
        stopping.set()

    ray.init(log_to_driver=False)
    signal.signal(signal.SIGTERM, on_term)  # Ray has put one of its own
    ended = run(task, stopping)
    sys.stdout.write(f"\n{task['says']}{json.dumps(ended)}\n")
    return int(has_failed(ended))


if __name__ == "__main__":
    sys.exit(main())
