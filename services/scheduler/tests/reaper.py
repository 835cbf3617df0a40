"""`python reaper.py FOLDER`: ends the commands below a test's folder once standard input closes.

The test holds the other end, so also when it is killed: `timeout` sends SIGTERM, after which pytest
finishes no fixture, and a shim is made to outlive whoever started it.
"""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

TRIES_MAX = 250
TRY_S = 0.02


def is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def end(shim: Path) -> None:
    """Until it is gone: it may not have said its process id yet. Its command goes with it."""
    for _ in range(TRIES_MAX):
        if not is_held(shim / "lock"):
            return
        if (shim / "pid").exists():
            os.kill(int((shim / "pid").read_text()), signal.SIGKILL)
        time.sleep(TRY_S)


def main(folder: Path) -> None:
    sys.stdin.read()
    for lock in folder.glob("**/workers/*/lock"):
        end(lock.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
