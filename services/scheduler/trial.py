"""The scheduler as it would be: copies, to which changes happen."""

from collections.abc import Sequence
from heapq import nsmallest

import msgspec

from services.scheduler.changes import PRIORITY, Change, again, stimuli_of
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.jobs import LIVE, Job, Key
from services.scheduler.lines import Line

SHORTEST_MAX = 16
TRIED_BYTES_MAX, TRIED_MIN = 64 << 20, 16
"""Of all copies for one job, and so many at least. 2,000 nodes with 5,000 placed jobs are 3 MB, and
a copy of them takes 0.3 s."""
FIRST_MAX = 256
"""Of a line; so many pass nobody by what is changed here."""
WORLDS_KEPT = 4


class World:
    """The scheduler after some changes: a copy, to try out."""

    def __init__(self, state: bytes, key: Key, now: float) -> None:
        self.scheduler = restore(msgspec.msgpack.decode(state, type=State))
        self.key, self.now = key, now
        self.asked_again = False

    @property
    def job(self) -> Job:
        return self.scheduler.jobs[self.key]

    def is_placed(self) -> bool:
        return self.job.state in LIVE

    def apply(self, changes: Sequence[Change]) -> None:
        for change in changes:
            told = list(stimuli_of(self.scheduler, self.job, change))
            if change.kind == PRIORITY:
                self.key, self.asked_again = (self.key[0], again(self.job)), True
            for stimulus in told:
                self.scheduler.handle(stimulus, self.now)


class Trial:
    """What changes would do to one job, each time from the same state."""

    def __init__(self, state: bytes, key: Key, now: float) -> None:
        self.state, self.key, self.now = state, key, now
        self.tried: dict[tuple[Change, ...], bool] = {}
        self.worlds: dict[tuple[Change, ...], World] = {}
        """The last ones; they are looked at and stay as they are."""
        self.left_bytes = max(TRIED_BYTES_MAX, TRIED_MIN * len(state))

    @property
    def is_spent(self) -> bool:
        return self.left_bytes <= 0

    def after(self, changes: Sequence[Change]) -> World:
        key = tuple(changes)
        world = self.worlds.pop(key, None)
        if world is None:
            self.left_bytes -= len(self.state)
            world = World(self.state, self.key, self.now)
            world.apply(changes)
        self.worlds[key] = world
        if len(self.worlds) > WORLDS_KEPT:
            del self.worlds[next(iter(self.worlds))]
        return world

    def places(self, changes: Sequence[Change]) -> bool:
        """Where too much was tried already nothing more is: no is the safe answer, for what is
        asked here is always whether less would do.
        """
        key = tuple(changes)
        if key not in self.tried:
            if self.is_spent:
                return False
            self.tried[key] = self.after(changes).is_placed()
        return self.tried[key]


def copy_of(scheduler: Scheduler, key: Key) -> bytes:
    """What decisions on a waiting job follow from. What has ended is none of it; of a
    line that is longer than `FIRST_MAX` only the first, and who is through soonest.
    """
    kept = {job.key for line in scheduler.lines.of.values() for job in first_of(line)} | {key}
    state = scheduler.snapshot()
    state.jobs = [job for job in state.jobs if job.placement is not None or job.key in kept]
    state.finished = []
    return msgspec.msgpack.encode(state)


def first_of(line: Line) -> list[Job]:
    if len(line.places) <= FIRST_MAX:
        return line.jobs()
    waiting = line.jobs()
    first = nsmallest(FIRST_MAX, waiting, key=lambda job: line.places[job.key])
    bounded = (job for job in waiting if job.request.duration_s)
    return first + nsmallest(SHORTEST_MAX, bounded, key=lambda job: job.request.duration_s)
