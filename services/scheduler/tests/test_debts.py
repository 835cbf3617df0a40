"""Who neither borrows nor owes keeps its own and gets it at once; who owes gives back first."""

import random
from typing import Any

import msgspec
import pytest

from libs.contracts.events import AttemptStarted, AttemptSucceeded
from services.scheduler import debts
from services.scheduler.debts import FINE, HALF_LIFE_SAMPLES, SAMPLE_S
from services.scheduler.domain import State, restore
from services.scheduler.stimuli import QueueApplied, QueueSpec
from services.scheduler.tests.test_queues import Cluster
from services.scheduler.tests.world import World
from services.scheduler.views import queue_of

HOUR_S = 3_600
OWN = {"modest": 4, "greedy": 2, "idle": 2}


def cohort(*gpus: int, **fields: Any) -> Cluster:
    cluster = Cluster(*gpus)
    for queue, own in OWN.items():
        words = {"cohort": "c", "order": "attained", "reclaim": "any"} | fields
        cluster.queue(queue, own, **words)
    return cluster


def run(cluster: Cluster, job: str, queue: str, gpus: int = 1) -> str:
    """Submits it, and starts it if it is placed."""
    state = cluster.submit(job, queue, gpus)
    if state == "placed":
        cluster.answer(AttemptStarted, job)
    return state


def owes(cluster: Cluster, queue: str) -> float:
    """GPUs."""
    scheduler = cluster.scheduler
    owed = scheduler.debts.owed_by(queue, cluster.now, scheduler.lines)
    return owed.get("gpu_milli", 0) / FINE / 1000


@pytest.mark.parametrize("seed", range(20))
def test_who_asks_for_no_more_than_its_own_never_waits_and_is_never_evicted(seed: int) -> None:
    """While another takes all there is, by jobs of every level."""
    chance = random.Random(seed)
    cluster = cohort(*[1] * 8)
    asked: list[str] = []
    for number in range(120):
        cluster.now += chance.choice([1, 10, 100, 1000])
        queue = chance.choice(["modest", "greedy", "greedy"])
        mine = [job for job in asked if cluster.state(job) == "running"]
        if queue == "modest" and len(mine) == OWN["modest"]:
            cluster.answer(AttemptSucceeded, chance.choice(mine))
            continue
        run(cluster, f"{queue}-{number}", queue)
        if queue == "modest":
            asked.append(f"modest-{number}")
            assert cluster.state(asked[-1]) == "running"
        ends = [j.key[1] for j in cluster.scheduler.running_of("greedy") if j.state == "running"]
        if ends and chance.random() < 0.3:
            cluster.answer(AttemptSucceeded, chance.choice(ends))
        start_all(cluster)
        assert all(cluster.scheduler.jobs["p", job].attempt == 1 for job in asked)
    assert any(job.preempted for job in cluster.scheduler.jobs.values())


def start_all(cluster: Cluster) -> None:
    cluster.look()
    for job in list(cluster.scheduler.jobs.values()):
        if job.state == "placed":
            cluster.answer(AttemptStarted, job.key[1])


def test_at_an_equal_level_only_what_is_its_own_is_asked_back() -> None:
    cluster = cohort(*[1] * 8)
    for number in range(8):
        assert run(cluster, f"g{number}", "greedy") == "placed"
    states = [run(cluster, f"m{number}", "modest") for number in range(6)]
    assert states == ["placed"] * 4 + ["waiting"] * 2
    assert len(cluster.scheduler.running_of("greedy")) == 4


def test_who_wants_no_more_than_its_own_has_nobody_of_its_own_evicted() -> None:
    """Though its own is the largest of those that sank, and quota is left in the pot."""
    cluster = cohort(*[2] * 4)
    cluster.queue("spare", 8, cohort="c", order="attained", reclaim="any")
    for number in range(6):
        assert run(cluster, f"g{number}", "greedy") == "placed"
    assert run(cluster, "large", "modest", 2) == "placed"
    cluster.look(2 * HOUR_S)
    for number in range(2):
        assert run(cluster, f"m{number}", "modest") == "placed"
    assert cluster.state("large") == "running"
    assert run(cluster, "m2", "modest") == "placed"
    assert cluster.state("large") == "waiting", "it wants more than that"


def borrowed(cluster: Cluster, queue: str, hours: int) -> None:
    """Everything, for so long."""
    for number in range(8):
        assert run(cluster, f"{queue}-{number}", queue) == "placed"
    cluster.look(hours * HOUR_S)
    for number in range(8):
        cluster.answer(AttemptSucceeded, f"{queue}-{number}")


def test_who_borrowed_asks_nothing_back_before_it_has_given_back() -> None:
    cluster = cohort(*[1] * 8)
    borrowed(cluster, "modest", 12)
    assert owes(cluster, "modest") == pytest.approx(4 * (1 - 0.5**0.5), abs=0.02)
    for number in range(8):
        assert run(cluster, f"g{number}", "greedy") == "placed"
    assert run(cluster, "m", "modest") == "waiting"
    cluster.look(30 * 60)
    assert cluster.state("m") == "waiting", "all are of the first level"
    cluster.look(31 * 60)
    assert cluster.state("m") == "placed", "those who run have sunk"


def test_what_it_has_is_kept_by_who_owes_nothing_and_not_by_who_owes() -> None:
    """Of two that have sunk the newer would go."""
    cluster = cohort(*[1] * 6)
    assert run(cluster, "own", "modest") == "placed"
    borrowed_by = [f"g{number}" for number in range(5)]
    assert [run(cluster, job, "greedy") for job in borrowed_by] == ["placed"] * 5
    cluster.look(10 * HOUR_S)
    for job in borrowed_by[:3]:
        cluster.answer(AttemptSucceeded, job)
        assert run(cluster, f"i-{job}", "idle") == "placed"
    assert len(cluster.scheduler.running_of("greedy")) == OWN["greedy"], "it borrows no more"
    assert [run(cluster, f"n{number}", "idle") for number in range(3)] == [
        "placed",
        "placed",
        "waiting",
    ]
    assert cluster.state("own") == "running"
    assert not cluster.scheduler.running_of("greedy")


def test_of_equals_who_owes_the_most_gives_way_not_the_newest() -> None:
    """All have sunk; the idle queue owes less, for it has borrowed for an hour only."""
    cluster = cohort(*[1] * 8)
    for number in range(4):
        assert run(cluster, f"g{number}", "greedy") == "placed"
    cluster.look(10 * HOUR_S)
    for number in range(4):
        assert run(cluster, f"i{number}", "idle") == "placed"
    cluster.look(2 * HOUR_S)
    assert owes(cluster, "greedy") > owes(cluster, "idle") > 0.1
    for number in range(2):
        assert run(cluster, f"m{number}", "modest") == "placed"
        assert len(cluster.scheduler.running_of("greedy")) == 3 - number
    assert len(cluster.scheduler.running_of("idle")) == 4


def test_the_fewest_go_where_everything_is_lent() -> None:
    """One of 2 GPUs, not two of 1 that are newer."""
    cluster = cohort(*[2] * 4)
    assert run(cluster, "large", "greedy", 2) == "placed"
    for number in range(6):
        assert run(cluster, f"g{number}", "greedy") == "placed"
    assert run(cluster, "m", "modest", 2) == "placed"
    assert cluster.state("large") == "waiting"
    assert len(cluster.scheduler.running_of("greedy")) == 6


def test_what_was_borrowed_is_given_back_wherever_it_makes_room() -> None:
    """The newest that greedy runs shares its node with what stays."""
    cluster = cohort(2, 2)
    assert run(cluster, "large", "greedy", 2) == "placed"
    assert run(cluster, "own", "modest") == "placed"
    assert run(cluster, "small", "greedy") == "placed"
    assert run(cluster, "m", "modest", 2) == "placed"
    assert cluster.state("large") == "waiting"
    assert cluster.state("small") == "running"


def test_what_was_denied_is_owed() -> None:
    """It lacked 2 of its own for a day, for who held them cannot be evicted."""
    cluster = cohort(*[1] * 4)
    for number in range(4):
        assert cluster.submit(f"g{number}", "greedy", preemptible=False) == "placed"
    for number in range(2):
        assert run(cluster, f"m{number}", "modest") == "waiting"
    cluster.look(24 * HOUR_S)
    assert owes(cluster, "modest") == pytest.approx(-1, abs=0.01)
    assert owes(cluster, "greedy") == pytest.approx(1, abs=0.01)
    assert owes(cluster, "idle") == 0


def test_a_debt_halves_in_a_day_and_tends_to_what_it_is_sampled_from() -> None:
    for before, amount, after in [(1000, 0, 500), (0, 1000, 500), (-1000, 0, -500)]:
        found = debts.mean(before * FINE, amount * FINE, HALF_LIFE_SAMPLES)
        assert found / FINE == pytest.approx(after, abs=0.5)


def test_queues_tell_what_is_owed_as_of_now() -> None:
    cluster = cohort(*[1] * 8)
    borrowed(cluster, "greedy", 6)
    day_s = HALF_LIFE_SAMPLES * SAMPLE_S
    told = [queue_of(cluster.scheduler, "greedy", cluster.now + s) for s in (0, day_s)]
    owed = [one.quotas[0].owes for one in told]
    assert owed[0] == pytest.approx(6000 * (1 - 0.5**0.25), abs=20)
    assert owed == pytest.approx([1000 * owes(cluster, "greedy"), owed[0] / 2], abs=1)


def test_of_a_cohort_where_the_moment_decides_nothing_is_told() -> None:
    cluster = cohort(*[1] * 8, order="priority")
    borrowed(cluster, "greedy", 6)
    assert owes(cluster, "greedy") > 0
    assert queue_of(cluster.scheduler, "greedy", cluster.now).quotas[0].owes == 0


def test_debts_outlive_a_restart() -> None:
    cluster = cohort(*[1] * 8)
    borrowed(cluster, "greedy", 6)
    frozen = msgspec.json.encode(cluster.scheduler.snapshot())
    again = restore(msgspec.json.decode(frozen, type=State))
    assert again.debts.accounts == cluster.scheduler.debts.accounts
    assert again.debts.accounts["greedy"].owes["gpu_milli"] > 0
    assert msgspec.json.encode(again.snapshot()) == frozen


def test_a_queue_that_leaves_its_cohort_leaves_its_debts() -> None:
    cluster = cohort(*[1] * 8)
    borrowed(cluster, "greedy", 6)
    cluster.queue("greedy", 2, order="attained")
    assert owes(cluster, "greedy") == 0
    cluster.queue("idle", 3, cohort="c", order="attained", reclaim="any")
    assert set(cluster.scheduler.debts.accounts) == {"modest", "idle"}


def test_a_queue_that_is_applied_again_moves_no_account() -> None:
    world = World()
    lent = QueueSpec(queue="left", cohort="all", nominal={"cpu_milli": 0})
    world.tell(QueueApplied(lent))
    before = world.state()
    assert world.scheduler.handle(QueueApplied(lent), world.now + 10 * SAMPLE_S) == []
    world.scheduler.sequence -= 1
    assert world.state() == before
