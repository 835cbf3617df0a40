"""Pods in openb's columns on a cluster: one by one, in the file's order, none leaves.

The door of `python -m services.scheduler.replay --pods`. What decides is the service's own state
machine under a virtual clock: nodes are heartbeats, a pod is a job, plans are made by the service's
planning of the shapes that arrived so far and reach it as stimuli. A pod that fits nowhere would
wait in the service; by the protocol (FGD, ATC'23) there is no second try, so it is cancelled.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from libs.contracts.events import (
    AttemptPlaced,
    AttemptStarted,
    Event,
    JobCancelled,
    JobRequested,
    Resources,
)
from services.scheduler import planner, planning, pool
from services.scheduler.domain import Scheduler
from services.scheduler.shapes import GPU_MILLI, GPUS_MAX, Machine, Shape, Spot
from services.scheduler.simulator import KIND, PROJECT, heartbeat_of
from services.scheduler.stimuli import AMOUNT_MAX, JobSubmitted, Planned, Stimulus
from services.scheduler.traces import BadTrace, Row, rows_of

POD_COLUMNS = ("name", "cpu_milli", "memory_mib", "num_gpu", "gpu_milli")
"""Needed; `gpu_spec`, models divided by |, is read where there is one."""
DECISION_COLUMNS = ("name", "node", "gpus")

Known = Sequence[tuple[Shape, int]]
"""Shapes, and how often each comes."""


class Pod(msgspec.Struct, frozen=True):
    name: str
    shape: Shape


def pods_of(path: Path) -> list[Pod]:
    return [Pod(row.text("name"), shape_of(row)) for row in rows_of(path, POD_COLUMNS)]


def shape_of(row: Row) -> Shape:
    """A pod of several GPUs has them whole."""
    gpus = row.integer("num_gpu", 0, GPUS_MAX)
    gpu_milli = row.integer("gpu_milli", 1 if gpus else 0, GPU_MILLI)
    if gpus > 1 and gpu_milli != GPU_MILLI:
        where = f"{row.path}, line {row.line}, column 'gpu_milli'"
        raise BadTrace(f"{where}: {GPU_MILLI} where num_gpu is more than 1, got {gpu_milli}")
    models = {model.strip() for model in row.cells.get("gpu_spec", "").split("|")} - {""}
    return Shape(
        cpu_milli=row.integer("cpu_milli", 0, AMOUNT_MAX),
        memory_mib=row.integer("memory_mib", 0, AMOUNT_MAX),
        gpus=gpus,
        gpu_milli=gpu_milli if gpus else 0,
        gpu_models=tuple(sorted(models)) if gpus else (),
    )


class Replay:
    """A cluster, and the scheduler that fills it."""

    def __init__(
        self, machines: Sequence[Machine], policy: str = "priced", known: Known = (), seed: int = 0
    ) -> None:
        """`known` is what will come, where the policy is told; else `priced` learns."""
        self.scheduler = Scheduler()
        self.now = 0.0
        self.pods = 0
        self.plans = policy == "priced" and not known
        if policy != "priced":
            self.scheduler.pool = pool.make(policy, seed)
            self.scheduler.pool.learn(known)
        for machine in sorted(machines, key=lambda machine: machine.node):
            self.tell(heartbeat_of(machine))
        if policy == "priced" and known:
            self.tell(Planned(planner.plan(machines, known).prices))

    def tell(self, stimulus: Stimulus) -> list[Event]:
        return self.scheduler.handle(stimulus, self.now)

    def place(self, shape: Shape) -> Spot | None:
        """Where it is now; None where it fits nowhere."""
        self.now += planning.LOOK_S
        self.pods += 1
        said = self.tell(JobSubmitted(request_of(f"pod-{self.pods}", shape)))
        spot = self.started(said)
        if spot is None:
            self.tell(JobCancelled(project=PROJECT, job=f"pod-{self.pods}"))
        if self.plans:
            self.plan()
        return spot

    def started(self, said: Sequence[Event]) -> Spot | None:
        """By its node, at once."""
        for event in said:
            assert isinstance(event, AttemptPlaced), event
            fields = {name: getattr(event, name) for name in AttemptStarted.__struct_fields__}
            self.tell(AttemptStarted(**fields))
            return Spot(event.node, tuple(event.gpus[0]) if event.gpus else ())
        return None

    def plan(self) -> None:
        """Pods come as far apart as the planner looks: it looks once after each."""
        given = planning.wanted(self.scheduler)
        if given is not None:
            for planned in planning.planned(planner.plan(*given), self.scheduler):
                self.tell(planned)


def request_of(name: str, shape: Shape) -> JobRequested:
    return JobRequested(
        project=PROJECT,
        job=name,
        kind=KIND,
        resources=Resources(
            shape.cpu_milli, shape.memory_mib, shape.gpu_milli, gpus=max(1, shape.gpus)
        ),
        gpu_models=list(shape.gpu_models),
    )


def replay(machines: Sequence[Machine], pods: Iterable[Pod]) -> list[tuple[str, Spot | None]]:
    """Each pod's name and place, by the service's policy."""
    run = Replay(machines)
    return [(pod.name, run.place(pod.shape)) for pod in pods]


def write(path: Path, decisions: Iterable[tuple[str, Spot | None]]) -> None:
    """`gpus` are indices on the node, divided by |; node and gpus are empty where none fits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(DECISION_COLUMNS)
        for name, spot in decisions:
            node, gpus = (spot.node, "|".join(map(str, spot.gpus))) if spot else ("", "")
            writer.writerow((name, node, gpus))
