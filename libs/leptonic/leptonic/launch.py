"""Starting and stopping the embedded stack; the platform itself is started, never imported."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leptonic import stackfile
from leptonic.errors import Error

READY_S = 60.0
STOP_S = 30.0
POLL_S = 0.05
ROLL_S = 420.0
"""For one service: until its new process can answer, and its old one has."""
LOG_TAIL_LINES = 15


def platform_root() -> Path:
    """Where the platform's packages lie. Raises `Error` where only the client is installed."""
    found = importlib.util.find_spec("stack")
    if found is None or found.origin is None:
        problem = "the platform is not installed here, only its client"
        raise Error(f"{problem}: run `make setup` in a checkout and use its .venv/bin/leptonic")
    return Path(found.origin).parent.parent


def command(data_dir: Path, options: tuple[str, ...] = ()) -> list[str]:
    platform_root()
    return [sys.executable, "-m", "stack", "--data-dir", str(data_dir), *options]


def environment() -> dict[str, str]:
    """Ours, without what only clients read: services refuse variables they do not know."""
    kept = {n: v for n, v in os.environ.items() if n not in stackfile.CLIENT_VARIABLES}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def in_foreground(data_dir: Path, options: tuple[str, ...]) -> None:
    """Becomes the stack: Ctrl-C and SIGTERM go straight to it."""
    line = command(data_dir, options)
    os.execve(line[0], line, environment())  # noqa: S606 - becoming it is the point


def in_background(
    data_dir: Path, options: tuple[str, ...], tethered: bool = False
) -> "subprocess.Popen[bytes]":
    """Starts the stack in a session of its own, so that a Ctrl-C here does not reach it.

    A tethered one is told by the kernel to stop when this process dies, however it dies.
    """
    if stackfile.runs_on(data_dir):
        problem = f"a stack already runs on {data_dir}"
        raise Error(f"{problem}: `leptonic down --data-dir {data_dir}` stops it")
    line = command(data_dir, options)
    if tethered:
        tether = str(platform_root() / "stack" / "tether.py")
        number = str(int(signal.SIGTERM))
        line = [sys.executable, "-I", "-S", tether, number, str(os.getpid()), *line]
    log_path(data_dir).parent.mkdir(parents=True, exist_ok=True)
    with log_path(data_dir).open("wb") as log:
        return subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )


def roll(data_dir: Path, services: tuple[str, ...]) -> list[str]:
    """Has the supervisor replace them one after the other. Raises `Error`."""
    stack = stackfile.locate(data_dir)
    if stack.roll and not has_ended(stack.roll):
        raise Error("a rolling restart is under way: wait for it; logs/stack.log tells how far")
    wanted = {"id": uuid.uuid4().hex, "services": list(services)}
    ask(data_dir / "roll.json", wanted)
    os.kill(stack.pid, signal.SIGUSR1)
    told = wait_rolled(data_dir, wanted)
    if told["error"]:
        problem = f"{told['services'][len(told['done'])]} was not replaced and goes on as it was"
        raise Error(f"{problem}: {told['error']}")
    return list(told["done"])


def ask(path: Path, wanted: dict[str, Any]) -> None:
    """Only the owner reads it, and never half of it."""
    unfinished = path.with_suffix(".new")
    unfinished.touch(mode=0o600)
    unfinished.write_text(json.dumps(wanted))
    unfinished.replace(path)


def has_ended(told: Mapping[str, Any]) -> bool:
    return bool(told["error"]) or told["done"] == told["services"]


def wait_rolled(data_dir: Path, wanted: dict[str, Any]) -> Mapping[str, Any]:
    deadline = time.monotonic() + ROLL_S * len(wanted["services"])
    while time.monotonic() < deadline:
        stack = stackfile.locate(data_dir)
        if stack.roll.get("id") == wanted["id"] and has_ended(stack.roll):
            return stack.roll
        time.sleep(POLL_S)
    raise Error(f"the rolling restart did not end; its words are in {log_path(data_dir)}")


def log_path(data_dir: Path) -> Path:
    """The supervisor's own words; what each program says lies in files of its own beside it."""
    return data_dir / "logs" / "stack.log"


def wait_ready(
    data_dir: Path,
    process: "subprocess.Popen[bytes]",
    timeout_s: float = READY_S,
) -> stackfile.Stack:
    """Until the file of the stack that this process guards says that every program is ready."""
    deadline = time.monotonic() + timeout_s
    path = data_dir / stackfile.FILE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise Error(f"the stack ended with {process.returncode}:\n{log_tail(data_dir)}")
        with contextlib.suppress(Error):  # not written yet
            stack = stackfile.read(path)
            if stackfile.is_alive(stack.pid) and stack.is_up:
                return stack
        time.sleep(POLL_S)
    raise Error(f"the stack was not ready within {timeout_s:.0f} s:\n{log_tail(data_dir)}")


def log_tail(data_dir: Path) -> str:
    lines = log_path(data_dir).read_text(errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


def stop(pid: int) -> float:
    """SIGTERM, then until it is gone; seconds it took. Raises `Error` when it stays."""
    started = time.monotonic()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    while stackfile.is_alive(pid):
        if time.monotonic() - started > STOP_S:
            raise Error(
                f"process {pid} did not stop within {STOP_S:.0f} s; its words are in logs/stack.log"
            )
        time.sleep(POLL_S)
    return time.monotonic() - started
