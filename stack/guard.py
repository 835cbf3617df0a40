"""Runs the supervisor in a child, and ends whatever is left when that ends, however it ends.

Programs are tethered to the supervisor, but their own children are not: of a trainer whose
supervisor was killed, two of Ray's agents live on. They become ours, and go.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Collection
from time import monotonic, sleep

import psutil

from stack import tether

log = logging.getLogger(__name__)
PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 2.0
"""For those that were told to end when the supervisor did: Postgres takes 0.1 s."""
SWEEP_S = 10.0
POLL_S = 0.02


def guarded(work: Callable[[], int]) -> int:
    """Returns what `work` returned in the child, or 128 + the signal that killed it.

    A child whose guard is killed gets SIGTERM.
    """
    adopt_orphans()
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        tether.tie(signal.SIGTERM, guard)
        sys.exit(work())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: send(child, received))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    sweep(grace_s=GRACE_S if code else 0.0)
    return code if code >= 0 else 128 - code


def adopt_orphans() -> None:
    """What our descendants leave becomes our child, instead of init's."""
    if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed")


def sweep(grace_s: float) -> None:
    """Waits for our children to end, and from `grace_s` on insists."""
    started = monotonic()
    while strays := children():
        waited_s = monotonic() - started
        if waited_s > SWEEP_S:
            log.warning("processes %s did not end in %s s", strays, SWEEP_S)
            return
        end(strays if waited_s >= grace_s else [])
        sleep(POLL_S)


def children(besides: Collection[int] = ()) -> list[int]:
    """Our living children; those that ended are buried."""
    found = [child.pid for child in psutil.Process().children() if child.pid not in besides]
    return [pid for pid in found if not is_buried(pid)]


def is_buried(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def end(pids: Collection[int]) -> None:
    for pid in pids:
        send(pid, signal.SIGKILL)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
