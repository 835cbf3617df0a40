"""Small jobs move together for a gang, which costs nobody a wait; the ledger watches."""

import pytest

from libs.contracts.events import JobRequested, Resources
from services.scheduler.ledger import Ledger
from services.scheduler.levels import LEVELS_GPU_S
from services.scheduler.philly import cluster, shared_queue
from services.scheduler.simulator import Simulator, Work
from services.scheduler.stimuli import QueueApplied, QueueSpec, Stimulus


class World(Simulator):
    """Two nodes of 8 GPUs, with the ledger."""

    def __init__(self, *before: Stimulus) -> None:
        self.ledger = Ledger()
        super().__init__(cluster(2), before)

    def tell(self, stimulus: Stimulus) -> None:
        said = self.scheduler.handle(stimulus, self.now)
        self.ledger.enter(stimulus, said, self.now)
        self.scheduler.validate()
        for event in said:
            self.hear(event)


def work(
    job: str,
    gpus: int,
    at_s: float,
    duration_s: float,
    *,
    preemptible: bool = True,
    queue: str = "shared",
) -> Work:
    request = JobRequested(
        project="trace",
        job=job,
        kind="train",
        queue=queue,
        resources=Resources(cpu_milli=1, memory_mib=1, gpu_milli=1000, gpus=gpus),
        preemptible=preemptible,
    )
    return Work(at_s, request, duration_s, resume_s=7.0)


def scattered(*, preemptible: bool = True) -> list[Work]:
    """Sixteen fill both nodes, and after 100 s four of each are left."""
    return [
        work(f"small-{i:02d}", 1, 0.0, 100.0 if i % 8 < 4 else 1000.0, preemptible=preemptible)
        for i in range(16)
    ]


def test_small_jobs_make_room_and_nobody_waits() -> None:
    world = World(*shared_queue())
    courses = {
        c.work.request.job: c for c in world.run([*scattered(), work("gang", 8, 200.0, 50.0)])
    }
    assert courses["gang"].wait_s == 0
    moved = [course for course in courses.values() if course.preemptions]
    assert len(moved) == 4
    assert all(course.wait_s == 0 for course in courses.values())
    assert {course.delay_s for course in moved} == {7.0}
    gang = courses["gang"].stretches[0].nodes
    assert all(course.stretches[0].nodes == gang != course.stretches[1].nodes for course in moved)


def test_what_may_not_be_stopped_stays() -> None:
    world = World(*shared_queue())
    works = [*scattered(preemptible=False), work("gang", 8, 200.0, 50.0)]
    courses = {course.work.request.job: course for course in world.run(works)}
    assert courses["gang"].wait_s == 800.0
    assert not any(course.preemptions for course in courses.values())


def test_a_queue_by_priority_moves_nobody() -> None:
    world = World(QueueApplied(QueueSpec(queue="shared", within_queue="lower")))
    courses = {
        c.work.request.job: c for c in world.run([*scattered(), work("gang", 8, 200.0, 50.0)])
    }
    assert courses["gang"].wait_s == 800.0


def test_who_sank_makes_way_and_goes_on_where_it_was() -> None:
    """Nothing is free: the one that was served longest waits, and keeps its work."""
    long_s = LEVELS_GPU_S[0] / 8 + 100
    works = [work("long", 8, 0.0, 2 * long_s), work("other", 8, 1.0, 2 * long_s)]
    world = World(*shared_queue())
    courses = {c.work.request.job: c for c in world.run([*works, work("new", 8, long_s, 60.0)])}
    assert courses["new"].wait_s == 0
    assert courses["other"].preemptions == 1
    assert courses["other"].wait_s == 60.0
    assert courses["other"].delay_s == 60.0 + 7.0


@pytest.mark.parametrize(("nominal", "waits_s"), [(0, 0.0), (16_000, 549.0)])
def test_what_is_borrowed_goes_from_level_to_level(nominal: int, waits_s: float) -> None:
    """And what a queue has of its own stays, however far its jobs have sunk."""
    shares = {"old": nominal, "new": 0, "idle": 16_000 - nominal}
    specs = [
        QueueSpec(
            queue=queue,
            cohort="all",
            nominal={"gpu_milli": milli},
            order="attained",
            reclaim="any",
        )
        for queue, milli in shares.items()
    ]
    world = World(*(QueueApplied(spec) for spec in specs))
    long_s = 2 * (LEVELS_GPU_S[0] / 8 + 100)
    works = [work(f"long-{i}", 8, 1.0, long_s, queue="old") for i in range(2)]
    short = work("short", 8, 552.0, 60.0, queue="new")
    courses = {course.work.request.job: course for course in world.run([*works, short])}
    assert courses["short"].wait_s == waits_s
