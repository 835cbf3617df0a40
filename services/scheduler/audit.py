"""What is kept beside the jobs, recomputed from the jobs alone."""

from collections import Counter
from typing import TYPE_CHECKING

from services.scheduler.jobs import LIVE, STATES, TERMINAL, WAITING, Job
from services.scheduler.lines import place_of
from services.scheduler.nodes import HEALTH, NOTHING, UNHEALTHY, total
from services.scheduler.quota import amounts_placed
from services.scheduler.shapes import Shape, Spot, capacity

if TYPE_CHECKING:
    from services.scheduler.domain import Scheduler


def check(scheduler: "Scheduler") -> None:
    """Asserts that a scheduler agrees with itself. Costs as much as there are jobs."""
    placed = [job for job in scheduler.jobs.values() if job.placement is not None]
    placed.sort(key=lambda job: job.live.token)
    check_jobs(scheduler)
    check_placed(scheduler, placed)
    check_nodes(scheduler, placed)
    check_lines(scheduler)
    assert not scheduler.decided
    assert not scheduler.evicted


def check_jobs(scheduler: "Scheduler") -> None:
    ended = set(scheduler.finished)
    assert len(ended) == len(scheduler.finished)
    for key, job in scheduler.jobs.items():
        assert job.key == key
        assert job.state in STATES, (key, job.state)
        assert (job.placement is not None) == (job.state in LIVE), (key, job.state)
        assert (key in ended) == (job.state in TERMINAL), (key, job.state)
        assert job.attempt - job.preempted <= job.request.attempts_max, (key, job.attempt)


def check_placed(scheduler: "Scheduler", placed: list[Job]) -> None:
    tokens = [job.live.token for job in placed]
    assert len(set(tokens)) == len(tokens)
    assert all(0 < token <= scheduler.token for token in tokens)
    used: dict[str, Counter[str]] = {}
    for job in placed:
        live = job.live
        assert sum(len(part.gpus) for part in live.parts) == job.ask.workers, job.key
        assert len({part.node for part in live.parts}) == len(live.parts), job.key
        assert {*live.started, *live.done} <= live.nodes, job.key
        assert len(live.done) < len(live.parts), job.key
        used.setdefault(job.request.queue, Counter()).update(amounts_placed(job.ask, live))
    for queue, amounts in scheduler.quota.used.items():
        assert {n: v for n, v in amounts.items() if v} == dict(used.get(queue, {})), queue
    entries = [entry for queue in scheduler.running.values() for entry in queue]
    assert sorted(token for _, token, _ in entries) == sorted(tokens)
    assert all(queue == sorted(queue) for queue in scheduler.running.values())
    known = [job for job in placed if job.request.duration_s]
    assert scheduler.ends == sorted((*scheduler.end_of(job), job) for job in known)


def check_nodes(scheduler: "Scheduler", placed: list[Job]) -> None:
    assert list(scheduler.nodes) == sorted(scheduler.nodes)
    held: dict[str, list[tuple[Shape, Spot]]] = {}
    for job in placed:
        for shape, spot in job.releases():
            held.setdefault(spot.node, []).append((shape, spot))
    for name, node in scheduler.nodes.items():
        mine = [job for job in placed if name in job.live.nodes]
        here = [(job, part) for job in mine if (part := job.live.part_on(name))]
        assert list(scheduler.on_node.get(name, ())) == [job.key for job in mine], name
        assert node.allocated == total(job.need_of(len(part.gpus)) for job, part in here), name
        assert scheduler.machines[name] == node.machine, name
        whole = capacity(node.machine)
        gpus = list(whole.gpus)
        for shape, spot in held.get(name, ()):
            for i in spot.gpus:
                gpus[i] -= shape.gpu_milli
        free = scheduler.pool.free(name)
        assert free.gpus == tuple(gpus), (name, free, gpus)
        assert min(gpus, default=0) >= 0, (name, gpus)
        assert free.cpu_milli == whole.cpu_milli - node.allocated.cpu_milli >= 0, name
        assert free.memory_mib == whole.memory_mib - node.allocated.memory_mib >= 0, name
        assert node.state in HEALTH, (name, node.state)
        assert node.state != UNHEALTHY or node.allocated == NOTHING, name


def check_lines(scheduler: "Scheduler") -> None:
    waiting = {job.key for job in scheduler.jobs.values() if job.state == WAITING}
    assert sorted(scheduler.lines.waiting()) == sorted(waiting)
    assert not scheduler.lines.open
    assert not scheduler.lines.may_evict
    for name, line in scheduler.lines.of.items():
        assert len(line.places) == len(line.jobs()) > 0, name
        assert all((job.request.queue, job.ask) == name for job in line.jobs())
        spec = scheduler.specs.get(line.queue)
        first = min(line.jobs(), key=lambda job: place_of(job, spec))
        assert line.head is first, name
    if scheduler.reservation is not None:
        assert scheduler.reservation.job in waiting
