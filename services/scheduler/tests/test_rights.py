"""Who goes for whom in a cohort by attained service: by what each queue owes, as the ledger counts
it. On walks of hours and of weeks, past a queue that asks for little, with a node for each job and
with gangs; and the ledger is seen to object.
"""

import random
from typing import Any

import msgspec
import pytest

from libs.contracts.events import AttemptPlaced, AttemptStopped, JobRequested, Resources, Share
from services.scheduler.stimuli import JobSubmitted, QueueApplied, QueueSpec, Tick
from services.scheduler.tests.world import World

HOUR_S = 3_600
QUEUES = ("left", "right", "third")
STEPS = 250
SLOW_S = [10, 600, HOUR_S, 6 * HOUR_S]


def world_of(chance: random.Random, nodes: int, gpus: int) -> World:
    world = World()
    for number in range(nodes):
        world.beat(f"n{number}", Resources(64, 64, 1000, gpus), "A")
    for queue in QUEUES:
        words: dict[str, Any] = {
            "nominal": {"gpu_milli": chance.choice([1000, 2000, 3000])},
            "within_queue": chance.choice(["never", "lower"]),
            "reclaim": chance.choice(["lower", "any", "any"]),
            "grace_s": chance.choice([0, 0, 600]),
        }
        world.tell(QueueApplied(QueueSpec(queue=queue, cohort="all", order="attained", **words)))
    return world


def request(job: str, queue: str, gpus: int = 1, **fields: Any) -> JobRequested:
    resources = Resources(1, 1, 1000, gpus)
    asked = {"project": "p", "job": job, "kind": "train", "queue": queue, **fields}
    return JobRequested(resources=resources, **asked)


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_on_a_walk_the_ledger_agrees_with_who_goes(seed: int, gpus: int) -> None:
    chance = random.Random(seed)
    world = world_of(chance, 8 // gpus, gpus)
    for number in range(STEPS):
        walk(world, chance, number, gpus, quick=seed % 2 == 0)
        start(world)
        if number % 10 == 0:
            world.check()
    evicted = {(one.project, one.job) for one in stops(world) if "preempted for" in one.reason}
    assert len(evicted) > 2
    world.crash(keeps=False)


def walk(world: World, chance: random.Random, number: int, gpus: int, quick: bool) -> None:
    live = list(world.ledger.live.values())
    match chance.choices(range(4), [10, 6, 5, 1])[0]:
        case 0:
            one = request(
                f"j{number}",
                chance.choices(QUEUES, [1, 4, 4])[0],
                chance.choice([1, 1, 2, 4]) if gpus > 1 else 1,
                priority=chance.choice([1, 1, 1, 2]),
                preemptible=chance.random() < 0.95,
            )
            world.tell(JobSubmitted(one))
        case 1 if live:
            for share in chance.choice(live).shares.values():
                world.answer(share, "succeeds")
        case 2:
            world.tell(Tick(look=True), chance.choice([10, 100, 600] if quick else SLOW_S))
        case _:
            world.recover(f"n{chance.randrange(8 // gpus)}")


def start(world: World) -> None:
    for attempt in list(world.ledger.live.values()):
        for node, share in attempt.shares.items():
            if node not in attempt.started:
                world.answer(share, "starts")


def stops(world: World) -> list[AttemptStopped]:
    return [one for *_, said in world.log for one in said if isinstance(one, AttemptStopped)]


def test_of_a_queue_that_owes_nothing_no_more_goes_than_it_has_borrowed() -> None:
    """One GPU is borrowed, and two are asked for."""
    world = World()
    world.beat("n0", Resources(64, 64, 1000, 2), "A")
    for queue, own in (("left", 1000), ("third", 2000)):
        spec = QueueSpec(queue=queue, cohort="all", order="attained", nominal={"gpu_milli": own})
        world.tell(QueueApplied(msgspec.structs.replace(spec, reclaim="any")))
    for number in range(2):
        world.tell(JobSubmitted(request(f"left-{number}", "left")))
    start(world)
    assert world.tell(JobSubmitted(request("own", "third", 2))) == []
    world.tell(JobSubmitted(request("one", "third")))
    assert sorted(job for _, job in world.ledger.live) in (["left-0", "one"], ["left-1", "one"])


# --- what the ledger objects to


def lending() -> World:
    """Four nodes of a GPU. `left` has borrowed one for 12 h, `right` for 2 h: both owe, left more.
    `third` has what is its own, 2 GPUs, free to ask for.
    """
    world = World()
    for number in range(4):
        world.beat(f"n{number}", Resources(64, 64, 1000, 1), "A")
    for queue, own in (("left", 1000), ("right", 1000), ("third", 2000)):
        spec = QueueSpec(queue=queue, cohort="all", order="attained", nominal={"gpu_milli": own})
        world.tell(QueueApplied(msgspec.structs.replace(spec, reclaim="any")))
    for queue, hours in (("left", 10), ("right", 2)):
        for number in range(2):
            world.tell(JobSubmitted(request(f"{queue}-{number}", queue)))
        start(world)
        world.tell(Tick(look=True), hours * HOUR_S)
    return world


def instead_of(world: World, victim: str, head: JobRequested) -> None:
    """The ledger hears that the head is placed where the victim was."""
    attempt = world.ledger.live["p", victim]
    (gone,) = attempt.shares.values()
    stopped = AttemptStopped(
        project="p",
        job=victim,
        attempt=gone.attempt,
        token=gone.token,
        node=gone.node,
        reason=f"preempted for p/{head.job}",
    )
    placed = AttemptPlaced(
        project="p",
        job=head.job,
        attempt=1,
        token=world.ledger.token + 1,
        node=gone.node,
        kind="train",
        workers=1,
        gpus=gone.gpus,
        gang=[Share(gone.node, 1)],
        resources=head.resources,
    )
    world.ledger.enter(JobSubmitted(head), [stopped, placed], world.now)


def test_who_owes_most_goes_first() -> None:
    for victim in ("left-0", "left-1"):
        instead_of(lending(), victim, request("own", "third"))
    with pytest.raises(AssertionError, match="of who owes more stays"):
        instead_of(lending(), "right-1", request("own", "third"))


def test_nobody_goes_for_who_is_no_less_served_and_asks_for_more_than_its_own() -> None:
    world = lending()
    for number in range(2):
        world.tell(JobSubmitted(request(f"own-{number}", "third")))
    with pytest.raises(AssertionError, match="has sunk no deeper"):
        instead_of(world, "right-1", request("more", "third", priority=1))


def test_what_a_queue_that_owes_nothing_has_of_its_own_stays() -> None:
    world = lending()
    world.tell(JobSubmitted(request("own", "third")))
    start(world)
    world.tell(Tick(look=True), 2 * HOUR_S)
    with pytest.raises(AssertionError, match="was its queue's own"):
        instead_of(world, "own", request("new", "left"))
