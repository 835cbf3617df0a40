"""Jobs in Philly's columns on a cluster: what the scheduler is asked, and how long they waited.

A gang that a node could hold is one worker, so it stays on one node; a larger one is split into
workers as large as the cluster has room for and goes over as few nodes as there is room on. An
attempt after a preemption first spends 7, 30 or 60 s for 1, up to 8, or more GPUs (Lucid's
artifact, ASPLOS'23).
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import msgspec

from libs.contracts.events import JobRequested, Resources
from services.scheduler.shapes import GPU_MILLI, Machine
from services.scheduler.simulator import KIND, PROJECT, Course, Work
from services.scheduler.stimuli import QueueApplied, QueueSpec
from services.scheduler.traces import TraceJob

NODES = 80
GPUS_A_NODE = 8
NODE = Machine("", cpu_milli=64_000, memory_mib=512 << 10, gpus=GPUS_A_NODE)
QUEUE = "shared"
CPU_MILLI_A_GPU = 1_000
MEMORY_MIB_A_GPU = 1_024
LONG_WAIT_S = 36 * 3_600
Sizes = Mapping[int, int]
"""How many nodes have so many GPUs."""
SIZES: Sizes = {GPUS_A_NODE: NODES}


class Summary(msgspec.Struct, frozen=True):
    """Of one replay; seconds."""

    jobs: int
    mean_wait_s: float
    """All the time that jobs were not placed."""
    mean_first_wait_s: float
    """Until they first were."""
    mean_delay_s: float
    """Their waits, and what they spent to resume."""
    max_wait_s: float
    waits_over_36_h: int
    preemptions_a_job: float
    mean_wait_s_by_vc: dict[str, float]


def cluster(nodes: int = NODES) -> list[Machine]:
    return [msgspec.structs.replace(NODE, node=f"node-{i:03d}") for i in range(nodes)]


def resume_s(gpus: int) -> float:
    if gpus == 1:
        return 7.0
    return 30.0 if gpus <= GPUS_A_NODE else 60.0


def works_of(
    jobs: Iterable[TraceJob],
    *,
    durations_known: bool = False,
    by_vc: bool = False,
    sizes: Sizes = SIZES,
) -> list[Work]:
    return [
        Work(
            at_s=job.at_s,
            request=request_of(job, durations_known, job.vc if by_vc else QUEUE, sizes),
            duration_s=job.duration_s,
            resume_s=resume_s(job.gpus),
        )
        for job in jobs
    ]


def request_of(job: TraceJob, durations_known: bool, queue: str, sizes: Sizes) -> JobRequested:
    largest = max(sizes)
    each = worker_gpus(job.gpus, sizes)
    return JobRequested(
        project=PROJECT,
        job=job.name,
        kind=KIND,
        queue=queue,
        workers=job.gpus // each,
        resources=Resources(
            cpu_milli=each * CPU_MILLI_A_GPU,
            memory_mib=each * MEMORY_MIB_A_GPU,
            gpu_milli=GPU_MILLI,
            gpus=each,
        ),
        topology="node" if job.gpus <= largest else "any",
        duration_s=max(1, round(job.duration_s)) if durations_known else 0,
    )


def worker_gpus(gpus: int, sizes: Sizes) -> int:
    """The most a worker that divides the gang so that the idle cluster holds all of it."""
    for each in range(min(gpus, max(sizes)), 1, -1):
        held = sum(nodes * (size // each) for size, nodes in sizes.items())
        if gpus % each == 0 and held * each >= gpus:
            return each
    return 1


def shared_queue() -> list[QueueApplied]:
    """One line for all, by attained service."""
    return [QueueApplied(QueueSpec(queue=QUEUE, order="attained"))]


def vc_queues(shares: dict[str, int], gpus: int = NODES * GPUS_A_NODE) -> list[QueueApplied]:
    """A queue for each virtual cluster with its part of the GPUs; they lend each other.

    Parts are nodes of 8, or smaller ones where the cluster's GPUs are no multiple of 8.
    """
    unit = math.gcd(gpus, GPUS_A_NODE)
    return [
        QueueApplied(
            QueueSpec(
                queue=vc,
                cohort="philly",
                nominal={"gpu_milli": units * unit * GPU_MILLI},
                order="attained",
                reclaim="any",
            )
        )
        for vc, units in apportioned(shares, gpus // unit).items()
    ]


def apportioned(shares: dict[str, int], nodes: int) -> dict[str, int]:
    """Whole nodes in proportion, by largest remainders (Hamilton); ties to the earlier."""
    whole = sum(shares.values())
    parts = {vc: share * nodes // whole for vc, share in shares.items()}
    by_remainder = sorted(shares, key=lambda vc: -(shares[vc] * nodes % whole))
    for vc in by_remainder[: nodes - sum(parts.values())]:
        parts[vc] += 1
    return parts


def summary_of(courses: Sequence[Course], jobs: Sequence[TraceJob]) -> Summary:
    waits = [course.wait_s for course in courses]
    vc_of = {job.name: job.vc for job in jobs}
    by_vc: dict[str, list[float]] = defaultdict(list)
    for course, wait in zip(courses, waits, strict=True):
        by_vc[vc_of[course.work.request.job]].append(wait)
    return Summary(
        jobs=len(courses),
        mean_wait_s=fmean(waits),
        mean_first_wait_s=fmean(course.first_wait_s for course in courses),
        mean_delay_s=fmean(course.delay_s for course in courses),
        max_wait_s=max(waits),
        waits_over_36_h=sum(wait > LONG_WAIT_S for wait in waits),
        preemptions_a_job=fmean(course.preemptions for course in courses),
        mean_wait_s_by_vc={vc: fmean(waits) for vc, waits in sorted(by_vc.items())},
    )
