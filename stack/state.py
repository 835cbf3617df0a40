"""What a stack keeps in its data folder about itself: `stack.json`, and a lock while it runs."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec

FILE = "stack.json"
LOCK = "lock"


class Locked(OSError):
    """Another stack runs on this folder."""


class Process(msgspec.Struct, kw_only=True):
    pid: int | None = None
    restarts: int = 0
    ready: bool = False


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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the kernel lets go when it ends. Raises `Locked`."""
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            problem = f"a stack already runs on {folder} (pid {holder}); `leptonic down` stops it"
            raise Locked(problem) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
