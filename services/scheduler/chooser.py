"""Who is next, and whether there is a place: the scheduler's decisions.

Lines are asked in order: queues within their own before those that borrow, then by priority (by
attained service), then by submission. What cannot be placed shuts its line until something is
freed that could change that; later ones pass, as far as the first one's reservation allows.
"""

import heapq

from services.scheduler import backfill, elastic, levels, preempt
from services.scheduler.backfill import Reservation
from services.scheduler.book import Book, Cause, Claim
from services.scheduler.jobs import PLACED, WAITING, Job, Key
from services.scheduler.lines import Line, place_of
from services.scheduler.shapes import Free, Machine, Spot, admits, room

NEVER = float("inf")
LOOK_S = 10.0
"""Between two looks at whom others may be evicted for. What arrives is looked at at once."""
Order = tuple[int, int, float, int]


class Chooser(Book):
    """The book, and what decides."""

    def __init__(self) -> None:
        super().__init__()
        self.reservation: Reservation | None = None
        self.looked_at = 0.0
        """When it was last asked for whom others may be evicted now."""
        self.unreservable: tuple[int, Key] = (-1, ("", ""))
        """For whom there was no reservation, and when: it need not be asked again."""

    def place_what_fits(self) -> None:
        """Everything that may be placed now."""
        self.reopen()
        self.keep_reservation()
        while self.lines.open:
            line = self.next_line()
            if not self.place_from(line):
                self.lines.shut(line)
            self.reopen()
            self.keep_reservation()
        assert not self.lines.may_evict

    def next_line(self) -> Line:
        lines = self.lines.open.values()
        if len(lines) == 1:
            return next(iter(lines))
        return min(lines, key=lambda line: self.order(line.head))

    def order(self, job: Job) -> Order:
        spec = self.specs.get(job.request.queue)
        if spec is None:
            return 0, -job.request.priority, 0, job.number
        share = min(self.quota.share(spec.queue, claim.amounts) for claim in self.claims(job))
        return share, -self.rank(job), place_of(job, spec)[1], job.number

    def place_from(self, line: Line) -> bool:
        """One of the line's jobs: the first, or else one that is through in time."""
        job = line.head
        if self.try_to_place(job):
            return True
        if self.gives_way(job) and (short := line.shortest) is not None and short is not job:
            return self.try_to_place(short)
        if self.place_on_lent_room(job):
            return True
        return line.name in self.lines.may_evict and self.evict_for(job)

    def place_on_lent_room(self, job: Job) -> bool:
        if not self.deployments or self.gives_way(job):
            return False
        for claim in self.claims(job):
            spots = elastic.make_room(self, claim)
            if spots is not None:
                self.place(job, spots)
                return True
        return False

    def try_to_place(self, job: Job) -> bool:
        has_quota = False
        for claim in self.claims(job):
            if not self.quota.allows(job.request.queue, claim.amounts):
                continue
            has_quota = True
            spots = self.room_for(claim)
            if spots is not None:
                self.place(job, spots)
                return True
        if has_quota and self.reservation and not self.gives_way(job):
            self.drop_reservation(job)
        return False

    def place(self, job: Job, spots: list[Spot]) -> None:
        passes = self.gives_way(job)
        self.move(job, PLACED, Cause(spots=tuple(spots)))
        reservation = self.reservation
        if reservation is None or passes:
            return
        if {spot.node for spot in spots} & set(reservation.nodes):
            self.drop_reservation()

    # --- the reservation

    def gives_way(self, job: Job) -> bool:
        """Whether another job has a reservation and comes before it."""
        if self.reservation is None or self.reservation.job == job.key:
            return False
        return self.order(self.jobs[self.reservation.job]) < self.order(job)

    def room_for(self, claim: Claim) -> list[Spot] | None:
        if self.reservation is not None and self.gives_way(claim.job):
            return backfill.spots_beside(self, claim, self.reservation)
        return self.spots_for(claim.ask)

    def keep_reservation(self) -> None:
        """The first job that only lacks room has one, where the ends of others are known."""
        if self.reservation is not None:
            job = self.jobs.get(self.reservation.job)
            if job and job.state == WAITING and backfill.holds(self, self.reservation):
                return
            self.drop_reservation()
        if not self.ends:
            return
        claim = self.first_without_room()
        if claim is None or self.unreservable == (self.changes, claim.job.key):
            return
        self.reservation = backfill.reserve(self, claim)
        if self.reservation is None:
            self.unreservable = self.changes, claim.job.key

    def drop_reservation(self, job: Job | None = None) -> None:
        """What it kept back may be for others now."""
        if self.reservation is not None and (job is None or self.reservation.job != job.key):
            self.reservation = None
            self.lines.open |= self.lines.of

    def first_without_room(self) -> Claim | None:
        shut = [line for name, line in self.lines.of.items() if name not in self.lines.open]
        best: tuple[Order, Claim] | None = None
        for line in shut:
            job = line.head
            order = self.order(job)
            if best is not None and best[0] < order:
                continue
            for claim in self.claims(job):
                if self.quota.allows(line.queue, claim.amounts):
                    best = order, claim
                    break
        return best[1] if best else None

    # --- eviction

    def evict_for(self, job: Job) -> bool:
        if not preempt.can_evict(self, job.request.queue) or self.gives_way(job):
            return False
        for claim in self.claims(job):
            found = preempt.victims_of(self, claim)
            if found is None:
                continue
            victims, spots = found
            for victim in victims:
                self.evicted.add(victim.key)
                reason = f"preempted for {'/'.join(job.key)}"
                self.move(victim, WAITING, Cause(reason=reason, preempted=True))
            self.place(job, spots)
            return True
        return False

    def look(self) -> None:
        """The first of every line may have others evicted now, where its queue allows it."""
        self.looked_at = self.now
        self.promote_overdue()
        for queue, lines in self.lines.by_queue.items():
            if preempt.can_evict(self, queue):
                self.lines.open |= lines
                self.lines.may_evict.update(lines)

    def promote_overdue(self) -> None:
        """Whoever waited too long in a queue by attained service goes before everybody there."""
        while self.overdue and self.overdue[0][0] <= self.now:
            *_, job = heapq.heappop(self.overdue)
            if job.state == WAITING and job.waited(self.now) >= levels.WAIT_MAX_S:
                job.is_overdue = True
                self.enqueue(job)

    @property
    def due_at(self) -> float:
        """When a `Tick` could change something, though no node is silent."""
        if any(preempt.can_evict(self, queue) for queue in self.lines.by_queue):
            return self.looked_at + LOOK_S
        return NEVER

    # --- which lines open again

    def reopen(self) -> None:
        freed, loosened = self.freed, self.loosened
        if not freed and not loosened:
            return
        self.freed, self.loosened = set(), set()
        nodes = [name for name in sorted(freed) if self.is_open(name)]
        frees = [(self.machines[name], self.pool.free(name)) for name in nodes]
        queues = {one for queue in loosened for one in self.together(queue)}
        for name, line in self.lines.of.items():
            if name in self.lines.open:
                continue
            if line.queue in queues or any(may_fit(line, *node) for node in frees):
                self.lines.open[name] = line

    def together(self, queue: str) -> list[str]:
        """The queues of its cohort, if its use counts for theirs."""
        spec = self.specs.get(queue)
        if spec is None or not spec.nominal:
            return []
        return [one.queue for one in self.quota.cohorts.get(spec.cohort, (spec,))]


def may_fit(line: Line, machine: Machine, free: Free) -> bool:
    """Whether a node has room for the gang, or for a part of one that may be spread."""
    shape, workers = line.ask.shape, line.ask.workers if line.ask.one_node else 1
    if shape.cpu_milli * workers > free.cpu_milli or shape.memory_mib * workers > free.memory_mib:
        return False
    return admits(machine, shape) and room(free, shape) >= workers
