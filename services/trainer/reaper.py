"""`python reaper.py MARK FOLDER`: ends what Ray leaves behind when the trainer is gone.

Ray's raylet and workers die with the process that started them, also under SIGKILL, but two of its
agents do not: seen living on for minutes. The trainer holds the other end of this process's
standard input; once that closes, whatever carries MARK in its environment is killed and FOLDER,
Ray's session, is removed. A reaper that was killed itself leaves its folder to the next one.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SWEEPS_MAX = 100
SWEEP_S = 0.2
EMPTY_SWEEPS = 3
"""In a row: a process that is just being started shows no environment for a moment."""
PREFIX = "lt-"
"""A session's folder is `lt-<pid of its trainer>-...`."""


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
    empty = 0
    for _ in range(SWEEPS_MAX):
        found = list(marked(mark))
        empty = 0 if found else empty + 1
        if empty == EMPTY_SWEEPS:
            return
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(SWEEP_S)


def remove_stale(parent: Path) -> None:
    """Folders of trainers that are gone."""
    for folder in parent.glob(f"{PREFIX}*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    mark, folder = sys.argv[1:]
    remove_stale(Path(folder).parent)
    sys.stdin.read()
    sweep(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
