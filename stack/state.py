"""What a stack keeps in its data folder about itself: `stack.json`, and a lock while it runs."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import IO

import msgspec

FILE = "stack.json"
LOCK = "lock"
ROLL = "roll.json"
"""Asks for a rolling restart; SIGUSR1 says that it lies there."""
DYING_S = 15.0
DYING_POLL_S = 0.05


class Locked(OSError):
    """Another stack runs on this folder."""


class Process(msgspec.Struct, kw_only=True):
    pid: int | None = None
    restarts: int = 0
    ready: bool = False


class Roll(msgspec.Struct, kw_only=True):
    """A rolling restart: what was asked for, and how far it is."""

    id: str
    services: list[str]
    done: list[str] = []
    error: str = ""
    """Why it ended before all were done; what was running goes on."""


class Secrets(msgspec.Struct, frozen=True):
    """Made on the first start, kept for the life of the folder."""

    s3_access_key: str
    s3_secret_key: str
    postgres_password: str


class State(msgspec.Struct, kw_only=True):
    """`stack.json`. `pid` is null and `processes` empty once the stack was stopped."""

    project: str = "default"
    pid: int | None = None
    started_at: str = ""
    endpoints: dict[str, str] = {}
    processes: dict[str, Process] = {}
    roll: Roll | None = None
    """The last one."""
    ports: dict[str, int] = {}
    secrets: Secrets


def load(folder: Path) -> State:
    """What the folder holds, or a new state with new secrets."""
    file = folder / FILE
    if file.exists():
        return msgspec.json.decode(file.read_bytes(), type=State)
    made = Secrets(secrets.token_hex(10), secrets.token_urlsafe(30), secrets.token_urlsafe(30))
    return State(secrets=made)


def save(state: State, folder: Path) -> None:
    """Readers see the old file or the new one; only the owner sees any."""
    unfinished = folder / f"{FILE}.new"
    unfinished.unlink(missing_ok=True)
    with open(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / FILE)


def roll_asked(folder: Path) -> Roll:
    return msgspec.json.decode((folder / ROLL).read_bytes(), type=Roll)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[IO[str]]:
    """Holds the folder for this process and what it forks; the kernel lets go when they ended.

    Waits for a holder that was killed and whose processes are being ended. Raises `Locked`.
    """
    with (folder / LOCK).open("a+") as file:
        deadline = monotonic() + DYING_S
        while not is_taken(file):
            file.seek(0)
            holder = file.read().strip()
            if is_alive(holder) or monotonic() > deadline:
                told = f"a stack already runs on {folder} (pid {holder or 'unknown'})"
                raise Locked(f"{told}; `leptonic down` stops it")
            sleep(DYING_POLL_S)
        yield file


def is_taken(file: IO[str]) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()


def sign(lock: IO[str]) -> None:
    """Others learn that we hold it."""
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
