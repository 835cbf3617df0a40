"""`python -m services.scheduler.replay`: a trace in, the scheduler's decisions out.

Pods in openb's columns are placed one by one as the file has them and none leaves; jobs in
Philly's columns arrive, run and end under a virtual clock. docs/scheduler.md says what the columns
are. Whatever is wrong with a file ends it with the file, the line and the column.
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from services.scheduler import openb, philly, simulator, traces
from services.scheduler.shapes import Machine
from services.scheduler.simulator import Course
from services.scheduler.traces import BadTrace, TraceJob

JOB_DECISION_COLUMNS = (
    "job",
    "attempt",
    "submitted_s",
    "started_s",
    "stopped_s",
    "outcome",
    "nodes",
    "gpus",
)


def main(arguments: Sequence[str]) -> None:
    parser = parser_of()
    asked = parser.parse_args(arguments)
    if asked.pods is not None and asked.nodes is None:
        parser.error("--pods needs --nodes")
    try:
        if asked.pods is not None:
            replay_pods(asked.nodes, asked.pods, asked.out)
        else:
            replay_jobs(asked.nodes, asked.jobs, asked.vcs, asked.durations == "known", asked.out)
    except BadTrace as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m services.scheduler.replay")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pods", type=Path, help="pods in openb's columns")
    what.add_argument("--jobs", type=Path, help="jobs in Philly's columns")
    parser.add_argument("--nodes", type=Path, help="nodes in openb's columns")
    parser.add_argument("--order", choices=("given",), default="given", help="of the pods")
    parser.add_argument("--durations", choices=("known", "unknown"), default="unknown")
    parser.add_argument("--vcs", type=Path, help="virtual clusters, each with a quota of its own")
    parser.add_argument("--out", type=Path, required=True, help="the decisions, as CSV")
    return parser


def replay_pods(nodes: Path, pods: Path, out: Path) -> None:
    machines, asked = traces.machines_of(nodes), openb.pods_of(pods)
    check_writable(out)
    decisions = openb.replay(machines, asked)
    openb.write(out, decisions)
    placed = sum(spot is not None for _, spot in decisions)
    print(f"{placed} of {len(decisions)} pods placed")


def replay_jobs(
    nodes: Path | None, jobs: Path, vcs: Path | None, durations_known: bool, out: Path
) -> None:
    machines = philly.cluster() if nodes is None else traces.machines_of(nodes)
    shares = None if vcs is None else traces.vc_nodes_of(vcs)
    read = traces.jobs_of(jobs)
    check_writable(out)
    courses = run(machines, read, shares, durations_known)
    write(out, courses)
    summary = philly.summary_of(courses, read)
    print(msgspec.json.format(msgspec.json.encode(summary)).decode())


def run(
    machines: Sequence[Machine],
    jobs: Sequence[TraceJob],
    shares: dict[str, int] | None = None,
    durations_known: bool = False,
) -> list[Course]:
    """Every job to its end; with `shares` by virtual cluster. Raises `BadTrace`."""
    gpus = sum(machine.gpus for machine in machines)
    sizes = Counter(machine.gpus for machine in machines)
    check(jobs, gpus, shares)
    queues = philly.shared_queue() if shares is None else philly.vc_queues(shares, gpus)
    world = simulator.Simulator(machines, queues)
    works = philly.works_of(
        jobs, durations_known=durations_known, by_vc=shares is not None, sizes=sizes
    )
    courses = world.run(works)
    if never := list(simulator.unfinished(courses)):
        raise BadTrace(f"{len(never)} jobs fit nowhere, such as {never[0]}")
    return courses


def check_writable(path: Path) -> None:
    """Before minutes of replay, not after them."""
    try:
        path.open("a").close()
    except OSError as error:
        raise BadTrace(f"{path}: {error.strerror}") from error


def check(jobs: Iterable[TraceJob], gpus: int, shares: dict[str, int] | None) -> None:
    for job in jobs:
        if job.gpus > gpus:
            raise BadTrace(f"{job.name}: needs {job.gpus} GPUs, the cluster has {gpus}")
        if shares is not None and job.vc not in shares:
            known = ", ".join(shares)
            raise BadTrace(f"{job.name}: virtual cluster {job.vc!r} is none of {known}")


def write(path: Path, courses: Iterable[Course]) -> None:
    """A line an attempt. `nodes` are divided by |, and so are `gpus`: indices on each of them."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(JOB_DECISION_COLUMNS)
        for course in courses:
            for one in course.stretches:
                last = one is course.stretches[-1]
                writer.writerow(
                    (
                        course.work.request.job,
                        one.attempt,
                        f"{course.work.at_s:.3f}",
                        f"{one.start_s:.3f}",
                        f"{one.end_s:.3f}",
                        "done" if last else "preempted",
                        "|".join(one.nodes),
                        "|".join(
                            " ".join(str(gpu) for worker in workers for gpu in worker)
                            for workers in one.gpus
                        ),
                    )
                )


if __name__ == "__main__":
    main(sys.argv[1:])
