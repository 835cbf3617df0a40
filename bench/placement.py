"""How fast the pool decides, over policies and sizes: `python -m bench.placement`.

A made-up cluster of openb's proportions is filled to 85 % of its GPUs; from there on workers come
one by one and others, chosen by lot, end. The policies take turns, a round each, and the median of
the rounds counts. The floor is what no row of scores can be read faster than: numpy's argmax over
one score a node. Times are of this thread's processor time, because the machine has other users.
"""

import gc
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from bench.rows import Row, row, show
from services.scheduler import planner
from services.scheduler.native_pool import NativePool
from services.scheduler.pool import Pool
from services.scheduler.shapes import Machine, Shape, Spot

SIZES = (1_213, 10_000, 100_000)
"""Nodes."""
ROUNDS, DECISIONS = 5, 4_000
"""Timed, of each policy, and in each."""
FILL_S, ROUND_S = 120.0, 10.0
"""At most: what is slower is measured on a cluster less full, over fewer decisions."""
POLICIES = ("best_fit", "fgd", "priced")
FULL = 0.85
SHAPES = 100
GANG_GPUS = 1024
KINDS = (
    (96, 2, "P100"),
    (64, 2, "T4"),
    (96, 8, "V100"),
    (128, 8, "G2"),
    (64, 4, "T4"),
    (104, 1, "A10"),
)
Held = list[tuple[Shape, Spot]]


def machines(nodes: int, draw: random.Random) -> Iterator[Machine]:
    for number in range(nodes):
        cores, gpus, model = draw.choice(KINDS)
        yield Machine(f"node-{number:06}", 1000 * cores, 4096 * cores, gpus, model)


def shapes(draw: random.Random) -> list[tuple[Shape, int]]:
    """As openb's: of every ten workers one without, four with a part of, five with whole GPUs."""
    drawn: dict[Shape, int] = {}
    while len(drawn) < SHAPES:
        cpu_milli = draw.choice((1000, 2000, 3000, 4000, 6000, 8000))
        gpus = draw.choices((0, 1, 1, 2, 4, 8), (10, 40, 35, 5, 5, 5))[0]
        part = draw.random() < 0.5
        gpu_milli = (10 * draw.randint(5, 95) if part and gpus == 1 else 1000) if gpus else 0
        shape = Shape(max(1, gpus) * cpu_milli, 2 * max(1, gpus) * cpu_milli, gpus, gpu_milli)
        drawn[shape] = draw.randint(1, 100) if gpus < 4 else draw.randint(1, 10)
    return list(drawn.items())


class World:
    """A pool at work."""

    def __init__(self, policy: str, nodes: int) -> None:
        self.draw = random.Random(nodes)
        self.pool: Pool = NativePool(policy, 1)
        known = list(machines(nodes, self.draw))
        for machine in known:
            self.pool.join(machine)
            self.pool.open(machine.node, True)
        self.typical = shapes(self.draw)
        self.pool.learn(self.typical)
        if policy == "priced":
            self.pool.price(planner.plan(known, self.typical).prices)
        self.milli = 1000 * sum(machine.gpus for machine in known)
        self.taken = 0
        self.held: Held = []
        self.coming = self.arrivals()

    def fill(self) -> None:
        until = time.thread_time() + FILL_S
        while self.taken < FULL * self.milli and time.thread_time() < until:
            self.place(next(self.coming))

    @property
    def full(self) -> float:
        return self.taken / self.milli

    def arrivals(self) -> Iterator[Shape]:
        kinds, weights = zip(*self.typical, strict=True)
        while True:
            yield from self.draw.choices(kinds, weights, k=1000)

    def place(self, shape: Shape) -> None:
        spot = self.pool.find(shape)
        if spot is not None:
            self.pool.take(shape, spot)
            self.held.append((shape, spot))
            self.taken += shape.gpus * shape.gpu_milli

    def make_room(self) -> None:
        while self.taken > FULL * self.milli:
            at = self.draw.randrange(len(self.held))
            self.held[at], self.held[-1] = self.held[-1], self.held[at]
            shape, spot = self.held.pop()
            self.pool.release(shape, spot)
            self.taken -= shape.gpus * shape.gpu_milli

    def times_us(self) -> list[float]:
        """Of each decision and its taking, ascending."""
        times: list[float] = []
        until = time.thread_time() + ROUND_S
        while len(times) < DECISIONS and time.thread_time() < until:
            shape = next(self.coming)
            started = time.thread_time_ns()
            self.place(shape)
            times.append((time.thread_time_ns() - started) / 1000)
            self.make_room()
        return sorted(times)


def floor_us(nodes: int) -> float:
    scores = np.random.default_rng(0).integers(0, 100, nodes)
    times = []
    for _ in range(200):
        started = time.thread_time_ns()
        scores.argmax()
        times.append(time.thread_time_ns() - started)
    return float(np.median(times)) / 1000


def decisions(nodes: int) -> Iterator[Row]:
    worlds = {policy: World(policy, nodes) for policy in POLICIES}
    for world in worlds.values():
        world.fill()
    gc.freeze()  # the workers that this program remembers are none of the pool's
    rounds: dict[str, list[list[float]]] = {policy: [] for policy in POLICIES}
    for _ in range(ROUNDS):
        for policy, world in worlds.items():
            rounds[policy].append(world.times_us())
    gc.unfreeze()
    floor = floor_us(nodes)
    for policy, of_policy in rounds.items():
        yield row_of(policy, nodes, of_policy, floor, worlds[policy].full)


def row_of(
    policy: str, nodes: int, rounds: Sequence[Sequence[float]], floor: float, full: float
) -> Row:
    means = [sum(times) / len(times) for times in rounds]
    p50 = median(times[len(times) // 2] for times in rounds)
    p99 = median(times[len(times) * 99 // 100] for times in rounds)
    slowest, fastest = 1e6 / max(means), 1e6 / min(means)
    against = (
        f"argmax of a row; p50 {p50:.1f} us, p99 {p99:.1f} us; {len(rounds)} rounds "
        f"{slowest:,.0f} to {fastest:,.0f}; {100 * full:.0f} % full"
    )
    what = f"placements/s, {policy}, {nodes:,} nodes"
    return row(what, 1e6 / median(means), 1e6 / floor, against, 0)


def gangs(nodes: int) -> Iterator[Row]:
    """On a cluster that is half empty, whole nodes of it; and more than there is."""
    pool = NativePool("fgd", 1)
    known = list(machines(nodes, random.Random(nodes)))
    for number, machine in enumerate(known):
        pool.join(machine)
        pool.open(machine.node, True)
        if number % 2:
            pool.take(Shape(1000, 1000, 1, 500), Spot(machine.node, (0,)))
    worker, floor = Shape(8000, 16_000, 8, 1000), floor_us(nodes)
    for what, workers in ("gang of 1,024 GPUs", GANG_GPUS // 8), ("no room for it", nodes):
        started = time.thread_time_ns()
        fits = pool.fits_empty(worker, workers, one_node=False)
        found = pool.find_gang(worker, workers, one_node=False) if fits else None
        took_us = (time.thread_time_ns() - started) / 1000
        assert (found is not None) == (workers < nodes)
        yield row(f"{what}, {nodes:,} nodes, us", took_us, floor, "argmax of a row", 1)


def measured() -> Iterator[Row]:
    for nodes in SIZES:
        yield from decisions(nodes)
    yield from gangs(10_000)


def rows(_: Path) -> list[Row]:
    return list(measured())


if __name__ == "__main__":
    show(measured())
