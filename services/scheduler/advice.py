"""The cheapest changes that would place a waiting job next, each tried on a copy of the scheduler.

A change is proposed from what the job lacks (how much quota, whose room), and then happens to a
copy: by the same stimuli, through the same decisions. Where others take what was freed, the next
proposal is made in that world, until the job is placed. What was proposed too much is taken away
again, one by one, each time on a fresh copy: so k would place it and k - 1 would not.
"""

from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from services.scheduler import preempt
from services.scheduler.book import Claim
from services.scheduler.changes import (
    END,
    HEAL,
    NODE,
    PRIORITY,
    QUOTA,
    Change,
    raised,
    spoken,
)
from services.scheduler.domain import Scheduler
from services.scheduler.jobs import LIVE, PRIORITY_MAX, WAITING, Ask, Job
from services.scheduler.nodes import HEALTHY
from services.scheduler.quota import FLAVOR, Quota
from services.scheduler.shapes import GPU_MILLI, GPUS_MAX, Machine, admits, room
from services.scheduler.trial import Trial, World

STRATEGIES = (
    (QUOTA,),
    (HEAL,),
    (QUOTA, HEAL),
    (PRIORITY,),
    (END,),
    (QUOTA, END),
    (PRIORITY, END),
    (QUOTA, NODE),
)
"""What each advice may consist of."""
OWN = "own"
"""Proposes quota, too: so much that the job borrows nothing, and so stands before who does."""
LAST_RESORTS = ((PRIORITY, OWN, END), (PRIORITY, OWN, NODE))
"""Where so many come first that none of the others places it."""
ROUNDS_MAX = 12
ADDED = "added-"
"""How the nodes are called that would have to be added."""


class Advice(msgspec.Struct, frozen=True):
    changes: list[Change]
    cost: tuple[int, ...] = ()
    """Compared from the left: nodes added, jobs that run and would end (by the advice or evicted),
    of these GPU seconds and seconds lost, all jobs that would end, changes."""
    says: str = ""


# --- proposals: what the job lacks in a world


def propose_quota(world: World) -> list[Change]:
    """The smallest raise of each resource that some claim lacks; of the claim that then has room,
    else that lacks the least."""
    book, job = world.scheduler, world.job
    queue = job.request.queue
    found: list[tuple[bool, int, list[Change]]] = []
    for claim in book.claims(job):
        changes = [
            Change(kind=QUOTA, queue=queue, resource=name, by=smallest_raise(book, queue, name, n))
            for name, n in claim.amounts.items()
            if n > book.quota.room(queue, name)
        ]
        if changes:
            no_room = book.spots_for(claim.ask) is None
            found.append((no_room, sum(one.by for one in changes), changes))
    return min(found, key=lambda one: one[:2], default=(True, 0, []))[2]


def propose_own(world: World) -> list[Change]:
    """Of the first claim."""
    book, job = world.scheduler, world.job
    queue = job.request.queue
    spec, claim = book.specs.get(queue), next(book.claims(job), None)
    if spec is None or claim is None:
        return []
    lacks = {
        name: book.quota.has(queue, name) + amount - spec.nominal[name]
        for name, amount in claim.amounts.items()
        if name in spec.nominal
    }
    return [
        Change(kind=QUOTA, queue=queue, resource=name, by=by)
        for name, by in lacks.items()
        if by > 0
    ]


def smallest_raise(book: Scheduler, queue: str, name: str, amount: int) -> int:
    """Of a queue's own so that it may take the amount. It may take more the more it has."""

    def enough(by: int) -> bool:
        tried = Quota()
        specs = book.specs | {queue: raised(book.specs[queue], name, by)}
        tried.apply(specs.values())
        tried.used = book.quota.used
        return tried.room(queue, name) >= amount

    high = 1
    while not enough(high):
        high *= 2
    return lowest(1, high, enough)


def lowest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """A number that is enough while the one before it, from `low` on, is not; `high` is enough,
    and most often the answer.
    """
    if low < high and not enough(high - 1):
        return high
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return high


def propose_heal(world: World) -> list[Change]:
    """The first node that is not Healthy and has room for the whole gang."""
    book, ask = world.scheduler, world.job.ask
    for name, node in book.nodes.items():
        able = node.state != HEALTHY and admits(book.machines[name], ask.shape)
        if able and room(book.pool.free(name), ask.shape) >= ask.workers:
            return [Change(kind=HEAL, node=name)]
    return []


def propose_end(world: World) -> list[Change]:
    """A minimal set of what is placed, so that there is room and quota; those that lose least.

    Where that is nobody, who has a reservation is in front.
    """
    book, job = world.scheduler, world.job
    order = sorted(
        (one for one in book.jobs.values() if one.placement is not None and not serves(book, one)),
        key=lambda one: (one.live.rank, -one.live.token),
    )
    sets = [
        found for claim in book.claims(job) if (found := minimal(book, claim, order)) is not None
    ]
    if not sets:
        return []
    best = min(sets, key=lambda found: (len(found), *loss_of(book, found)))
    keys = tuple(one.key for one in best)
    if not keys and book.reservation is not None and book.reservation.job != job.key:
        keys = (book.reservation.job,)
    return [Change(kind=END, jobs=keys)] if keys else []


def minimal(book: Scheduler, claim: Claim, order: list[Job]) -> list[Job] | None:
    if preempt.spots_without(book, claim, []) is not None:
        return []
    if not order or preempt.spots_without(book, claim, order) is None:
        return None
    head = preempt.Head(book, claim)
    return preempt.on_one_node(head, order, list) or preempt.anywhere(book, claim, order)


def serves(book: Scheduler, job: Job) -> bool:
    """A replica that ended would be asked for again at once."""
    return any(job.request.job in one.jobs for one in book.deployments.values())


def loss_of(book: Scheduler, jobs: Sequence[Job]) -> tuple[int, int]:
    """What they did in this attempt: GPU seconds, seconds."""
    placed = [job for job in jobs if job.placement is not None]
    gpu_s = sum(job.attained(book.now) - job.attained_gpu_s for job in placed)
    return int(gpu_s), int(sum(book.now - job.live.placed_at for job in placed))


def propose_priority(world: World) -> list[Change]:
    """Above all that waits and runs; how much of it is needed is found out by trying."""
    if world.asked_again:
        return []
    book, job = world.scheduler, world.job
    ranks = [book.rank(one) for one in book.jobs.values() if one.state in (WAITING, *LIVE)]
    highest = min(PRIORITY_MAX, max(ranks) + 1)
    if highest <= job.request.priority:
        return []
    return [Change(kind=PRIORITY, priority=highest)]


def propose_node(world: World) -> list[Change]:
    """The smallest machine for the whole gang."""
    book, job = world.scheduler, world.job
    claims = [one for one in book.claims(job) if book.quota.allows(job.request.queue, one.amounts)]
    machine = machine_for(claims[0].ask if claims else job.ask, f"{ADDED}{len(book.nodes)}")
    if not machine.gpu_model and book.quota.flavors(job.request.queue):
        model = min(name for name in book.specs[job.request.queue].nominal if FLAVOR in name)
        machine = msgspec.structs.replace(machine, gpu_model=model.removeprefix(FLAVOR))
    return [Change(kind=NODE, machine=machine)] if machine.gpus <= GPUS_MAX else []


def machine_for(ask: Ask, name: str) -> Machine:
    shape, gpus = ask.shape, ask.workers * ask.shape.gpus
    if shape.gpus == 1 and shape.gpu_milli:
        gpus = -(-ask.workers // (GPU_MILLI // shape.gpu_milli))
    return Machine(
        node=name,
        cpu_milli=ask.workers * shape.cpu_milli,
        memory_mib=ask.workers * shape.memory_mib,
        gpus=gpus,
        gpu_model=shape.gpu_models[0] if shape.gpu_models else "",
        kinds=(shape.kind,) if shape.kind else (),
        labels=shape.labels,
    )


PROPOSALS: dict[str, Callable[[World], list[Change]]] = {
    QUOTA: propose_quota,
    OWN: propose_own,
    HEAL: propose_heal,
    PRIORITY: propose_priority,
    END: propose_end,
    NODE: propose_node,
}


# --- the search


def advise(trial: Trial) -> list[Advice]:
    """The cheapest first; [] where no change of these would place it, or none was found in time."""
    found: dict[tuple[Change, ...], Advice] = {}
    for strategy in (*STRATEGIES, *LAST_RESORTS):
        if trial.is_spent or (found and strategy in LAST_RESORTS):
            break
        if not {PRIORITY, HEAL} & {*strategy} and too_far_back(trial.after([])):
            continue
        changes = search(trial, strategy)
        if changes:
            while (less := smallest(trial, changes)) != changes:
                changes = less
            found.setdefault(tuple(changes), priced(trial, changes))
    return sorted(found.values(), key=lambda one: one.cost)


def too_far_back(world: World) -> bool:
    """Of its line one is placed a round, and more than that are before it."""
    line = world.scheduler.lines.of[world.job.request.queue, world.job.ask]
    mine = line.places[world.key]
    return sum(place < mine for place in line.places.values()) >= ROUNDS_MAX


def search(trial: Trial, strategy: Sequence[str]) -> list[Change]:
    """Changes that place it, or [] after `ROUNDS_MAX` of them."""
    changes: list[Change] = []
    for _ in range(ROUNDS_MAX):
        if trial.is_spent:
            break
        world = trial.after(changes)
        if world.is_placed():
            return changes
        more = next((more for kind in strategy if (more := PROPOSALS[kind](world))), [])
        if not more:
            return []
        changes += more
    return []


def smallest(trial: Trial, changes: list[Change]) -> list[Change]:
    """Without what is not needed, and of what is needed as little as will do."""
    at = 0
    while at < len(changes):
        rest = changes[:at] + changes[at + 1 :]
        if rest and trial.places(rest):
            changes = rest
            continue
        before, after = changes[:at], changes[at + 1 :]
        places = partial(places_with, trial, before, after)
        less = LESS[changes[at].kind](changes[at], places, trial)
        changes = [*before, less, *after]
        at += 1
    return changes


Places = Callable[[Change], bool]


def places_with(trial: Trial, before: list[Change], after: list[Change], one: Change) -> bool:
    return trial.places([*before, one, *after])


def same(change: Change, places: Places, trial: Trial) -> Change:
    return change


def less_quota(change: Change, places: Places, trial: Trial) -> Change:
    def enough(by: int) -> bool:
        return places(msgspec.structs.replace(change, by=by))

    return msgspec.structs.replace(change, by=lowest(1, change.by, enough))


def less_priority(change: Change, places: Places, trial: Trial) -> Change:
    def enough(priority: int) -> bool:
        return places(msgspec.structs.replace(change, priority=priority))

    low = trial.after([]).job.request.priority + 1
    return msgspec.structs.replace(change, priority=lowest(low, change.priority, enough))


def fewer_jobs(change: Change, places: Places, trial: Trial) -> Change:
    for key in reversed(change.jobs):
        rest = tuple(one for one in change.jobs if one != key)
        fewer = msgspec.structs.replace(change, jobs=rest)
        if rest and places(fewer):
            change = fewer
    return change


def smaller_node(change: Change, places: Places, trial: Trial) -> Change:
    """With fewer GPUs."""
    machine = change.machine
    assert machine is not None

    def with_gpus(gpus: int) -> Change:
        fewer = msgspec.structs.replace(machine, gpus=gpus)
        return msgspec.structs.replace(change, machine=fewer)

    return with_gpus(lowest(0, machine.gpus, lambda gpus: places(with_gpus(gpus))))


LESS: dict[str, Callable[[Change, Places, Trial], Change]] = {
    QUOTA: less_quota,
    PRIORITY: less_priority,
    END: fewer_jobs,
    HEAL: same,
    NODE: smaller_node,
}


def priced(trial: Trial, changes: list[Change]) -> Advice:
    before, after = trial.after([]).scheduler, trial.after(changes).scheduler
    named = {key for change in changes for key in change.jobs}
    ended = set(named)
    for key, job in before.jobs.items():
        kept = after.jobs[key]
        if job.state in LIVE and (kept.state, kept.attempt) != (job.state, job.attempt):
            ended.add(key)
    jobs = [before.jobs[key] for key in sorted(ended) if key in before.jobs]
    running = [job for job in jobs if job.placement is not None]
    before.now = trial.now
    nodes = sum(change.kind == NODE for change in changes)
    cost = (nodes, len(running), *loss_of(before, running), len(jobs), len(changes))
    return Advice(changes, cost, "; ".join(spoken(before, one, ended - named) for one in changes))
