"""Who is next, and whether there is a place: the scheduler's decisions.

Lines are asked in order: queues within their own before those that borrow, then by priority (by
attained service), then by submission; in a cohort by attained service by level first. What cannot
be placed shuts its line until something is freed that could change that; later ones pass, as far as
the first one's reservation allows.
"""

import heapq

from services.scheduler import backfill, elastic, levels, moves, preempt
from services.scheduler.backfill import Reservation
from services.scheduler.book import Book, Cause, Claim
from services.scheduler.jobs import PLACED, WAITING, Job, Key
from services.scheduler.lines import Line, Name, place_of
from services.scheduler.looks import Looks
from services.scheduler.shapes import Free, Machine, Spot, admits, room
from services.scheduler.stimuli import QueueSpec

NEVER = float("inf")
LOOK_S = 10.0
"""Between two looks at whom others may be evicted for. What arrives is looked at at once."""
IDLE_MAX = 16
"""Rounds, and 4 for each line, in which only the reservation changes hands. An order that is not
one would go on for ever."""
Order = tuple[int, int, float, float, int, int]
"""Smaller is first, and who is first of a line is so by this, too."""


class Chooser(Book):
    """The book, and what decides."""

    def __init__(self) -> None:
        super().__init__()
        self.reservation: Reservation | None = None
        self.looked_at = 0.0
        """When it was last asked for whom others may be evicted now."""
        self.looks = Looks()
        self.unreservable: tuple[int, Key] = (-1, ("", ""))
        """For whom there was no reservation, and when: it need not be asked again."""
        self.first: Order | None = None
        """Who of those that only lack room comes first, if that was asked."""
        self.shares: dict[Name, int] = {}
        self.shares_at = 0, 0.0

    def place_what_fits(self) -> None:
        """Everything that may be placed now."""
        self.reopen()
        self.keep_reservation()
        token, idle = self.token, 0
        while self.lines.open:
            self.ask_in_order()
            self.reopen()
            token, idle = self.token, 0 if self.token != token else idle + 1
            assert idle <= IDLE_MAX + 4 * len(self.lines.of), "two reservations take turns"
        assert not self.lines.may_evict

    def ask_in_order(self) -> None:
        """The open lines, until one of them changes what the others may have."""
        for line in sorted(self.lines.open.values(), key=lambda line: self.order(line.head)):
            before = self.changes, self.reservation
            if not self.place_from(line):
                self.lines.shut(line)
                if before == (self.changes, None):
                    self.reserve_for(line)
            if before != (self.changes, self.reservation):
                self.keep_reservation()
                return

    def order(self, job: Job) -> Order:
        spec = self.specs.get(job.request.queue)
        first, second, number = place_of(job, spec)
        if spec is None:
            return 0, -job.request.priority, first, second, 0, number
        share = self.share_of(spec, job) if spec.cohort else 0
        if spec.cohort in self.quota.leveled:
            return 0, -self.rank(job), first, second, share, number
        return share, -self.rank(job), first, second, 0, number

    def share_of(self, spec: QueueSpec, job: Job) -> int:
        """What share of its cohort its queue would have with it; kept until something changes.

        By levels it is 0 only for what is due to it: who owes counts as a borrower.
        """
        if self.shares_at != (self.changes, self.now):
            self.shares_at = self.changes, self.now
            self.shares.clear()
        name = spec.queue, job.ask
        if name not in self.shares:
            shares = (self.share_with(spec, claim) for claim in self.claims(job))
            self.shares[name] = min(shares, default=0)
        return self.shares[name]

    def share_with(self, spec: QueueSpec, claim: Claim) -> int:
        share = self.quota.share(spec.queue, claim.amounts)
        if spec.cohort in self.quota.leveled:
            return 0 if self.is_due(spec.queue, claim.amounts) else share + 1
        return share

    def place_from(self, line: Line) -> bool:
        """One of the line's jobs: the first, or else one that is through in time."""
        job = line.head
        if self.try_to_place(job):
            return True
        if self.gives_way(job) and (short := line.shortest) is not None and short is not job:
            return self.try_to_place(short)
        if self.deployments and any(map(self.place_on_lent_room, elastic.claimants(line))):
            return True
        return line.name in self.lines.may_evict and self.evict_for(job)

    def place_on_lent_room(self, job: Job) -> bool:
        if self.gives_way(job):
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
        holder = self.reservation.job if self.reservation else job.key
        if has_quota and holder != job.key and not self.gives_way(job):
            self.drop_reservation()
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
        self.first = None
        if not self.ends:
            return
        shut = [line for name, line in self.lines.of.items() if name not in self.lines.open]
        for line in sorted(shut, key=lambda line: self.order(line.head)):
            self.reserve_for(line)
            if self.first is not None:
                return

    def reserve_for(self, line: Line) -> None:
        """Its head is before all that were asked to wait for room, or changes nothing."""
        order = self.order(line.head)
        if not self.ends or (self.first is not None and self.first < order):
            return
        claims = self.claims(line.head)
        claim = next((c for c in claims if self.quota.allows(line.queue, c.amounts)), None)
        if claim is None:
            return
        self.first = order
        if self.unreservable == (self.changes, line.head.key):
            return
        self.reservation = backfill.reserve(self, claim)
        if self.reservation is None:
            self.unreservable = self.changes, line.head.key

    def drop_reservation(self) -> None:
        """What it kept back may be for others now."""
        self.reservation = None
        self.lines.open |= self.lines.of

    # --- eviction

    def evict_for(self, job: Job) -> bool:
        if not preempt.can_evict(self, job.request.queue) or self.gives_way(job):
            return False
        if self.move_for(job):
            return True
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

    def move_for(self, job: Job) -> bool:
        """Others make room and are elsewhere at once."""
        for claim in self.claims(job):
            found = moves.moves_for(self, claim)
            if found is None:
                continue
            moved, spots = found
            for other, _ in moved:
                reason = f"moved for {'/'.join(job.key)}"
                self.move(other, WAITING, Cause(reason=reason, preempted=True))
            for one, places in [(job, spots), *moved]:
                self.place(one, places)
            return True
        return False

    def look(self) -> None:
        """The first of every line may have others evicted now, where its queue allows it."""
        self.looked_at = self.now
        self.looks.note(self)
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
        due_at = NEVER
        if any(preempt.can_evict(self, queue) for queue in self.lines.by_queue):
            due_at = max(self.looked_at + LOOK_S, self.looks.next(self))
        if self.reservation is not None:
            due_at = min(due_at, self.reservation.at + backfill.LATE_S)
        return due_at

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
