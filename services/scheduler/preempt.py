"""Whom a job may have evicted, and whom it has: the fewest, and only if it can be placed then."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice

from services.scheduler import levels
from services.scheduler.book import Book, Claim
from services.scheduler.jobs import LIVE, Job
from services.scheduler.quota import Amounts, amounts_placed
from services.scheduler.shapes import Free, Spot, admits, room

VICTIMS_MAX = 512
"""So many are looked at, those that give way most easily first."""
Together = Callable[[list[Job]], list[Job]]
"""Who of some may go together, the first before the others."""


class Head:
    """The one rule: who may have others evicted, and whom.

    Of its own queue: what has a lower priority, or by levels of service, as the queue says. Of its
    cohort: what another queue runs on borrowed resources, as long as the claim's queue keeps
    within its own with it, and after the grace that its queue grants; among queues by attained
    service what is borrowed goes from level to level as within one queue. In a cohort by attained
    service the moment does not decide, but what each queue owes (`debts.py`): who neither borrows
    nor owes keeps what it has, everybody else's goes from level to level, and at an equal level to
    who asks for its own; if its queue wants no more than that in all, nobody of that queue goes.
    Nobody gives way to a job that was evicted by the very stimulus that is being handled, nor what
    that has placed.

    What does not depend on the victim is asked once: of hundreds of victims it is the same.
    """

    def __init__(self, book: Book, claim: Claim) -> None:
        job = claim.job
        self.book, self.claim = book, claim
        self.queue, self.priority = job.request.queue, job.request.priority
        self.spec = book.specs.get(self.queue)
        self.rank = book.rank(job)
        self.standing = job.standing(book.now)
        waited = book.now - job.waiting_since
        self.reclaims = (
            self.spec is not None
            and bool(self.spec.cohort)
            and self.spec.reclaim != "never"
            and waited >= self.spec.grace_s
            and book.quota.owns(self.queue, claim.amounts)
        )
        self.by_levels = self.spec is not None and self.spec.cohort in book.quota.leveled
        self.is_even = self.by_levels and book.is_even(self.queue, claim.amounts)
        self.is_content = (
            self.is_even and self.reclaims and book.debts.is_content(self.queue, book.lines)
        )
        self.kept: dict[str, bool] = {}
        self.debts: dict[str, int] = {}

    def may_evict(self, victim: Job) -> bool:
        placement = victim.placement
        if self.spec is None or placement is None or victim.state not in LIVE:
            return False
        if not victim.request.preemptible or placement.token > self.book.token_before:
            return False
        if self.claim.job.key in self.book.evicted:
            return False
        if victim.request.queue == self.queue:
            return not self.is_content and self.may_pass(victim, placement.rank)
        other = self.book.specs.get(victim.request.queue)
        if other is None or not self.spec.cohort or other.cohort != self.spec.cohort:
            return False
        if self.by_levels:
            return self.spec.reclaim != "never" and self.may_level(victim, placement.rank)
        if not self.book.quota.borrows(other.queue, self.claim.amounts):
            return False
        if self.reclaims and (self.spec.reclaim == "any" or placement.rank < self.rank):
            return True
        both = self.spec.order == other.order == "attained" and self.spec.reclaim != "never"
        return both and self.outranks(victim)

    def may_pass(self, victim: Job, rank: int) -> bool:
        """In its own queue."""
        assert self.spec is not None
        if self.spec.within_queue == "lower" and rank < self.rank:
            return True
        return self.spec.order == "attained" and self.outranks(victim)

    def may_level(self, victim: Job, rank: int) -> bool:
        """Of another queue, in a cohort by attained service."""
        assert self.spec is not None
        if self.keeps(victim.request.queue):
            return False
        if self.outranks(victim):
            return True
        asks = self.reclaims and self.is_even and (self.spec.reclaim == "any" or rank < self.rank)
        return asks and not levels.may_rotate(victim.standing(self.book.now), self.standing)

    def keeps(self, queue: str) -> bool:
        """Whether it has only what is its own, and owes nothing."""
        if queue not in self.kept:
            borrows = self.book.quota.borrows(queue, self.claim.amounts)
            self.kept[queue] = not borrows and self.book.is_even(queue, self.claim.amounts)
        return self.kept[queue]

    def debt(self, queue: str) -> int:
        """The most that it owes of what the claim asks for; 0 where the moment decides."""
        if not self.by_levels:
            return 0
        if queue not in self.debts:
            owes = self.book.debts.owed_by(queue, self.book.now, self.book.lines)
            self.debts[queue] = max((owes[n] for n in self.claim.amounts if n in owes), default=0)
        return self.debts[queue]

    def owes(self, queue: str) -> bool:
        return self.by_levels and not self.book.is_even(queue, self.claim.amounts)

    def still_borrows(self, queue: str, gone: Amounts) -> bool:
        """Without these of its own, any of what the claim asks for."""
        nominal = self.book.specs[queue].nominal
        return any(
            self.book.quota.has(queue, name) - gone.get(name, 0) > nominal[name]
            for name in self.claim.amounts
            if name in nominal
        )

    def outranks(self, victim: Job) -> bool:
        """By levels of service."""
        if victim.request.priority != self.priority:
            return False
        return levels.may_rotate(self.standing, victim.standing(self.book.now))


def can_evict(book: Book, queue: str) -> bool:
    """Whether jobs of the queue may ever."""
    spec = book.specs.get(queue)
    if spec is None:
        return False
    reclaims = bool(spec.cohort) and spec.reclaim != "never"
    return reclaims or spec.within_queue != "never" or spec.order == "attained"


def given(head: Head, jobs: Iterable[Job]) -> list[Job]:
    """Who of these may go together: of another queue only as many as it has borrowed, or all that
    it has if it owes.
    """
    found: list[Job] = []
    gives: dict[str, dict[str, int]] = {}
    for job in jobs:
        queue = job.request.queue
        if queue != head.queue and not head.owes(queue):
            gone = gives.setdefault(queue, {})
            if not head.still_borrows(queue, gone):
                continue
            for name, amount in amounts_placed(job.ask, job.live).items():
                gone[name] = gone.get(name, 0) + amount
        found.append(job)
    return found


def in_order(book: Book, claim: Claim) -> Iterator[Job]:
    """Borrowers first, those with the largest share; in a queue the lowest, then the newest."""
    mine = claim.job.request.queue
    spec = book.specs[mine]
    others = [one.queue for one in book.quota.cohorts.get(spec.cohort, ()) if one.queue != mine]
    if spec.reclaim == "never":
        others = []
    for queue in sorted(others, key=lambda name: (-book.quota.share(name, {}), name)):
        yield from book.running_of(queue)
    yield from book.running_of(mine)


def victims_of(book: Book, claim: Claim) -> tuple[list[Job], list[Spot]] | None:
    """Who goes, so that the claim is placed, and where; None if that does not help."""
    head = Head(book, claim)
    found = (job for job in in_order(book, claim) if head.may_evict(job))
    order = list(islice(found, VICTIMS_MAX))
    if not order or spots_without(book, claim, order) is None:
        return None
    together = partial(given, head)
    victims = on_one_node(head, order, together) or anywhere(book, claim, together(order))
    if not victims:
        return None
    spots = spots_without(book, claim, victims)
    assert spots is not None
    return victims, spots


def on_one_node(head: Head, order: list[Job], together: Together) -> list[Job]:
    """The cheapest set of those that make room on a node; [] where it takes more than that."""
    book, claim, ask = head.book, head.claim, head.claim.ask
    if not has_quota(book, claim, []) and book.spots_for(ask) is not None:
        return []  # it lacks nothing but quota, which is not on a node
    on_node: dict[str, list[Job]] = {}
    for job in order:
        for part in job.live.parts:
            on_node.setdefault(part.node, []).append(job)
    sets = [
        victims
        for name, jobs in on_node.items()
        if book.is_open(name) and admits(book.machines[name], ask.shape)
        if (victims := enough_of(head, name, together(by_size(jobs))))
        and has_quota(book, claim, victims)
    ]
    return min(sets, key=lambda victims: cost(head, victims), default=[])


def by_size(jobs: list[Job]) -> list[Job]:
    """The lowest and largest first."""
    return sorted(jobs, key=lambda one: (one.live.rank, -one.gpu_milli, -one.number))


def enough_of(head: Head, node: str, jobs: list[Job]) -> list[Job]:
    """Of those on a node as few as make room for the gang, the first before the others."""
    free, ask, chosen = head.book.pool.free(node), head.claim.ask, list[Job]()
    for job in jobs:
        chosen.append(job)
        if room(free_without(free, node, chosen), ask.shape) >= ask.workers:
            break
    else:
        return []
    for job in list(chosen[:-1]):
        rest = [one for one in chosen if one is not job]
        if room(free_without(free, node, rest), ask.shape) >= ask.workers:
            chosen = rest
    return chosen


def free_without(free: Free, node: str, jobs: list[Job]) -> Free:
    """What would be free on a node without these."""
    cpu_milli, memory_mib, gpus = free.cpu_milli, free.memory_mib, list(free.gpus)
    for job in jobs:
        shape, part = job.ask.shape, job.live.part_on(node)
        assert part is not None
        cpu_milli += len(part.gpus) * shape.cpu_milli
        memory_mib += len(part.gpus) * shape.memory_mib
        for worker in part.gpus:
            for i in worker:
                gpus[i] += shape.gpu_milli
    return Free(cpu_milli, memory_mib, tuple(gpus))


def cost(head: Head, victims: list[Job]) -> tuple[int, tuple[int, int, int, int]]:
    """Nobody of a higher priority than must be; then what those who go lose.

    Of equals they are of the queue that owes the most. If they are the newest, a queue that owes
    little is soon even, and keeps what sank far while others still owe much: Philly by VC waits
    144 s on average so, and 132 s with what is owed.
    """
    highest = max(job.live.rank for job in victims)
    jobs, gpus, newest = levels.loss(job.standing(head.book.now) for job in victims)
    debt = min(head.debt(job.request.queue) for job in victims)
    return highest, (jobs, gpus, -debt, newest)


def anywhere(book: Book, claim: Claim, order: list[Job]) -> list[Job]:
    """The shortest beginning of the order in which they give way that is enough, without those it
    does not need: the last to give way gives way as easily as can be. [] if all are not enough.
    """
    if spots_without(book, claim, order) is None:
        return []
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        if spots_without(book, claim, order[:middle]) is None:
            low = middle + 1
        else:
            high = middle
    return fewest(book, claim, order[:low])


def fewest(book: Book, claim: Claim, victims: list[Job]) -> list[Job]:
    """None of them could stay. First those who are not where it goes, then one by one."""
    spots = spots_without(book, claim, victims)
    assert spots is not None
    nodes = {spot.node for spot in spots}
    near = [job for job in victims if nodes & job.live.nodes]
    if spots_without(book, claim, near) is not None:
        victims = near
    for job in reversed(list(victims)):
        rest = [one for one in victims if one is not job]
        if spots_without(book, claim, rest) is not None:
            victims = rest
    return victims


def spots_without(book: Book, claim: Claim, victims: Sequence[Job]) -> list[Spot] | None:
    """Where the claim would go if these were gone, by quota and by room."""
    if not has_quota(book, claim, victims):
        return None
    releases = [one for job in victims for one in job.releases()]
    ask = claim.ask
    return book.pool.try_without(releases, ask.shape, ask.workers, ask.one_node)


def has_quota(book: Book, claim: Claim, victims: Sequence[Job]) -> bool:
    """Whether it may have the claim if these were gone."""
    back = [(job.request.queue, amounts_placed(job.ask, job.live)) for job in victims]
    for name, amounts in back:
        book.quota.take(name, amounts, -1)
    allowed = book.quota.allows(claim.job.request.queue, claim.amounts)
    for name, amounts in back:
        book.quota.take(name, amounts)
    return allowed
