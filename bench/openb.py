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

from bench.rows import DATA, Row, row
from services.scheduler.openb import Known, Replay, pods_of
from services.scheduler.planner import plan
from services.scheduler.shapes import GPU_MILLI, Machine, Shape
from services.scheduler.traces import machines_of

NODES = "openb_node_list_gpu_node.csv"
ANCHORS = {
    "default": 95.39,
    "cpu100": 95.35,
    "gpushare40": 94.15,
    "gpuspec10": 94.95,
    "multigpu20": 95.65,
}
"""List of pods -> FGD's figure by the same protocol, measured elsewhere."""
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

Figures = dict[str, Any]


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
def loaded(folder: Path, variant: str) -> tuple[list[Machine], list[Shape]]:
    pods = pods_of(folder / f"openb_pod_list_{variant}.csv")
    return machines_of(folder / NODES), [pod.shape for pod in pods]


def allocated(folder: Path, variant: str, policy: str, seed: int) -> float:
    """Per cent of the cluster's GPU milli."""
    machines, shapes = loaded(folder, variant)
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


def rows(data: Path) -> list[Row]:
    """Per cent of GPU milli, beside FGD in the same run."""
    found = measured(data / "openb")
    return [*map(row_of, found), *minus_rows(found, "priced"), *minus_rows(found, "learned")]


def row_of(one: Figures) -> Row:
    return row(
        f"openb {one['variant']}, {one['policy']}, %",
        one["allocated_percent"],
        one["allocated_percent"] - one["minus_fgd"],
        f"FGD; {one['times_best_fit']} x best fit, bound {one['bound_percent']}",
    )


def minus_rows(found: Sequence[Figures], policy: str) -> list[Row]:
    minus = [one["minus_fgd"] for one in found if one["policy"] == policy]
    against = f"{len(ANCHORS)} variants"
    return [
        row(f"openb worst against FGD, {policy}", min(minus), 0, against),
        row(f"openb mean against FGD, {policy}", fmean(minus), 0, against),
    ]


def measured(folder: Path) -> list[Figures]:
    """Of every variant and policy; ratios are to best fit and FGD of the same run."""
    if not folder.is_dir():
        raise SystemExit(f"no data: {folder} is missing (--data is what openb/ is in)")
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        futures = {
            (variant, policy, seed): workers.submit(allocated, folder, variant, policy, seed)
            for variant in ANCHORS
            for policy in POLICIES
            for seed in SEEDS
        }
        figures = {key: future.result() for key, future in futures.items()}
    means = {
        (variant, policy): fmean(figures[variant, policy, seed] for seed in SEEDS)
        for variant in ANCHORS
        for policy in POLICIES
    }
    bounds = {variant: bound(*loaded(folder, variant)) for variant in ANCHORS}
    return [
        figures_of(variant, policy, means, bounds[variant])
        for variant in ANCHORS
        for policy in POLICIES
    ]


def figures_of(
    variant: str, policy: str, means: dict[tuple[str, str], float], bound_percent: float
) -> Figures:
    mean = means[variant, policy]
    return {
        "variant": variant,
        "policy": policy,
        "allocated_percent": round(mean, 2),
        "minus_fgd": round(mean - means[variant, "fgd"], 2),
        "times_best_fit": round(mean / means[variant, "best_fit"], 4),
        "times_fgd": round(mean / means[variant, "fgd"], 4),
        "anchor_fgd": ANCHORS[variant],
        "bound_percent": round(bound_percent, 2),
    }


def bound(machines: list[Machine], shapes: list[Shape]) -> float:
    """Per cent of GPU milli that could be allocated with none refused."""
    return 100 * plan(machines, counted(shapes)).load_milli / gpus_of(machines)


def main() -> None:
    found = measured(DATA / "openb")
    print(" ".join(f"{name:>17}" for name in found[0]))
    for figures in found:
        print(" ".join(f"{value:>17}" for value in figures.values()))
    ours = [one["minus_fgd"] for one in found if one["policy"] == "learned"]
    print(f"learned minus FGD, mean: {fmean(ours):.2f}")


if __name__ == "__main__":
    main()
