"""Jobs in Philly's columns on a cluster: what the scheduler is asked, and how long they waited.

A gang of up to 8 GPUs is one worker, so it stays on one node; a larger one is split into workers as
large as a node allows and goes over as few nodes as there is room on. An attempt after a
preemption first spends 7, 30 or 60 s for 1, up to 8, or more GPUs (Lucid's artifact, ASPLOS'23).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
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
    largest: int = 8,
) -> list[Work]:
    """`largest`: GPUs of the largest node."""
    return [
        Work(
            at_s=job.at_s,
            request=request_of(job, durations_known, job.vc if by_vc else QUEUE, largest),
            duration_s=job.duration_s,
            resume_s=resume_s(job.gpus),
        )
        for job in jobs
    ]


def request_of(job: TraceJob, durations_known: bool, queue: str, largest: int) -> JobRequested:
    each = max(size for size in range(1, largest + 1) if job.gpus % size == 0)
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


def shared_queue() -> list[QueueApplied]:
    """One line for all, by attained service."""
    return [QueueApplied(QueueSpec(queue=QUEUE, order="attained"))]


def vc_queues(shares: dict[str, int], gpus: int = NODES * GPUS_A_NODE) -> list[QueueApplied]:
    """A queue for each virtual cluster with its part of the GPUs; they lend each other."""
    return [
        QueueApplied(
            QueueSpec(
                queue=vc,
                cohort="philly",
                nominal={"gpu_milli": nodes * GPUS_A_NODE * GPU_MILLI},
                order="attained",
                reclaim="any",
            )
        )
        for vc, nodes in apportioned(shares, gpus // GPUS_A_NODE).items()
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
