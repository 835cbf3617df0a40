"""`python -m bench.edge`: which edge node serves which source, against the linear program's bound.

Made-up worlds: nodes anywhere in a square, of capacity 1, 2, 4 or 8; sources of demand 1 to 10, six
of ten around a few hot spots; latency is 2 ms and 40 ms for the square's side. Costs are ratios to
the bound; times are of this thread's processor time, of one decision, the plan apart.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from time import perf_counter, thread_time

from bench.rows import Row, row
from services.scheduler.edge import EdgeNode, Source, as_they_come, assign, cost, plan

WORLDS = ((500, 20), (2_000, 20), (2_000, 50))
LOADS = (0.8, 0.95)
SEEDS = (1, 2, 3)
NEAR_US, SIDE_US = 2_000, 40_000

Figures = dict[str, float]
Point = tuple[float, float]
World = tuple[list[Source], list[EdgeNode]]


def instance(sources: int, nodes: int, load: float, seed: int) -> World:
    """All demand is `load` of all capacity."""
    rng = random.Random(seed)
    places = [(rng.random(), rng.random()) for _ in range(nodes)]
    sizes = rng.choices((1, 2, 4, 8), (4, 3, 2, 1), k=nodes)
    spots = [(rng.random(), rng.random()) for _ in range(max(3, nodes // 4))]
    demands = [rng.randint(1, 10) for _ in range(sources)]
    unit = sum(demands) / load / sum(sizes)
    return [
        Source(f"source-{i}", demand, latencies(place(rng, spots), places))
        for i, demand in enumerate(demands)
    ], [EdgeNode(f"node-{i}", max(1, int(unit * size))) for i, size in enumerate(sizes)]


def place(rng: random.Random, spots: list[Point]) -> Point:
    if rng.random() < 0.4:
        return rng.random(), rng.random()
    x, y = rng.choice(spots)
    return rng.gauss(x, 0.05), rng.gauss(y, 0.05)


def latencies(at: Point, places: list[Point]) -> tuple[int, ...]:
    return tuple(NEAR_US + int(SIDE_US * math.dist(at, one)) for one in places)


def timed(decide: Callable[[], list[int | None]]) -> tuple[list[int | None], float]:
    """What was decided, and the microseconds of one decision."""
    started = thread_time()
    served = decide()
    return served, (thread_time() - started) / len(served) * 1e6


def rows(_: Path) -> list[Row]:
    """Of all worlds; the floor is the same in arrival order."""
    found = list(measured())
    ours = [one["priced_above_bound_percent"] for one in found]
    greedy = [one["greedy_above_bound_percent"] for one in found]
    against = f"as they come; {len(found)} instances"
    return [
        row("edge: above the LP's bound, worst, %", max(ours), max(greedy), against),
        row("edge: above the LP's bound, mean, %", fmean(ours), fmean(greedy), against),
        row("edge: us a job, worst", max(one["priced_us"] for one in found), 0, "-"),
    ]


def measured() -> Iterator[Figures]:
    for sources, nodes in WORLDS:
        for load in LOADS:
            for seed in SEEDS:
                yield figures_of((sources, nodes), load, seed)


def figures_of(size: tuple[int, int], load: float, seed: int) -> Figures:
    world = instance(*size, load, seed)
    started = perf_counter()
    planned = plan(*world)
    plan_s = perf_counter() - started
    priced, priced_us = timed(lambda: assign(*world, planned))
    greedy, greedy_us = timed(lambda: as_they_come(*world))
    return {
        "sources": size[0],
        "nodes": size[1],
        "load": load,
        "seed": seed,
        "priced_above_bound_percent": above(world, priced, planned.bound),
        "greedy_above_bound_percent": above(world, greedy, planned.bound),
        "priced_us": round(priced_us, 1),
        "greedy_us": round(greedy_us, 1),
        "plan_s": round(plan_s, 2),
    }


def above(world: World, served: list[int | None], bound: float) -> float:
    total = cost(*world, served)
    return math.inf if total is None else round(100 * (total / bound - 1), 2)


def main() -> None:
    for number, figures in enumerate(measured()):
        if number == 0:
            print(" ".join(figures))
        print(" ".join(f"{value:>{len(name)}}" for name, value in figures.items()), flush=True)


if __name__ == "__main__":
    main()
