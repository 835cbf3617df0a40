"""In small worlds a gang is placed if and only if it can be; names and units decide nothing."""

import itertools
import random
from collections.abc import Callable, Sequence

import msgspec
import pytest

from services.scheduler import native_pool
from services.scheduler.native_pool import NativePool
from services.scheduler.pool import SCORES, Pool, PythonPool
from services.scheduler.shapes import Free, Machine, Shape, Spot, capacity

NATIVE = pytest.mark.skipif(not native_pool.available(), reason="leptonic_placement is not built")
POOLS = (PythonPool, pytest.param(NativePool, marks=NATIVE))
Make = Callable[[str, int], Pool]
WORLDS = 400
GPUS = ((0, 0), (1, 300), (1, 500), (1, 700), (1, 1000), (2, 1000), (3, 1000))


def some_world(draw: random.Random) -> list[Machine]:
    names = draw.sample("abcdef", draw.randint(1, 3))
    return [
        Machine(name, draw.randint(1, 6) * 1000, draw.randint(1, 6) * 100, draw.randint(0, 4))
        for name in names
    ]


def some_shape(draw: random.Random) -> Shape:
    return Shape(draw.randint(0, 3) * 1000, draw.randint(0, 2) * 100, *draw.choice(GPUS))


def filled(make: Make, policy: str, draw: random.Random, machines: list[Machine]) -> Pool:
    """A few shapes taken where the policy puts them, so that what is left is ragged."""
    pool = make(policy, draw.randint(0, 9))
    for machine in machines:
        pool.join(machine)
        pool.open(machine.node, True)
    pool.learn([(some_shape(draw), 2), (some_shape(draw), 1)])
    for _ in range(draw.randint(0, 4)):
        shape = some_shape(draw)
        if spot := pool.find(shape):
            pool.take(shape, spot)
    return pool


def ways(free: Free, shape: Shape) -> list[Free]:
    """Everything that can be left after one worker, on any GPUs: as multisets, not as numbers."""
    if shape.cpu_milli > free.cpu_milli or shape.memory_mib > free.memory_mib:
        return []
    left = set()
    for gpus in itertools.combinations(range(len(free.gpus)), shape.gpus):
        if all(free.gpus[i] >= shape.gpu_milli for i in gpus):
            taken = (g - shape.gpu_milli * (i in gpus) for i, g in enumerate(free.gpus))
            left.add(tuple(sorted(taken)))
    cpu_milli, memory_mib = free.cpu_milli - shape.cpu_milli, free.memory_mib - shape.memory_mib
    return [Free(cpu_milli, memory_mib, gpus) for gpus in left]


def holds(free: Free, shape: Shape, workers: int) -> bool:
    """By trying every way."""
    return not workers or any(holds(left, shape, workers - 1) for left in ways(free, shape))


def fewest(frees: Sequence[Free], shape: Shape, workers: int) -> int | None:
    """Nodes that hold them all, by trying every set of nodes and every division."""
    most = [max(n for n in range(workers + 1) if holds(free, shape, n)) for free in frees]
    for count in range(1, len(frees) + 1):
        for nodes in itertools.combinations(most, count):
            shares = itertools.product(*(range(node + 1) for node in nodes))
            if any(sum(share) == workers for share in shares):
                return count
    return None


def nodes_of(spots: list[Spot] | None) -> int | None:
    return None if spots is None else len({spot.node for spot in spots})


def check_taken(pool: Pool, shape: Shape, spots: list[Spot], workers: int) -> None:
    """Whatever was found can be taken, all of it."""
    assert len(spots) == workers
    for spot in spots:
        pool.take(shape, spot)


@pytest.mark.parametrize("make", POOLS)
@pytest.mark.parametrize("policy", SCORES)
def test_a_gang_is_placed_if_and_only_if_it_can_be(make: Make, policy: str) -> None:
    draw = random.Random(policy)
    placed = 0
    for _ in range(WORLDS):
        machines = some_world(draw)
        pool = filled(make, policy, draw, machines)
        shape, workers, one_node = some_shape(draw), draw.randint(1, 8), draw.random() < 0.5
        frees = [pool.free(machine.node) for machine in machines]
        empty = [capacity(machine) for machine in machines]
        stays = one_node or (shape.gpus and any(holds(free, shape, workers) for free in empty))
        if stays:
            expected = 1 if any(holds(free, shape, workers) for free in frees) else None
        else:
            expected = fewest(frees, shape, workers)
        found = pool.find_gang(shape, workers, one_node)
        assert nodes_of(found) == expected, (machines, frees, shape, workers, one_node)
        could = fewest(empty, shape, workers)
        assert pool.fits_empty(shape, workers, one_node) == (
            could == 1 or bool(could and not one_node)
        )
        if found is not None:
            check_taken(pool, shape, found, workers)
            placed += 1
    assert WORLDS // 8 < placed < WORLDS


def placements(
    make: Make,
    policy: str,
    seed: int,
    change: Callable[[Machine], Machine],
    scale: Callable[[Shape], Shape],
) -> list[tuple[int, tuple[int, ...]] | None]:
    """Where a stream of shapes goes: nodes by their place in the order of names."""
    draw = random.Random(seed)
    machines = sorted(some_world(draw), key=lambda machine: machine.node)
    machines += [msgspec.structs.replace(machine, node=machine.node + "+") for machine in machines]
    pool = make(policy, 1)
    machines = sorted(map(change, machines), key=lambda machine: machine.node)
    for machine in machines:
        pool.join(machine)
        pool.open(machine.node, True)
    pool.learn([(scale(some_shape(draw)), 3), (scale(some_shape(draw)), 1)])
    order = [machine.node for machine in machines]
    gone: list[tuple[int, tuple[int, ...]] | None] = []
    for _ in range(12):
        shape = scale(some_shape(draw))
        spot = pool.find(shape)
        if spot:
            pool.take(shape, spot)
        gone.append((order.index(spot.node), spot.gpus) if spot else None)
    return gone


@pytest.mark.parametrize("make", POOLS)
@pytest.mark.parametrize("policy", [name for name in SCORES if name != "random"])
def test_names_that_keep_their_order_decide_nothing(make: Make, policy: str) -> None:
    def renamed(machine: Machine) -> Machine:
        return msgspec.structs.replace(machine, node=f"node-{machine.node}")

    for seed in range(30):
        as_they_are = placements(make, policy, seed, lambda m: m, lambda s: s)
        assert placements(make, policy, seed, renamed, lambda s: s) == as_they_are


@pytest.mark.parametrize("make", POOLS)
def test_units_of_cpu_and_memory_decide_nothing(make: Make) -> None:
    """FGD compares amounts and nothing else; best fit and dot product have a unit of their own."""

    def scaled(machine: Machine) -> Machine:
        cpu_milli, memory_mib = 7 * machine.cpu_milli, 3 * machine.memory_mib
        return msgspec.structs.replace(machine, cpu_milli=cpu_milli, memory_mib=memory_mib)

    def scaled_shape(shape: Shape) -> Shape:
        cpu_milli, memory_mib = 7 * shape.cpu_milli, 3 * shape.memory_mib
        return msgspec.structs.replace(shape, cpu_milli=cpu_milli, memory_mib=memory_mib)

    for seed in range(30):
        as_they_are = placements(make, "fgd", seed, lambda m: m, lambda s: s)
        assert placements(make, "fgd", seed, scaled, scaled_shape) == as_they_are


@pytest.mark.parametrize("make", POOLS)
@pytest.mark.parametrize("policy", SCORES)
def test_answers_follow_from_what_is_taken_not_from_how_it_came(make: Make, policy: str) -> None:
    """A pool that was asked, took and gave back answers as a fresh one with the same taken."""
    for seed in range(30):
        draw = random.Random(seed)
        machines = [*some_world(draw), Machine("z", 9000, 900, 4)]
        old, fresh = make(policy, 3), make(policy, 3)
        typical = [(some_shape(draw), 3), (some_shape(draw), 1)]
        for pool, order in ((old, machines), (fresh, machines[::-1])):
            pool.learn(typical)
            for machine in order:
                pool.join(machine)
                pool.open(machine.node, True)
        kept = []
        for _ in range(20):
            shape = some_shape(draw)
            if spot := old.find(shape):
                old.take(shape, spot)
                kept.append((shape, spot))
            if kept and draw.random() < 0.5:
                old.release(*kept.pop(draw.randrange(len(kept))))
        for shape, spot in draw.sample(kept, len(kept)):
            fresh.take(shape, spot)
        for gpus, milli in GPUS:
            asked = Shape(500, 50, gpus, milli)
            assert old.find(asked) == fresh.find(asked)
            assert old.find_gang(asked, 3, False) == fresh.find_gang(asked, 3, False)
