"""When it is worth looking again at whom others may be evicted for.

After every placement and every end it is; while nothing is placed and nothing ends, only time can
change who gives way to whom: somebody has been served enough to sink a level, somebody has waited
too long, a queue owes less than it did. A cluster that is full of long jobs is so looked at a few
times a day, or every 5 min where queues owe each other, not every 10 s.
"""

from collections.abc import Iterator

from services.scheduler import debts, levels
from services.scheduler.book import Book
from services.scheduler.jobs import Job
from services.scheduler.shapes import GPU_MILLI
from services.scheduler.stimuli import QueueSpec

NEVER = float("inf")


class Looks:
    """What there was to see the last time; no part of the state, for a new one looks at once."""

    def __init__(self) -> None:
        self.seen: tuple[int, list[QueueSpec]] | None = None
        self.at = 0.0
        self.turn: float | None = None
        """The answer, while there is nothing new to see."""

    def note(self, book: Book) -> None:
        self.seen = book.changes, list(book.specs.values())
        self.at, self.turn = book.now, None

    def next(self, book: Book) -> float:
        """Not before then; 0 for as soon as can be."""
        if self.seen is None or self.seen[0] != book.changes:
            return 0.0
        if self.seen[1] != list(book.specs.values()):
            return 0.0
        if self.turn is None:
            self.turn = min(turns(book, self.at), default=NEVER)
        return self.turn


def turns(book: Book, now: float) -> Iterator[float]:
    """When time alone changes something for those who wait."""
    rivals: dict[str, None] = {}
    for queue in book.lines.by_queue:
        spec = book.specs.get(queue)
        if spec is None:
            continue
        if spec.aging_s or (spec.grace_s and spec.reclaim != "never"):
            yield 0.0
        if spec.order == "attained":
            rivals[queue] = None
            yield book.overdue[0][0] if book.overdue else NEVER
        if spec.cohort in book.quota.leveled:
            rivals.update((one.queue, None) for one in book.quota.cohorts[spec.cohort])
            yield debts.next_sample(now)
    for queue in rivals:
        yield from (sinks_at(job, now) for job in book.running_of(queue))


def sinks_at(job: Job, now: float) -> float:
    """When it has reached the next level: a second late, for rounding, and never early."""
    level = levels.level(job.attained(now))
    if level == len(levels.LEVELS_GPU_S) or not job.gpu_milli:
        return NEVER
    since = job.live.running_at or job.live.placed_at
    left_gpu_s = levels.LEVELS_GPU_S[level] - job.attained_gpu_s
    return since + left_gpu_s * GPU_MILLI / job.gpu_milli + 1
