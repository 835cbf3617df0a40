"""What the scheduler tells of its nodes and jobs, in numbers."""

from typing import Any

from prometheus_client import REGISTRY

from libs.contracts.events import AttemptStarted, Resources
from services.scheduler import meters
from services.scheduler.domain import Scheduler
from services.scheduler.tests.test_domain import beat, request
from services.scheduler.tests.test_elastic import World


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


def test_a_deployment_tells_what_is_wanted_runs_waits_and_was_lent() -> None:
    world = World("a", "b")
    world.deploy()
    world.scale(3)
    job = world.scheduler.jobs["default", "serve-digits"]
    (part,) = job.live.parts
    about: dict[str, Any] = {
        "job": job.request.job,
        "attempt": 1,
        "token": job.live.token,
        "node": part.node,
    }
    world.do(AttemptStarted(project="default", **about))
    meters.show(world.scheduler, 130.0)
    states = ("wanted", "running", "waiting", "spare", "lent")
    assert [replicas(state) for state in states] == [3, 1, 0, 0, 0]
    world.scale(2, spare=1)
    world.submit("training", 900)
    meters.show(world.scheduler, 130.0)
    assert [replicas(state) for state in states] == [1, 1, 0, 0, 1]
    meters.forget()
    assert replicas("wanted") is None


def replicas(state: str) -> float | None:
    return told("replicas", project="default", model="digits", state=state)


def test_a_placement_tells_how_long_the_job_waited() -> None:
    before = told("wait_seconds_sum", kind="train") or 0.0
    meters.count([("train", 2.0), ("train", 5.0), ("serve", 1.0)])
    assert told("wait_seconds_sum", kind="train") == before + 7.0
