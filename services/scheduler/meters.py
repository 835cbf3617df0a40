"""What the scheduler places and what waits for it, as Prometheus reads it at `/metrics`.

Only the scheduler that leads tells about nodes and jobs; a standby tells that it does not lead.
"""

import functools
from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import Gauge, Histogram

from services.scheduler import elastic
from services.scheduler.domain import Scheduler
from services.scheduler.jobs import PLACED, RUNNING, WAITING
from services.scheduler.nodes import HEALTH, HEALTHY

MILLI = 1000
MIB = 1 << 20
NODES_TOLD_MAX = 500
"""Of more nodes than these only totals are told: 5,000 of them are 25,000 series, 0.25 s to set."""
WAITS_S = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14_400, 86_400)
LEADS = Gauge("leptonic_scheduler_leads", "1 for the scheduler that decides, 0 for a standby")
FOLLOWED = Gauge(
    "leptonic_scheduler_followed_line", "Of the log, the last that a standby has read along"
)
NODES = Gauge("leptonic_scheduler_nodes", "Nodes in each state of health", ["state"])
NODE_HEALTHY = Gauge("leptonic_scheduler_node_healthy", "1 for a node that takes work", ["node"])
CORES = Gauge("leptonic_scheduler_capacity_cores", "CPU a node offers", ["node"])
CORES_TAKEN = Gauge("leptonic_scheduler_allocated_cores", "CPU of what is placed there", ["node"])
MEMORY = Gauge("leptonic_scheduler_capacity_bytes", "Memory a node offers", ["node"])
MEMORY_TAKEN = Gauge(
    "leptonic_scheduler_allocated_bytes", "Memory of what is placed there", ["node"]
)
JOBS = Gauge("leptonic_scheduler_jobs", "Jobs that have not ended", ["queue", "state"])
OLDEST = Gauge(
    "leptonic_scheduler_oldest_wait_seconds", "How long the first in line has waited", ["queue"]
)
WAIT = Histogram(
    "leptonic_scheduler_wait_seconds", "From asked for to placed", ["kind"], buckets=WAITS_S
)
histogram = functools.cache(WAIT.labels)
REPLICAS = Gauge(
    "leptonic_scheduler_replicas",
    "Of each deployment: replicas, and jobs that got the room of one",
    ["project", "model", "state"],
)
OF_A_LEADER = (
    *(NODES, NODE_HEALTHY, CORES, CORES_TAKEN, MEMORY, MEMORY_TAKEN, JOBS, OLDEST),
    REPLICAS,
)


def forget() -> None:
    """It leads no more."""
    LEADS.set(0)
    for gauge in OF_A_LEADER:
        gauge.clear()


def show(scheduler: Scheduler, now: float) -> None:
    LEADS.set(1)
    for gauge in OF_A_LEADER:
        gauge.clear()
    show_nodes(scheduler)
    jobs = [job for job in scheduler.jobs.values() if job.state in (WAITING, PLACED, RUNNING)]
    for (queue, state), count in Tally((job.request.queue, job.state) for job in jobs).items():
        JOBS.labels(queue, state).set(count)
    waits = {job.request.queue: 0.0 for job in jobs}
    for job in jobs:
        if job.state == WAITING:
            queue = job.request.queue
            waits[queue] = max(waits[queue], now - job.waiting_since)
    for queue, waited in waits.items():
        OLDEST.labels(queue).set(waited)
    for deployment in scheduler.deployments.values():
        for state, count in elastic.counts(scheduler, deployment).items():
            REPLICAS.labels(*deployment.key, state).set(count)


def show_nodes(scheduler: Scheduler) -> None:
    states = Tally(node.state for node in scheduler.nodes.values())
    for state in HEALTH:
        NODES.labels(state).set(states[state])
    if len(scheduler.nodes) > NODES_TOLD_MAX:
        return
    for name, node in scheduler.nodes.items():
        NODE_HEALTHY.labels(name).set(node.state == HEALTHY)
        CORES.labels(name).set(node.capacity.cpu_milli / MILLI)
        CORES_TAKEN.labels(name).set(node.allocated.cpu_milli / MILLI)
        MEMORY.labels(name).set(node.capacity.memory_mib * MIB)
        MEMORY_TAKEN.labels(name).set(node.allocated.memory_mib * MIB)


def count(waits: Iterable[tuple[str, float]]) -> None:
    """(kind, seconds) of what was placed and is committed."""
    for kind, waited in waits:
        histogram(kind).observe(waited)
