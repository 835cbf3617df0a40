"""Who goes first where nobody knows how long a job will take: multi-level least attained service.

A job starts at the top and sinks as it is served, so that short jobs are over before they ever
wait. What it is served is GPU seconds: a backlog is held by the fewest jobs if large ones hold it.
Jobs of one level keep their turn, so nobody is evicted for an equal. Tiresias (NSDI'19) has levels
and GPU time; new here are the bound on waiting and, above all, the order of victims: see `loss`.

Replayed on Philly's 1 to 14 October (docs/scheduler.md), the mean wait hardly depends on where the
levels are: 123 to 128 s for nine sets of thresholds from 0.1 to 256 GPU hours.
"""

from bisect import bisect_right
from collections.abc import Iterable

import msgspec

LEVELS_GPU_S = (3_600, 8 * 3_600, 64 * 3_600)
"""A job that was served as much is a level lower."""
WAIT_MAX_S = 32 * 3_600
"""Who waited as long in all goes before everybody, and nobody of a level takes its place again.
Below a day it costs others more than it gives: in an overload nearly everybody becomes overdue."""
OVERDUE = -1


class Standing(msgspec.Struct, frozen=True):
    """What a job got and did not get, as of now."""

    number: int
    """Order of submission."""
    gpus: int
    """Of the whole gang; milli."""
    attained_gpu_s: float
    """Over all its attempts, with the one that runs."""
    waited_s: float
    """In all, since it was submitted, with the wait that lasts."""


def level(attained_gpu_s: float) -> int:
    """0 for who got little, to `len(LEVELS_GPU_S)`."""
    return bisect_right(LEVELS_GPU_S, attained_gpu_s)


def rank(job: Standing) -> int:
    """Smaller goes first."""
    return OVERDUE if job.waited_s >= WAIT_MAX_S else level(job.attained_gpu_s)


def may_rotate(head: Standing, victim: Standing) -> bool:
    """Whether one that waits may take the place of one that runs."""
    return rank(head) < rank(victim)


def loss(victims: Iterable[Standing]) -> tuple[int, int, int]:
    """Of sets of victims that each make room, the smallest is evicted.

    The fewest jobs: each of them waits from now on. Of as many the larger: they will not be in the
    way of many again, and the GPUs that are too many for the head serve who waits behind it. Then
    the newest. Philly: 124 s of mean wait, and 218 s with the smaller ones first.
    """
    gone = list(victims)
    return len(gone), -sum(one.gpus for one in gone), -max(one.number for one in gone)
