"""Holds one command for the process engine, and outlives the agent: `shim.py FOLDER`.

It keeps the folder's lock (an inherited descriptor) for as long as it lives, so that whoever can
take the lock knows that it is gone, without a process id that may have been given away again. On
SIGTERM it ends the command's whole group, politely first. It writes the exit code last. Standard
library alone: it stays in memory for as long as the command runs.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
LOG_BYTES_MAX = 8 << 20
"""Then the log begins anew: what is wanted of it is its end."""
READ_BYTES = 64 << 10
DRAIN_S = 2.0
CANNOT_START = 127


class Command:
    """The command, and the end it is brought to."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.stopping = False
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        self.process = subprocess.Popen(
            self.task["argv"],
            env=self.task["env"],
            cwd=self.task["cwd"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=self.confine,
        )
        if self.stopping:
            self.stop()
        return self.process

    def confine(self) -> None:
        """In the child: it ends with the shim, and its data with its share of the memory.

        RLIMIT_DATA, not RLIMIT_AS: torch and Go reserve many times the addresses they use.
        """
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limit := self.task["memory_bytes"]:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    def on_term(self, *_: object) -> None:
        if not self.stopping:
            self.stopping = True
            self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.send(signal.SIGTERM)
            signal.setitimer(signal.ITIMER_REAL, max(self.task["grace_s"], 0.001))

    def kill(self, *_: object) -> None:
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            self.stopping = True  # nobody of its group is left


def keep(read_from: int, path: Path) -> None:
    """Whatever it writes, to its end, within a bound."""
    with path.open("wb") as log:
        while piece := os.read(read_from, READ_BYTES):
            if log.tell() + len(piece) > LOG_BYTES_MAX:
                log.seek(0)
                log.truncate()
            log.write(piece)
            log.flush()


def run(command: Command, folder: Path) -> dict[str, Any]:
    try:
        process = command.start()
    except OSError as error:
        return {"code": CANNOT_START, "problem": str(error)}
    assert process.stdout is not None
    keeping = threading.Thread(
        target=keep, args=(process.stdout.fileno(), folder / "log"), daemon=True
    )
    keeping.start()
    code = process.wait()
    signal.setitimer(signal.ITIMER_REAL, 0)
    command.kill()  # what it left behind in its group
    keeping.join(DRAIN_S)
    return {"code": code, "problem": ""}


def main(folder: Path) -> None:
    command = Command(json.loads((folder / "task.json").read_text()))
    signal.signal(signal.SIGTERM, command.on_term)
    signal.signal(signal.SIGALRM, command.kill)
    write(folder / "pid", str(os.getpid()))
    write(folder / "exit.json", json.dumps(run(command, folder)))


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    partly = path.with_suffix(".part")
    partly.write_text(text)
    partly.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
