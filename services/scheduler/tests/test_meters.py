"""What the scheduler tells of its nodes and jobs, in numbers."""

from prometheus_client import REGISTRY

from libs.contracts.events import Resources
from services.scheduler import meters
from services.scheduler.domain import Scheduler
from services.scheduler.tests.test_domain import beat, request


def told(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"leptonic_scheduler_{name}", labels)


def test_nodes_jobs_and_waits_are_told_and_forgotten() -> None:
    scheduler = Scheduler()
    scheduler.handle(beat(), 100.0)
    half = Resources(cpu_milli=1500, memory_mib=1024)
    for job, at in [("first", 101.0), ("second", 110.0), ("third", 120.0)]:
        scheduler.handle(request(job, resources=half), at)
    meters.show(scheduler, 130.0)
    assert told("leads") == 1
    assert told("nodes", state="Healthy") == 1
    assert told("nodes", state="Unhealthy") == 0
    assert told("node_healthy", node="n") == 1
    assert (told("capacity_cores", node="n"), told("allocated_cores", node="n")) == (2.0, 1.5)
    assert told("allocated_bytes", node="n") == 1 << 30
    assert told("jobs", queue="default", state="placed") == 1
    assert told("jobs", queue="default", state="waiting") == 2
    assert told("oldest_wait_seconds", queue="default") == 20.0
    meters.forget()
    assert told("leads") == 0
    assert told("nodes", state="Healthy") is None


def test_a_placement_tells_how_long_the_job_waited() -> None:
    before = told("wait_seconds_sum", kind="train") or 0.0
    meters.count([("train", 2.0), ("train", 5.0), ("serve", 1.0)])
    assert told("wait_seconds_sum", kind="train") == before + 7.0
