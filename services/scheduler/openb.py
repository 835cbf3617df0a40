"""Pods in openb's columns on a cluster: one by one, in the file's order, none leaves.

The door of `python -m services.scheduler.replay --pods`. What decides is what the service decides
with: its pool, its policies, and plans made of the shapes that arrived so far.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from services.scheduler import planner, pool
from services.scheduler.shapes import GPU_MILLI, GPUS_MAX, Machine, Shape, Spot
from services.scheduler.stimuli import AMOUNT_MAX
from services.scheduler.traces import BadTrace, Row, rows_of
from services.scheduler.typical import Typical

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
    """A cluster, and a policy that fills it."""

    def __init__(
        self, machines: Sequence[Machine], policy: str = "priced", known: Known = (), seed: int = 0
    ) -> None:
        """`known` is what will come, where the policy is told; else it learns from arrivals."""
        self.machines = machines
        self.pool = pool.make(policy, seed)
        for machine in machines:
            self.pool.join(machine)
            self.pool.open(machine.node, True)
        self.typical = Typical()
        self.learns = not known and policy in ("fgd", "priced")
        if known:
            self.inform(policy, known)
        self.policy = policy

    def inform(self, policy: str, typical: Known) -> None:
        if policy == "priced":
            self.pool.price(planner.plan(self.machines, typical).prices)
        else:
            self.pool.learn(typical)

    def place(self, shape: Shape) -> Spot | None:
        """Where it is now; None where it fits nowhere."""
        if self.learns:
            self.typical.note(shape)
            if self.typical.is_due:
                self.inform(self.policy, self.typical.shapes())
                self.typical.planned()
        spot = self.pool.find(shape)
        if spot is not None:
            self.pool.take(shape, spot)
        return spot


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
