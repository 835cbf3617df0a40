"""Shadow prices are what one more unit is worth, counted by hand."""

from libs.contracts.events import JobRequested, Resources
from services.scheduler import shadow
from services.scheduler.domain import Scheduler
from services.scheduler.stimuli import Heartbeat, JobSubmitted, QueueApplied, QueueSpec

ASKED = Resources(1000, 1, 1000)


def cluster(cpu_milli: int, quota: int, jobs: int) -> Scheduler:
    """A node of 8 GPUs; jobs of 1 GPU and 1 CPU in a queue that may have so many GPU milli."""
    scheduler = Scheduler()
    capacity = Resources(cpu_milli, 100, 1000, 8)
    scheduler.handle(Heartbeat("n", "1", ["train"], capacity), 1.0)
    spec = QueueSpec(queue="q", nominal={"gpu_milli": quota})
    scheduler.handle(QueueApplied(spec), 1.0)
    for n in range(jobs):
        asked = JobRequested(project="p", job=f"j{n}", kind="train", queue="q", resources=ASKED)
        scheduler.handle(JobSubmitted(asked), 2.0)
    return scheduler


def prices_of_last(scheduler: Scheduler) -> shadow.Prices:
    job = list(scheduler.jobs.values())[-1]
    assert job.state == "waiting"
    return shadow.prices(scheduler, "q", job.ask)


def test_a_quota_that_binds_places_a_milli_for_a_milli() -> None:
    prices = prices_of_last(cluster(cpu_milli=8000, quota=2500, jobs=5))
    assert (prices.unit, round(prices.quota["gpu_milli"], 6)) == ("gpu_milli", 1.0)
    assert (prices.place, max(prices.nodes.values())) == (0.0, 0.0), "there is room"


def test_where_room_binds_a_place_is_worth_the_gang_and_quota_nothing() -> None:
    prices = prices_of_last(cluster(cpu_milli=2500, quota=8000, jobs=5))
    assert prices.quota["gpu_milli"] == 0.0
    assert round(prices.place, 6) == 1000.0, "half a CPU is free, and no place for a gang"


def test_a_job_that_no_node_may_run_has_no_price() -> None:
    scheduler = cluster(cpu_milli=2500, quota=8000, jobs=5)
    asked = JobRequested(project="p", job="x", kind="other", queue="q", resources=ASKED)
    scheduler.handle(JobSubmitted(asked), 3.0)
    assert prices_of_last(scheduler) == shadow.Prices("gpu_milli")
