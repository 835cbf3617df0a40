"""`python -m bench.philly`: Philly's fortnight through the scheduler itself, durations unknown.

80 nodes of 8 GPUs under a virtual clock; waits are all the time that jobs were not placed, between
and before their attempts. The floor is the same machine with the queue by submission, whatever
fits passing. Then with a queue for each virtual cluster, which lend each other, against the pool
that they share; and each of them alone on its own nodes.
"""

import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.rows import DATA, Row, row, show
from services.scheduler import philly, replay, traces
from services.scheduler.philly import Summary
from services.scheduler.simulator import Simulator
from services.scheduler.stimuli import QueueApplied, QueueSpec
from services.scheduler.traces import TraceJob

FORTNIGHT, MONTH = "philly_2017-10-01_10-14.csv", "philly_2017-09.csv"
VCS = "philly_vc_nodes.csv"
SHARED, BY_ARRIVAL, BY_VC = "shared", "by arrival", "by vc"


def pooled(jobs: list[TraceJob], how: str, nodes: int = philly.NODES) -> Summary:
    """In one queue."""
    by_arrival = [QueueApplied(QueueSpec(queue=philly.QUEUE))]
    queues = by_arrival if how == BY_ARRIVAL else philly.shared_queue()
    courses = Simulator(philly.cluster(nodes), queues).run(philly.works_of(jobs))
    return philly.summary_of(courses, jobs)


def simulated(folder: Path, trace: str, how: str) -> Summary:
    """`how`: one of the above, or the virtual cluster that is alone."""
    jobs = traces.jobs_of(folder / trace)
    shares = traces.vc_nodes_of(folder / VCS)
    parts = philly.apportioned(shares, philly.NODES)
    if how == BY_VC:
        world = Simulator(philly.cluster(), philly.vc_queues(shares))
        return philly.summary_of(world.run(philly.works_of(jobs, by_vc=True)), jobs)
    if how not in parts:
        return pooled(jobs, how)
    gpus = parts[how] * philly.GPUS_A_NODE
    return pooled([job for job in jobs if job.vc == how and job.gpus <= gpus], how, parts[how])


def rows(data: Path) -> list[Row]:
    folder = data / "philly"
    if not (folder / FORTNIGHT).is_file():
        raise SystemExit(f"no data: {folder / FORTNIGHT} is missing (--data is what philly/ is in)")
    vcs = [*traces.vc_nodes_of(folder / VCS)]
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        futures = {
            how: workers.submit(simulated, folder, FORTNIGHT, how)
            for how in (SHARED, BY_ARRIVAL, BY_VC, *vcs)
        }
        month = workers.submit(simulated, folder, MONTH, SHARED)
        found = {how: future.result() for how, future in futures.items()}
    return [
        *shared_rows(found[SHARED], found[BY_ARRIVAL]),
        *vc_rows(found, vcs),
        row("September, no tuning: mean wait, s", month.result().mean_wait_s, 0, "-"),
        row("September: longest wait, h", month.result().max_wait_s / 3600, 0, "-"),
    ]


def shared_rows(ours: Summary, by_arrival: Summary) -> list[Row]:
    floor = "by submission, whatever fits passes"
    return [
        row("Philly: mean wait, s", ours.mean_wait_s, by_arrival.mean_wait_s, floor),
        row("Philly: mean wait and resuming, s", ours.mean_delay_s, by_arrival.mean_delay_s, floor),
        row("Philly: longest wait, h", ours.max_wait_s / 3600, by_arrival.max_wait_s / 3600, floor),
        row("Philly: waits over 36 h", ours.waits_over_36_h, 0, "-"),
        row("Philly: preemptions a job", ours.preemptions_a_job, 0, "-"),
    ]


def vc_rows(found: Mapping[str, Summary], vcs: list[str]) -> list[Row]:
    by_vc, shared = found[BY_VC], found[SHARED]
    lent = by_vc.mean_wait_s_by_vc
    worse = [vc for vc in vcs if lent.get(vc, 0) > found[vc].mean_wait_s_by_vc.get(vc, 0)]
    return [
        row("Philly by VC: mean wait, s", by_vc.mean_wait_s, shared.mean_wait_s, "the shared pool"),
        row("Philly by VC: longest wait, h", by_vc.max_wait_s / 3600, 0, "-"),
        row("Philly by VC: worse than alone", len(worse), 0, ", ".join(worse) or "none of 11"),
        *(
            row(f"Philly by VC: {vc}, s", lent[vc], found[vc].mean_wait_s_by_vc[vc], "alone")
            for vc in vcs
        ),
    ]


def of_file(path: Path) -> list[Row]:
    """Any trace in Philly's columns, on the same cluster. Raises `BadTrace`."""
    jobs = traces.jobs_of(path)
    replay.check(jobs, philly.NODES * philly.GPUS_A_NODE, None)
    return shared_rows(*(pooled(jobs, how) for how in (SHARED, BY_ARRIVAL)))


if __name__ == "__main__":
    show(rows(DATA))
