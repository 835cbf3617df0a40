"""`python reaper.py MARK FOLDER`: ends what Ray leaves behind when the trainer is gone.

Ray's raylet and workers die with the process that started them, also under SIGKILL, but two of its
agents do not: seen living on for minutes. The trainer holds the other end of this process's
standard input; once that closes, whatever carries MARK in its environment is killed and FOLDER,
Ray's session, is removed.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SWEEPS_MAX = 50
SWEEP_S = 0.2


def marked(mark: str) -> Iterator[int]:
    """Other processes that have MARK among their variables."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                variables = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark.encode() in variables:
                yield int(folder.name)


def sweep(mark: str) -> None:
    """Kills until nothing is left: what dies last may have started something."""
    for _ in range(SWEEPS_MAX):
        found = list(marked(mark))
        if not found:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(SWEEP_S)


def main() -> None:
    mark, folder = sys.argv[1:]
    sys.stdin.read()
    sweep(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
