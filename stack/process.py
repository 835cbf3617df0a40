"""A program the stack runs: how it is started, when it is ready, how it is stopped."""

import asyncio
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import psutil

READY_POLL_S = 0.03
READY_S = 60.0
TAKE_OVER_S = 300.0
"""For a successor, which nobody waits for: Ray and its workers are warm in 10 s, in 60 where six
services start on two cores at once."""
LOG_BYTES_MAX = 16 << 20
TETHER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("tether.py")))


class NotReady(RuntimeError):
    """It ended, or did not answer in time; the text has the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One component of the stack."""

    name: str
    command: tuple[str, ...]
    ready: Callable[[], Awaitable[bool]]
    """Whether it does its work now; asked again and again, must be bounded in time."""
    prepare: Callable[[], None] = field(default=lambda: None)
    """What its folder needs before each start; must stand being run again."""
    doors: tuple[int, ...] = ()
    """Ports that a newer process of it may share, to take over; () where none can."""
    after: tuple[str, ...] = ()
    """Names of the programs it needs: it starts after and stops before them."""
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_signal: int = signal.SIGTERM
    orphan_signal: int = signal.SIGKILL
    """What the kernel sends it when its parent dies."""
    stop_s: float = 12.0


async def start(program: Program, log: Path) -> subprocess.Popen[bytes]:
    """Starts it in a process group of its own, tethered to this thread."""
    await asyncio.to_thread(program.prepare)
    log.parent.mkdir(parents=True, exist_ok=True)
    rotate(log)
    with log.open("ab") as output:
        return subprocess.Popen(  # noqa: ASYNC220 - fork and exec: 2 ms
            [*TETHER, str(int(program.orphan_signal)), str(os.getpid()), *program.command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **program.environment},
            process_group=0,
        )


def rotate(log: Path) -> None:
    """Keeps one old log beside the current one."""
    if log.exists() and log.stat().st_size > LOG_BYTES_MAX:
        log.replace(log.with_suffix(".log.1"))


async def until_ready(
    program: Program, process: subprocess.Popen[bytes], log: Path, timeout_s: float = READY_S
) -> None:
    """Raises `NotReady`."""
    deadline = monotonic() + timeout_s
    while not await program.ready():
        if process.poll() is not None:
            problem = f"{program.name} ended with {process.returncode}"
            raise NotReady(f"{problem}: {tail(log)}")
        if monotonic() > deadline:
            raise NotReady(f"{program.name} is not ready after {timeout_s:.0f} s: {tail(log)}")
        await asyncio.sleep(READY_POLL_S)


async def until_listening(program: Program, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it has opened all its doors, which it does when it can answer. Raises `NotReady`."""

    async def ready() -> bool:
        return listens(process.pid, program.doors) and await program.ready()

    await until_ready(dataclasses.replace(program, ready=ready), process, log, TAKE_OVER_S)


def listens(pid: int, ports: Collection[int]) -> bool:
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.NoSuchProcess:
        return False
    return {one.laddr.port for one in found if one.status == psutil.CONN_LISTEN}.issuperset(ports)


def tail(log: Path, size: int = 2000) -> str:
    return log.read_bytes()[-size:].decode(errors="replace").strip() if log.exists() else ""


async def until_exit(process: subprocess.Popen[bytes]) -> int:
    """Waits without a thread; returns the exit code, negative for a signal."""
    if process.poll() is None:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        watched = os.pidfd_open(process.pid)
        loop.add_reader(watched, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(watched)
            os.close(watched)
    return process.wait()


async def stop(
    program: Program, process: subprocess.Popen[bytes], most_s: float | None = None
) -> None:
    """Asks it to end, insists after `most_s`, and ends what it left in its process group.

    Without `most_s`: after the program's own `stop_s`.
    """
    if process.poll() is None:
        process.send_signal(program.stop_signal)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s or program.stop_s):
                await until_exit(process)
    kill_group(process)
    process.wait()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to what is left of the process and of its children that stayed in its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
