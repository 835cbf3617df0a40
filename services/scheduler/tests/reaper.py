"""`python reaper.py FOLDER`: ends the commands below a test's folder once standard input closes.

The test holds the other end, so also when it is killed: `timeout` sends SIGTERM, after which pytest
finishes no fixture, and a shim is made to outlive whoever started it.
"""

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

END_S = 10
"""For all of them to be gone; then SIGALRM ends this process."""


def shims(folder: Path) -> Iterator[int]:
    for one in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (one / "cmdline").read_bytes().decode().split("\0")
            if any(word.endswith("/shim.py") for word in words) and is_below(words, folder):
                yield int(one.name)


def is_below(words: list[str], folder: Path) -> bool:
    return any(word.startswith(f"{folder}/") for word in words)


def until_gone(lock: Path) -> None:
    """A shim holds its lock for as long as it lives, and its command ends with it."""
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def main(folder: Path) -> None:
    sys.stdin.read()
    signal.alarm(END_S)
    for shim in shims(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(shim, signal.SIGKILL)
    for lock in folder.glob("**/workers/*/lock"):
        until_gone(lock)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
