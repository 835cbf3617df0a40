"""Who waits: jobs that ask for the same stand in one line, so that one look answers for all.

A line is shut when its first job cannot be placed, and opens again when something was freed that
could change that. So what a stimulus costs follows from the number of lines, not of jobs.
"""

import heapq
from collections.abc import Iterator

from services.scheduler import levels
from services.scheduler.jobs import Ask, Job, Key
from services.scheduler.stimuli import QueueSpec

Name = tuple[str, Ask]
"""(queue, ask)"""
Place = tuple[float, float, int]
"""In a line and a queue: smaller is earlier."""
STALE_MIN = 64
"""Entries of jobs that have gone are swept out when they are more, and the most."""


def place_of(job: Job, spec: QueueSpec | None) -> Place:
    """By priority (in a queue by attained service, then by level), then by submission.

    Where waiting raises the priority by 1 every `aging_s`, two jobs that wait keep their order: of
    priority - age / aging_s only what does not depend on the time is compared.
    """
    priority = job.request.priority
    if spec is None or (spec.order == "priority" and not spec.aging_s):
        return -priority, 0, job.number
    if spec.order == "priority":
        return job.submitted_at + job.ran_s - priority * spec.aging_s, 0, job.number
    served = levels.OVERDUE if job.is_overdue else levels.level(job.attained_gpu_s)
    return -priority, served, job.number


class Line:
    """Jobs of one queue that ask for the same."""

    def __init__(self, queue: str, ask: Ask) -> None:
        self.queue = queue
        self.ask = ask
        self.places: dict[Key, Place] = {}
        """Who stands here. Entries of the heaps that say otherwise are passed over."""
        self.serial = 0
        """Of the last entry."""
        self.by_place: list[tuple[Place, int, Job]] = []
        self.by_duration: list[tuple[int, Place, int, Job]] = []
        """Of those that know it, in seconds."""

    @property
    def name(self) -> Name:
        return self.queue, self.ask

    def add(self, job: Job, place: Place) -> None:
        """Or moves it to another place."""
        self.places[job.key] = place
        self.serial += 1
        entry = place, self.serial, job
        heapq.heappush(self.by_place, entry)
        if job.request.duration_s:
            heapq.heappush(self.by_duration, (job.request.duration_s, *entry))

    def left(self, job: Job) -> None:
        """It waits no more, wherever it stood."""
        del self.places[job.key]
        if len(self.by_place) > 2 * len(self.places) + STALE_MIN:
            self.by_place = [one for one in self.by_place if self.is_here(*one)]
            self.by_duration = [one for one in self.by_duration if self.is_here(*one[1:])]
            heapq.heapify(self.by_place)
            heapq.heapify(self.by_duration)

    def is_here(self, place: Place, _: int, job: Job) -> bool:
        return self.places.get(job.key) is place

    @property
    def head(self) -> Job:
        """The first, of a line that is not empty."""
        while not self.is_here(*self.by_place[0]):
            heapq.heappop(self.by_place)
        return self.by_place[0][-1]

    @property
    def shortest(self) -> Job | None:
        """Of those that know how long they take."""
        while self.by_duration and not self.is_here(*self.by_duration[0][1:]):
            heapq.heappop(self.by_duration)
        return self.by_duration[0][-1] if self.by_duration else None

    def jobs(self) -> list[Job]:
        """All of them, in no order."""
        return [one[-1] for one in self.by_place if self.is_here(*one)]


class Lines:
    """All of them, and which are open."""

    def __init__(self) -> None:
        self.of: dict[Name, Line] = {}
        self.by_queue: dict[str, dict[Name, Line]] = {}
        self.open: dict[Name, Line] = {}
        self.may_evict: set[Name] = set()
        """Open lines whose first job may have others evicted: it is new, or its time has come."""

    def add(self, job: Job, spec: QueueSpec | None) -> Line:
        name = job.request.queue, job.ask
        line = self.of.get(name)
        if line is None:
            line = self.of[name] = Line(*name)
            self.by_queue.setdefault(line.queue, {})[name] = line
        line.add(job, place_of(job, spec))
        self.open[name] = line
        return line

    def left(self, job: Job) -> None:
        name = job.request.queue, job.ask
        line = self.of[name]
        line.left(job)
        if not line.places:
            del self.of[name], self.by_queue[line.queue][name]
            if not self.by_queue[line.queue]:
                del self.by_queue[line.queue]
            self.shut(line)

    def shut(self, line: Line) -> None:
        self.open.pop(line.name, None)
        self.may_evict.discard(line.name)

    def waiting(self) -> Iterator[Key]:
        return (key for line in self.of.values() for key in line.places)
