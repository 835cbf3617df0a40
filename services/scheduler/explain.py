"""Why a job waits: what binds, what that costs those who wait, and what would place it next."""

import msgspec

from services.scheduler import shadow
from services.scheduler.advice import Advice, advise
from services.scheduler.book import Claim
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.jobs import WAITING, Ask, Job, Key
from services.scheduler.nodes import HEALTHY
from services.scheduler.placement import AMOUNTS, amounts_of_free, amounts_of_shape
from services.scheduler.placement import explain as sentence
from services.scheduler.quota import NO_LIMIT
from services.scheduler.shapes import admits, capacity, room
from services.scheduler.trial import Trial, copy_of

QUOTA, NODES, SIZE, FREE, PIECES = "quota", "nodes", "size", "free", "fragmentation"
RESERVED, ORDER = "reservation", "order"


class Why(msgspec.Struct, frozen=True, kw_only=True):
    project: str
    job: str
    state: str
    queue: str
    reason: str
    position: int = 0
    """In its queue: 1 is the first; 0 where it does not wait."""
    waiting: int = 0
    """In its queue."""
    constraint: str = ""
    """What binds: `quota`; no `nodes` of its sort, or none of the `size`; too little is `free`, or
    it is in pieces (`fragmentation`); who has a `reservation`, or comes first (`order`)."""
    resource: str = ""
    """Of which there is too little, where it is one."""
    price: float = 0.0
    """Its shadow price (shadow.py)."""
    price_unit: str = ""
    advices: list[Advice] = []
    """The cheapest first."""


class Bound(msgspec.Struct, frozen=True):
    constraint: str
    reason: str
    resource: str = ""


class Asked(msgspec.Struct, frozen=True):
    """What is read of the scheduler for `why`, which takes longer than its writer may wait."""

    state: bytes
    key: Key
    position: int
    waiting: int


def asked(scheduler: Scheduler, key: Key) -> Asked:
    """About a job that waits."""
    return Asked(copy_of(scheduler, key), key, *place_in_queue(scheduler, scheduler.jobs[key]))


def why(about: Asked, now: float) -> Why:
    state, key = about.state, about.key
    scheduler = restore(msgspec.msgpack.decode(state, type=State))
    scheduler.now = now
    job = scheduler.jobs[key]
    assert job.state == WAITING, job.state
    bound = bound_of(scheduler, job)
    price, unit = price_of(scheduler, job, bound)
    reason = f"{bound.reason}; before: {job.reason}" if job.reason else bound.reason
    return Why(
        project=key[0],
        job=key[1],
        state=job.state,
        queue=job.request.queue,
        reason=reason,
        position=about.position,
        waiting=about.waiting,
        constraint=bound.constraint,
        resource=bound.resource,
        price=price,
        price_unit=unit,
        advices=advise(Trial(state, key, now)),
    )


def unbound(job: Job) -> Why:
    """Of a job that does not wait."""
    return Why(
        project=job.key[0],
        job=job.key[1],
        state=job.state,
        queue=job.request.queue,
        reason=job.reason,
    )


def place_in_queue(scheduler: Scheduler, job: Job) -> tuple[int, int]:
    """(1 for the first, how many wait)"""
    lines = scheduler.lines.by_queue[job.request.queue].values()
    share = scheduler.order(job)[0]
    mine = scheduler.lines.of[job.request.queue, job.ask].places[job.key]
    before = 0
    for line in lines:
        other = scheduler.order(line.head)[0]
        if other < share:
            before += len(line.places)
        elif other == share:
            before += sum(place < mine for place in line.places.values())
    return before + 1, sum(len(line.places) for line in lines)


def bound_of(scheduler: Scheduler, job: Job) -> Bound:
    lacks = scheduler.lacks_quota(job)
    if lacks:
        return Bound(QUOTA, f"{lacks}{lent(scheduler, job)}", scarce(scheduler, job))
    for claim in scheduler.claims(job):
        if scheduler.quota.allows(job.request.queue, claim.amounts) and fits(scheduler, claim):
            return in_front(scheduler, job)
    return no_room(scheduler, job.ask)


def fits(scheduler: Scheduler, claim: Claim) -> bool:
    return scheduler.spots_for(claim.ask) is not None


def scarce(scheduler: Scheduler, job: Job) -> str:
    """The first resource that its queue may not have so much of."""
    for claim in scheduler.claims(job):
        for name, amount in claim.amounts.items():
            if amount > scheduler.quota.room(job.request.queue, name):
                return name
    return ""


def lent(scheduler: Scheduler, job: Job) -> str:
    """Why it may not have more: nominal, borrowing limit, or what the cohort has left."""
    queue, name = job.request.queue, scarce(scheduler, job)
    spec = scheduler.specs.get(queue)
    if spec is None or name not in spec.nominal:
        return ""
    has, own = scheduler.quota.has(queue, name), spec.nominal[name]
    if not spec.cohort:
        return f" (nominal {own}, used {has}, no cohort)"
    limit = spec.borrowing_limit.get(name, NO_LIMIT)
    if limit < NO_LIMIT and own + limit - has <= scheduler.quota.room(queue, name):
        return f" (nominal {own}, borrowing limit {limit}, used {has})"
    return f" (nominal {own}, used {has}; cohort {spec.cohort!r} lends no more)"


def in_front(scheduler: Scheduler, job: Job) -> Bound:
    """There is room and quota, and somebody before it."""
    reservation = scheduler.reservation
    if reservation is not None and scheduler.gives_way(job):
        nodes = ", ".join(reservation.nodes)
        left = max(0.0, reservation.at - scheduler.now)
        return Bound(RESERVED, f"{'/'.join(reservation.job)} has {nodes} reserved, in {left:.0f} s")
    head = scheduler.lines.of[job.request.queue, job.ask].head
    return Bound(ORDER, f"{'/'.join(head.key)} comes first")


def no_room(scheduler: Scheduler, ask: Ask) -> Bound:
    reason = sentence(list(scheduler.nodes.values()), scheduler.pool, ask)
    able = [
        name
        for name, node in scheduler.nodes.items()
        if node.state == HEALTHY and admits(scheduler.machines[name], ask.shape)
    ]
    if not able:
        return Bound(NODES, reason)
    whole = [room(capacity(scheduler.machines[name]), ask.shape) for name in able]
    if (max(whole) if ask.one_node else sum(whole)) < ask.workers:
        return Bound(SIZE, reason)
    free = dict.fromkeys(AMOUNTS, 0)
    for node in able:
        for name, amount in amounts_of_free(scheduler.pool.free(node)).items():
            free[name] += amount
    for name, amount in amounts_of_shape(ask).items():
        if ask.workers * amount > free[name]:
            return Bound(FREE, reason, name)
    return Bound(PIECES, reason)


def price_of(scheduler: Scheduler, job: Job, bound: Bound) -> tuple[float, str]:
    prices = shadow.prices(scheduler, job.request.queue, job.ask)
    placed = f"placed {prices.unit} of those who wait"
    if bound.constraint == QUOTA and bound.resource:
        return prices.quota.get(bound.resource, 0.0), f"{placed} per unit of {bound.resource}"
    if bound.constraint == FREE and prices.nodes.get(bound.resource):
        return prices.nodes[bound.resource], f"{placed} per unit of {bound.resource}"
    if bound.constraint in (FREE, PIECES):
        return prices.place, f"{placed} per place for a gang like this"
    return 0.0, placed
