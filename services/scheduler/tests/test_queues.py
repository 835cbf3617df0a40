"""Quotas, borrowing, fair share, preemption and backfill: single decisions, and a promise kept.

Every rule has its number here; that none is ever broken in company is `test_ledger.py`'s.
"""

import random
import sys
from typing import Any

import msgspec
import pytest

from libs.contracts.events import (
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    JobRequested,
    Resources,
)
from services.scheduler import backfill, planner, planning
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.ledger import Ledger
from services.scheduler.scores import Prices
from services.scheduler.stimuli import (
    Heartbeat,
    JobSubmitted,
    Planned,
    QueueApplied,
    QueueSpec,
    Stimulus,
    Tick,
)
from services.scheduler.tests.world import check_debts

DAY_S = 86_400


class Cluster:
    """One node a name, of so many GPUs; the ledger reads along."""

    def __init__(self, *gpus: int, model: str = "A") -> None:
        self.scheduler = Scheduler()
        self.ledger = Ledger(conserving=True)
        self.now = 1000.0
        for number, count in enumerate(gpus):
            has = Resources(1000, 1000, 1000, count)
            self.tell(Heartbeat(f"n{number}", 1, ["train"], has, gpu_model=model))

    def tell(self, stimulus: Stimulus) -> list[Event]:
        said = self.scheduler.handle(stimulus, self.now)
        self.ledger.enter(stimulus, said, self.now)
        check_debts(self.scheduler, self.ledger)
        self.scheduler.validate()
        return said

    def queue(self, queue: str, gpus: int | None = None, **fields: Any) -> None:
        nominal = {} if gpus is None else {"gpu_milli": gpus * 1000}
        self.tell(QueueApplied(QueueSpec(queue=queue, **({"nominal": nominal} | fields))))

    def submit(self, job: str, queue: str = "q", gpus: int = 1, **fields: Any) -> str:
        request = JobRequested(
            project="p",
            job=job,
            kind="train",
            queue=queue,
            resources=Resources(1, 1, 1000, gpus),
            **fields,
        )
        self.tell(JobSubmitted(request))
        return self.state(job)

    def state(self, job: str) -> str:
        return self.scheduler.jobs["p", job].state

    def node_of(self, job: str) -> str:
        live = self.scheduler.jobs["p", job].live
        assert live is not None
        (part,) = live.parts
        return part.node

    def answer(self, kind: type[AttemptStarted | AttemptSucceeded], job: str) -> list[Event]:
        live = self.scheduler.jobs["p", job].live
        (part,) = live.parts
        return self.tell(
            kind(project="p", job=job, attempt=live.attempt, token=live.token, node=part.node)
        )

    def look(self, after_s: float = 0) -> list[Event]:
        self.now += after_s
        return self.tell(Tick(look=True))

    def why(self, job: str) -> str:
        return self.scheduler.why(self.scheduler.jobs["p", job])


def test_a_queue_packs_or_spreads_as_it_says_when_its_jobs_are_placed() -> None:
    cluster = Cluster(4, 4, 4)
    cluster.queue("q", placement="spread")
    for job in "abc":
        assert cluster.submit(job) == "placed"
    assert {cluster.node_of(job) for job in "abc"} == {"n0", "n1", "n2"}
    cluster.queue("q", placement="pack")
    for job in "def":
        assert cluster.submit(job) == "placed"
    assert len({cluster.node_of(job) for job in "def"}) == 1


def test_a_quota_holds_back_what_has_room_and_says_so() -> None:
    cluster = Cluster(8)
    cluster.queue("q", 3)
    assert cluster.submit("two", gpus=2) == "placed"
    assert cluster.submit("more", gpus=2) == "waiting"
    assert cluster.why("more") == "needs 2000 gpu_milli; queue 'q' may have 1000 more"
    assert cluster.submit("one") == "placed"
    assert cluster.submit("other", "other", 4) == "placed"
    cluster.answer(AttemptSucceeded, "two")
    assert cluster.state("more") == "placed"


def test_a_cohort_lends_up_to_both_limits() -> None:
    cluster = Cluster(8, 8)
    cluster.queue("rich", 8, cohort="c", lending_limit={"gpu_milli": 5000})
    cluster.queue("poor", 2, cohort="c", borrowing_limit={"gpu_milli": 4000})
    cluster.queue("free", 0, cohort="c")
    assert cluster.submit("a", "poor", 6) == "placed"
    assert cluster.submit("b", "poor", 1) == "waiting", "it has borrowed 4"
    assert cluster.submit("c", "free", 1) == "placed", "the fifth that is lent"
    assert cluster.submit("d", "free", 1) == "waiting", "3 are kept"
    assert cluster.submit("e", "rich", 3) == "placed"
    assert cluster.submit("f", "rich", 1) == "waiting", "what it lent is out"


def test_gpus_of_a_model_have_a_quota_of_their_own() -> None:
    cluster = Cluster(4)
    has = Resources(1000, 1000, 1000, 4)
    cluster.tell(Heartbeat("b", 1, ["train"], has, gpu_model="B"))
    cluster.queue("q", nominal={"gpu_milli/A": 2000, "gpu_milli/B": 1000})
    states = [cluster.submit(f"j{number}") for number in range(4)]
    assert states == ["placed", "placed", "placed", "waiting"]
    assert cluster.submit("only", gpu_models=["B"]) == "waiting"
    assert cluster.scheduler.quota.used["q"]["gpu_milli/B"] == 1000


def test_what_is_borrowed_goes_to_the_smallest_share_for_its_weight() -> None:
    cluster = Cluster(12)
    cluster.queue("idle", 12, cohort="c")
    cluster.queue("one", 0, cohort="c", weight=1000)
    cluster.queue("two", 0, cohort="c", weight=2000)
    assert cluster.submit("all", "idle", 12) == "placed"
    for number in range(12):
        cluster.submit(f"one-{number}", "one")
        cluster.submit(f"two-{number}", "two")
    cluster.answer(AttemptSucceeded, "all")
    used = cluster.scheduler.quota.used
    assert (used["one"]["gpu_milli"], used["two"]["gpu_milli"]) == (4000, 8000)


@pytest.mark.parametrize(
    ("reclaim", "priority", "evicts"),
    [("never", 9, False), ("lower", 0, False), ("lower", 9, True), ("any", 0, True)],
)
def test_what_is_lent_is_taken_back_as_the_queue_says(
    reclaim: Any, priority: int, evicts: bool
) -> None:
    cluster = Cluster(4)
    cluster.queue("owner", 2, cohort="c", reclaim=reclaim)
    cluster.queue("guest", 2, cohort="c")
    for number in range(4):
        cluster.submit(f"g{number}", "guest", priority=1)
    assert cluster.submit("o1", "owner", priority=priority) == ("placed" if evicts else "waiting")
    cluster.submit("o2", "owner", priority=priority)
    guests = [cluster.state(f"g{number}") for number in range(4)]
    assert guests.count("waiting") == (2 if evicts else 0)
    assert cluster.submit("o3", "owner", priority=priority) == "waiting", "its own is used"


def test_reclaim_waits_for_the_grace() -> None:
    cluster = Cluster(2)
    cluster.queue("owner", 2, cohort="c", reclaim="any", grace_s=60)
    cluster.queue("guest", 0, cohort="c")
    cluster.submit("g", "guest", 2)
    assert cluster.submit("o", "owner", 2) == "waiting"
    cluster.look(59)
    assert cluster.state("o") == "waiting"
    said = cluster.look(1)
    assert [type(event) for event in said] == [AttemptStopped, AttemptPlaced]


def test_only_so_many_go_as_must_and_only_if_that_helps() -> None:
    cluster = Cluster(4, 4)
    cluster.queue("q", within_queue="lower")
    for number in range(8):
        cluster.submit(f"low{number}", priority=number % 2)
    assert cluster.submit("three", gpus=3, priority=2) == "placed"
    waits = [n for n in range(8) if cluster.state(f"low{n}") == "waiting"]
    assert len(waits) == 3
    assert cluster.submit("five", gpus=5, priority=9) == "waiting", "no node is that large"
    assert [n for n in range(8) if cluster.state(f"low{n}") == "waiting"] == waits


def test_who_is_not_preemptible_stays() -> None:
    cluster = Cluster(2)
    cluster.queue("q", within_queue="lower")
    cluster.submit("stays", preemptible=False)
    cluster.submit("goes")
    assert cluster.submit("two", gpus=2, priority=5) == "waiting"
    assert cluster.submit("one", gpus=1, priority=5) == "placed"
    assert (cluster.state("stays"), cluster.state("goes")) == ("placed", "waiting")
    assert cluster.scheduler.jobs["p", "goes"].preempted == 1


def test_waiting_raises_a_priority() -> None:
    cluster = Cluster(1)
    cluster.queue("q", within_queue="lower", aging_s=100)
    cluster.submit("high", priority=3)
    assert cluster.submit("old", priority=1) == "waiting"
    cluster.look(299)
    assert cluster.state("old") == "waiting"
    cluster.look(1)
    assert (cluster.state("old"), cluster.state("high")) == ("placed", "waiting")


def test_who_had_little_service_goes_before_who_had_much() -> None:
    cluster = Cluster(2)
    cluster.queue("q", order="attained")
    cluster.submit("long", gpus=2)
    cluster.answer(AttemptStarted, "long")
    cluster.now += 100
    assert cluster.submit("early", gpus=2) == "waiting", "both are of the first level"
    cluster.look(DAY_S)
    assert (cluster.state("early"), cluster.state("long")) == ("placed", "waiting")


def test_later_jobs_pass_if_they_are_through_in_time() -> None:
    cluster = Cluster(4)
    cluster.submit("runs", gpus=3, duration_s=100)
    assert cluster.submit("head", gpus=4) == "waiting"
    assert cluster.submit("too-long", duration_s=101) == "waiting"
    assert cluster.submit("unknown") == "waiting"
    assert cluster.submit("short", duration_s=100) == "placed"
    reservation = cluster.scheduler.reservation
    assert reservation is not None
    assert (reservation.job, reservation.at) == (("p", "head"), 1100.0)


def test_later_jobs_pass_beside_a_reservation() -> None:
    cluster = Cluster(4, 2)
    cluster.submit("runs", gpus=4, duration_s=100)
    assert cluster.submit("head", gpus=3) == "waiting"
    assert cluster.submit("elsewhere", gpus=2) == "placed"
    assert cluster.submit("nowhere", gpus=1) == "waiting"


def test_places_that_a_reservation_leaves_are_for_who_waits_for_them() -> None:
    cluster = Cluster(4)
    has = Resources(1000, 1000, 1000, 4)
    cluster.tell(Heartbeat("other", 1, ["train"], has, gpu_model="B"))
    cluster.submit("runs", gpus=2, gpu_models=["A"], duration_s=100)
    cluster.submit("long", gpus=3, gpu_models=["B"], duration_s=500)
    cluster.submit("beside", gpus=1, gpu_models=["B"], duration_s=50)
    assert cluster.submit("head", gpus=4) == "waiting"
    assert cluster.submit("kept-off", gpu_models=["A"]) == "waiting"
    reservation = cluster.scheduler.reservation
    assert reservation is not None
    assert reservation.nodes == ["n0"]
    cluster.answer(AttemptSucceeded, "long")
    assert cluster.submit("moves-it", "another", gpu_models=["A"]) == "placed"
    assert reservation.nodes == ["other"]
    assert cluster.state("kept-off") == "placed"


@pytest.mark.parametrize("seed", range(20))
def test_no_backfill_makes_the_reserved_job_later(seed: int) -> None:
    """Bounds that hold, one priority: who gets a reservation starts by its time."""
    chance = random.Random(seed)
    cluster = Cluster(4, 4, 2)
    promised: dict[tuple[str, str], float] = {}
    ends: list[tuple[float, str]] = []
    started: set[str] = set()
    for number in range(60):
        name = f"j{number}"
        cluster.submit(name, gpus=chance.choice([1, 1, 2, 4]), duration_s=chance.randint(5, 60))
        follow(cluster, promised, ends, started)
        until = cluster.now + chance.choice([0, 1, 5])
        while ends and min(ends)[0] <= until:
            end = min(ends)
            ends.remove(end)
            cluster.now = max(cluster.now, end[0])
            cluster.answer(AttemptSucceeded, end[1])
            follow(cluster, promised, ends, started)
        cluster.now = until
    assert len(promised) > 3


def follow(
    cluster: Cluster,
    promised: dict[tuple[str, str], float],
    ends: list[tuple[float, str]],
    started: set[str],
) -> None:
    """What was placed just now ends at its bound; a promise made stands."""
    for (_, name), attempt in cluster.ledger.live.items():
        if name not in started:
            started.add(name)
            duration_s = cluster.ledger.requests[attempt.key].duration_s
            ends.append((cluster.now + duration_s, name))
            assert cluster.now <= promised.get(attempt.key, cluster.now), attempt.key
    reservation = cluster.scheduler.reservation
    if reservation is not None:
        promised.setdefault(reservation.job, reservation.at)


def test_a_plan_s_prices_are_part_of_the_state() -> None:
    cluster = Cluster(4, 4)
    for number in range(20):
        cluster.submit(f"j{number}", gpus=1 + number % 2)
    scheduler = cluster.scheduler
    given = planning.wanted(scheduler)
    assert given is not None, "20 came, 16 are enough for the first plan"
    cluster.tell(Planned(planner.plan(*given).prices))
    assert planning.wanted(scheduler) is None
    frozen = msgspec.json.encode(scheduler.snapshot())
    again = restore(msgspec.json.decode(frozen, type=State))
    assert again.prices == scheduler.prices != Prices()
    assert msgspec.json.encode(again.snapshot()) == frozen
    assert again.typical == scheduler.typical
    for number in range(20):
        cluster.submit(f"more-{number}")
    assert planning.wanted(scheduler) is not None
    known = scheduler.prices
    cluster.tell(*planning.planned(planner.Plan(), scheduler))
    assert planning.wanted(scheduler) is None, "no plan is asked for again at once"
    assert scheduler.prices == known


def test_nobody_gives_more_back_than_was_lent() -> None:
    cluster = Cluster(3)
    cluster.queue("owner", 2, cohort="c", reclaim="any")
    cluster.queue("guest", 2, cohort="c")
    for number in range(3):
        cluster.submit(f"g{number}", "guest")
    assert cluster.submit("o2", "owner", 2) == "waiting", "only one of the guest's is lent"
    assert cluster.submit("o1", "owner", 1) == "placed"
    assert [cluster.state(f"g{number}") for number in range(3)].count("placed") == 2


def test_a_reservation_outlives_a_restart() -> None:
    cluster = Cluster(4)
    cluster.submit("runs", gpus=3, duration_s=100)
    cluster.submit("head", gpus=4)
    cluster.submit("unknown")
    frozen = msgspec.json.encode(cluster.scheduler.snapshot())
    again = restore(msgspec.json.decode(frozen, type=State))
    assert again.reservation == cluster.scheduler.reservation is not None


def calls_of(scheduler: Scheduler, stimulus: Stimulus) -> int:
    """Python and C functions called by one decision."""
    calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        scheduler.handle(stimulus, 1000.0)
    finally:
        sys.setprofile(None)
    return calls


def test_who_had_no_reservation_has_one_once_others_end_in_another_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after a restart: that it had none is remembered only while nothing has changed."""
    monkeypatch.setattr(backfill, "ENDS_MAX", 1)
    cluster = Cluster(2, 1)
    cluster.submit("large", gpus=2, duration_s=15)
    cluster.submit("small", duration_s=10)
    assert cluster.submit("next", gpus=2) == "waiting"
    assert cluster.scheduler.reservation is None
    cluster.now += 8
    cluster.answer(AttemptStarted, "small")
    restored = restore(cluster.scheduler.snapshot())
    for scheduler in (cluster.scheduler, restored):
        assert scheduler.reservation is not None
        assert scheduler.reservation.job == ("p", "next")


def test_what_a_stimulus_costs_does_not_grow_with_who_waits() -> None:
    cluster = Cluster(1)
    cluster.submit("runs")

    def cost(name: str) -> int:
        resources = Resources(1, 1, 1000, 1)
        request = JobRequested(project="p", job=name, kind="train", resources=resources)
        return calls_of(cluster.scheduler, JobSubmitted(request))

    few = [cost(f"few{number}") for number in range(20)]
    for number in range(2000):
        cost(f"many{number}")
    many = [cost(f"more{number}") for number in range(20)]
    assert max(many) <= max(few)
