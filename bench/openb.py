"""`python -m bench.openb`: policies on openb's pod lists, by FGD's protocol (ATC'23).

Of each list: shuffled, then drawn from with replacement until what is asked for is 130 % of the
cluster's GPUs (a longer list is cut); pods come one by one, none leaves, one that fits nowhere is
dropped. What counts is the share of the cluster's GPU milli that is allocated in the end, as the
mean of ten seeds. CPU and memory are respected as well as GPUs.

FGD is told, as in its paper, the most frequent shapes until they are 95 % of the list. `priced` is
the service's policy, told the list's shapes; `learned` the same, told nothing.
"""

import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from services.scheduler.openb import Known, Replay, pods_of
from services.scheduler.planner import plan
from services.scheduler.shapes import GPU_MILLI, Machine, Shape
from services.scheduler.traces import machines_of

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "openb"
NODES = "openb_node_list_gpu_node.csv"
VARIANTS = ("default", "cpu100", "gpushare40", "gpuspec10", "multigpu20")
ANCHORS = {
    "default": 95.39,
    "cpu100": 95.35,
    "gpushare40": 94.15,
    "gpuspec10": 94.95,
    "multigpu20": 95.65,
}
"""FGD's figures by the same protocol, measured elsewhere."""
POLICIES = (
    "random",
    "dot_product",
    "clustering",
    "packing",
    "best_fit",
    "fgd",
    "priced",
    "learned",
)
SEEDS = range(42, 52)
LOAD = 1.3
TYPICAL = 0.95

Row = dict[str, Any]


def gpus_of(machines: Iterable[Machine]) -> int:
    """In milli."""
    return sum(machine.gpus for machine in machines) * GPU_MILLI


def stream(shapes: Sequence[Shape], capacity: int, seed: int) -> list[Shape]:
    rng = random.Random(seed)
    wanted = LOAD * capacity
    asked, found = 0, []
    for shape in rng.sample(shapes, len(shapes)):
        if asked < wanted:
            found.append(shape)
            asked += shape.gpus * shape.gpu_milli
    while asked < wanted:
        found.append(rng.choice(shapes))
        asked += found[-1].gpus * found[-1].gpu_milli
    return found


def counted(shapes: Iterable[Shape]) -> list[tuple[Shape, int]]:
    return sorted(Counter(shapes).items(), key=lambda one: (-one[1], one[0]))


def typical(shapes: Sequence[Shape]) -> list[tuple[Shape, int]]:
    """The most frequent, memory aside, until they are 95 %."""
    found, many = [], 0
    for shape, count in counted(without_memory(shape) for shape in shapes):
        if many < TYPICAL * len(shapes):
            found.append((shape, count))
            many += count
    return found


def without_memory(shape: Shape) -> Shape:
    return Shape(shape.cpu_milli, 0, shape.gpus, shape.gpu_milli, shape.gpu_models)


@cache
def loaded(variant: str) -> tuple[list[Machine], list[Shape]]:
    pods = pods_of(DATA / f"openb_pod_list_{variant}.csv")
    return machines_of(DATA / NODES), [pod.shape for pod in pods]


def allocated(variant: str, policy: str, seed: int) -> float:
    """Per cent of the cluster's GPU milli."""
    machines, shapes = loaded(variant)
    known: Known = ()
    if policy == "fgd":
        known = typical(shapes)
    if policy == "priced":
        known = counted(shapes)
    run = Replay(machines, "priced" if policy == "learned" else policy, known, seed)
    taken = 0
    for shape in stream(shapes, gpus_of(machines), seed):
        if run.place(shape) is not None:
            taken += shape.gpus * shape.gpu_milli
    return 100 * taken / gpus_of(machines)


def rows(seeds: Sequence[int] = SEEDS) -> list[Row]:
    """Of every variant and policy; ratios are to best fit and FGD of the same run."""
    if not DATA.is_dir():
        raise SystemExit(f"no data: {DATA} is missing (see shared/data/README.md)")
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        futures = {
            (variant, policy, seed): workers.submit(allocated, variant, policy, seed)
            for variant in VARIANTS
            for policy in POLICIES
            for seed in seeds
        }
        figures = {key: future.result() for key, future in futures.items()}
    means = {
        (variant, policy): fmean(figures[variant, policy, seed] for seed in seeds)
        for variant in VARIANTS
        for policy in POLICIES
    }
    return [row_of(variant, policy, means) for variant in VARIANTS for policy in POLICIES]


def row_of(variant: str, policy: str, means: dict[tuple[str, str], float]) -> Row:
    mean = means[variant, policy]
    return {
        "variant": variant,
        "policy": policy,
        "allocated_percent": round(mean, 2),
        "minus_fgd": round(mean - means[variant, "fgd"], 2),
        "times_best_fit": round(mean / means[variant, "best_fit"], 4),
        "times_fgd": round(mean / means[variant, "fgd"], 4),
        "anchor_fgd": ANCHORS[variant],
        "bound_percent": round(bound(variant), 2),
    }


@cache
def bound(variant: str) -> float:
    """Per cent of GPU milli that could be allocated with none refused."""
    machines, shapes = loaded(variant)
    return 100 * plan(machines, counted(shapes)).load_milli / gpus_of(machines)


def main() -> None:
    found = rows()
    print(" ".join(f"{name:>17}" for name in found[0]))
    for row in found:
        print(" ".join(f"{value:>17}" for value in row.values()))
    ours = [row for row in found if row["policy"] == "learned"]
    print(f"learned minus FGD, mean: {fmean(row['minus_fgd'] for row in ours):.2f}")


if __name__ == "__main__":
    main()
