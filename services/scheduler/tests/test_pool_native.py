"""The native pool answers as the Python one, step by step, over random walks and all policies."""

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler import native_pool
from services.scheduler.pool import SCORES, PythonPool
from services.scheduler.scores import CPU_UNIT, Prices
from services.scheduler.shapes import Machine, Shape, Spot, capacity

pytestmark = pytest.mark.skipif(
    not native_pool.available(), reason="leptonic_placement is not built"
)
NAMES = [f"n{i}" for i in (3, 1, 12, 2, 0, 7)]
MODELS = ("T4", "V100")
ZONES = ((), (("zone", "x"),))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """A worker without, with a part of, or with whole GPUs."""
    gpus, milli = draw(
        st.sampled_from([(0, 0), (1, 100), (1, 330), (1, 500), (1, 1000), (2, 1000), (4, 1000)])
    )
    return Shape(
        cpu_milli=draw(st.sampled_from([0, 500, 1000, 4000, 7000])),
        memory_mib=draw(st.sampled_from([0, 100, 900])),
        gpus=gpus,
        gpu_milli=milli,
        gpu_models=draw(st.sampled_from([(), (), ("T4",), MODELS])),
        kind=draw(st.sampled_from(["", "", "train"])),
        labels=draw(st.sampled_from([(), *ZONES])),
        spread=draw(st.sampled_from([False, False, True])),
    )


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    return Machine(
        node=draw(st.sampled_from(NAMES)),
        cpu_milli=draw(st.sampled_from([2000, 8000, 16_000, 200_000])),
        memory_mib=draw(st.sampled_from([100, 2000, 4000])),
        gpus=draw(st.sampled_from([0, 1, 2, 4, 8])),
        gpu_model=draw(st.sampled_from(MODELS)),
        kinds=draw(st.sampled_from([(), ("train",), ("serve", "train")])),
        labels=draw(st.sampled_from(ZONES)),
    )


@st.composite
def prices(draw: st.DrawFn) -> Prices:
    models = tuple(draw(st.sampled_from([(), ("T4",), MODELS])))
    worths = st.lists(st.integers(0, 1_200_000), min_size=2, max_size=11)
    parts = st.lists(st.integers(0, 1_000_000), min_size=1, max_size=6)
    return Prices(
        models=models,
        gpu=tuple(tuple(sorted(draw(worths))) for _ in models),
        cpu=tuple(tuple(draw(parts)) for _ in models),
        memory=tuple(tuple(draw(parts)) for _ in models),
        cpu_step=draw(st.integers(1, 5000)),
        memory_step=draw(st.integers(1, 900)),
    )


STEPS = st.one_of(
    st.tuples(st.just("join"), machines()),
    st.tuples(st.just("join"), machines()),
    st.tuples(st.just("leave"), st.sampled_from(NAMES)),
    st.tuples(st.just("change"), machines()),
    st.tuples(st.just("open"), st.sampled_from(NAMES), st.booleans()),
    st.tuples(st.just("learn"), st.lists(st.tuples(shapes(), st.integers(1, 9)), max_size=4)),
    st.tuples(st.just("price"), prices()),
    st.tuples(st.just("place"), shapes(), st.integers(1, 9), st.booleans()),
    st.tuples(st.just("place"), shapes(), st.just(1), st.booleans()),
    st.tuples(st.just("finish"), st.integers(0, 99)),
    st.tuples(st.just("try"), shapes(), st.integers(1, 4), st.integers(0, 99)),
)


class Twins:
    """Both pools, driven alike; every answer is compared."""

    def __init__(self, policy: str) -> None:
        self.pools = (PythonPool(policy, 7), native_pool.NativePool(policy, 7))
        self.placed: list[list[tuple[Shape, Spot]]] = []

    def both(self, ask: Callable[[Any], Any]) -> Any:
        python, native = (ask(pool) for pool in self.pools)
        assert python == native
        return python

    def join(self, machine: Machine) -> None:
        if machine.node not in self.pools[0].nodes:
            self.both(lambda pool: pool.join(machine))
            self.both(lambda pool: pool.open(machine.node, True))

    def leave(self, node: str) -> None:
        if node in self.pools[0].nodes and not any(s.node == node for s in self.spots()):
            self.both(lambda pool: pool.leave(node))

    def spots(self) -> list[Spot]:
        return [spot for gang in self.placed for _, spot in gang]

    def change(self, machine: Machine) -> None:
        if machine.node in self.pools[0].nodes:
            old = self.pools[0].nodes[machine.node].machine
            more = max(old.cpu_milli, machine.cpu_milli), max(old.memory_mib, machine.memory_mib)
            gpus = max(old.gpus, machine.gpus)
            grown = msgspec.structs.replace(
                machine, cpu_milli=more[0], memory_mib=more[1], gpus=gpus
            )
            self.both(lambda pool: pool.change(grown))

    def open(self, node: str, is_open: bool) -> None:
        if node in self.pools[0].nodes:
            self.both(lambda pool: pool.open(node, is_open))

    def learn(self, typical: list[tuple[Shape, int]]) -> None:
        self.both(lambda pool: pool.learn(typical))

    def price(self, plan: Prices) -> None:
        self.both(lambda pool: pool.price(plan))

    def place(self, shape: Shape, workers: int, one_node: bool) -> None:
        self.both(lambda pool: pool.fits_empty(shape, workers, one_node))
        self.both(lambda pool: pool.find(shape))
        found = self.both(lambda pool: pool.find_gang(shape, workers, one_node))
        if found:
            self.placed.append([(shape, spot) for spot in found])
            for spot in found:
                self.take(shape, spot)

    def take(self, shape: Shape, spot: Spot) -> None:
        self.both(lambda pool: pool.take(shape, spot))

    def release(self, shape: Shape, spot: Spot) -> None:
        self.both(lambda pool: pool.release(shape, spot))

    def finish(self, which: int) -> None:
        if self.placed:
            for shape, spot in self.placed.pop(which % len(self.placed)):
                self.release(shape, spot)

    def try_(self, shape: Shape, workers: int, which: int) -> None:
        releases = self.placed[which % len(self.placed)] if self.placed else []
        self.both(lambda pool: pool.try_without(releases, shape, workers, one_node=False))

    def compare(self) -> None:
        for node in self.pools[0].nodes:
            self.compare_node(node)

    def compare_node(self, node: str) -> None:
        self.both(lambda pool: pool.free(node))


@pytest.mark.parametrize("policy", SCORES)
@given(steps=st.lists(STEPS, max_size=60))
@settings(max_examples=150, deadline=None)
def test_both_answer_alike(policy: str, steps: list[tuple[Any, ...]]) -> None:
    twins = Twins(policy)
    for name, *arguments in steps:
        getattr(twins, "try_" if name == "try" else name)(*arguments)
        twins.compare()


PLACED = (
    Shape(1000, 100, 1, 500),
    Shape(1000, 0, 1, 330),
    Shape(3000, 300, 1, 1000),
    Shape(4000, 0, 2, 1000),
    Shape(500, 900),
)
PLAN = Prices(
    models=("T4",),
    gpu=((0, 100_000, 350_000, 500_000, 1_000_000),),
    cpu=((0, 600_000, 900_000, 1_000_000),),
    memory=((0, 900_000, 1_000_000),),
    cpu_step=2000,
    memory_step=300,
)
MIXES = (
    [(PLACED[0], 4), (PLACED[2], 3), (PLACED[3], 1)],
    [(PLACED[3], 5), (PLACED[1], 1)],
)


def walk(twins: Twins, names: list[str], steps: int, draw: random.Random) -> None:
    """Workers and gangs come and end, nodes are shut and opened."""
    for _ in range(steps):
        gang = draw.choice((1, 1, 1, 3))
        twins.place(draw.choice(PLACED), gang, draw.random() < 0.5)
        if draw.random() < 0.45:
            twins.finish(draw.randrange(99))
        if draw.random() < 0.2:
            twins.open(draw.choice(names), draw.random() < 0.7)
    twins.compare()


@pytest.mark.parametrize("policy", SCORES)
def test_nodes_that_are_alike_are_told_apart_by_name(policy: str) -> None:
    """Of two kinds, so that most of the time several share what is free; and come to share it by
    different ways, with other GPUs taken. What is learned on the way counts at once."""
    twins, draw = Twins(policy), random.Random(policy)
    names = [f"n{i:02}" for i in range(12)]
    for name in draw.sample(names, len(names)):
        twins.join(Machine(name, 16_000, 2000, 4, MODELS[int(name[1:]) % 2]))
    for mix, model in zip(MIXES, MODELS, strict=True):
        twins.learn(mix)
        twins.price(msgspec.structs.replace(PLAN, models=(model,)))
        walk(twins, names, 100, draw)


@pytest.mark.parametrize("policy", ["best_fit", "fgd", "priced"])
def test_nodes_that_all_differ_are_each_looked_at(policy: str) -> None:
    """More of them than there is room for at first, and between two questions comes one more."""
    twins, draw = Twins(policy), random.Random(policy)
    names = [f"n{i:02}" for i in range(90)]
    twins.learn([(PLACED[0], 4), (PLACED[3], 1)])
    twins.price(PLAN)
    for part in (names[::3], names[1::3], names[2::3]):
        for name in part:
            twins.join(Machine(name, 4000 + 97 * int(name[1:]), 2000, 2, MODELS[int(name[1:]) % 2]))
            twins.place(draw.choice(PLACED), 1, False)
        walk(twins, part, 30, draw)


def test_many_names_in_any_order_keep_their_order() -> None:
    """Ties go to the first name, also of nodes that differ in what best fit does not look at;
    between two names that come one after the other there are more joins than the numbers between
    them."""
    twins = Twins("best_fit")
    names = ["a", "z"] + ["a" + "b" * i for i in range(80, 0, -1)] + ["y" * i for i in range(1, 90)]
    for i, name in enumerate(names):
        twins.join(Machine(name, 1000, 1000 + i % 3))
    taken = []
    while spot := twins.both(lambda pool: pool.find(Shape(1000, 0))):
        twins.take(Shape(1000, 0), spot)
        taken.append(spot.node)
    assert taken == sorted(names)


def test_a_score_below_zero_is_rounded_down() -> None:
    """More is free than best fit's largest node has: a hair below 0 is no tie with 0, which would
    go to the first name."""
    twins = Twins("best_fit")
    twins.join(Machine("a", 2 * CPU_UNIT + 1, 0))
    twins.join(Machine("b", 2 * CPU_UNIT, 0))
    twins.place(Shape(0, 0), 1, False)
    assert twins.spots() == [Spot("b")]


def test_a_worth_that_grows_is_rounded_down_too() -> None:
    """By a plan to which two GPUs have too little CPU and one has enough: a thousandth of a GPU is
    won on the first node, lost on the second, and which has less left decides nothing."""
    twins = Twins("priced")
    parts = {"gpu": ((0, 1_000_000),), "cpu": ((0, 0, 1000),), "memory": ((1_000_000,),)}
    twins.price(Prices(models=("T4",), **parts, cpu_step=1000, memory_step=1))
    for name, gpus in (("a", 2), ("b", 1)):
        twins.join(Machine(name, 2000, 0, gpus, "T4"))
    twins.place(Shape(0, 0, 1, 1000), 1, False)
    assert twins.spots() == [Spot("a", (0,))]


def test_what_nodes_hold_tells_them_apart_where_as_much_is_free() -> None:
    twins = Twins("clustering")
    for name in "ab":
        twins.join(Machine(name, 8000, 800, 4))
    twins.take(Shape(2000, 0, 2, 1000), Spot("a", (0, 1)))
    for gpu in (0, 1):
        twins.take(Shape(1000, 0, 1, 1000), Spot("b", (gpu,)))
    twins.place(Shape(1000, 0, 1, 1000), 1, False)
    assert twins.spots() == [Spot("b", (2,))]


def test_forgetting_shapes_and_states_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_pool, "SHAPES_MAX", 3)
    twins = Twins("fgd")
    for name in NAMES:
        twins.join(Machine(name, 16_000, 4000, 4))
    twins.learn([(Shape(0, 0, 1, 500), 2), (Shape(1000, 0, 2, 1000), 1)])
    for i in range(40):
        twins.place(Shape(100 * (i % 7), 0, 1, 100 + 100 * (i % 5)), 1, False)
        twins.compare()


def test_more_than_there_is_is_refused_as_in_python() -> None:
    pool = native_pool.NativePool("fgd", 0)
    machine = Machine("a", 1000, 1000, 2)
    pool.join(machine)
    for shape, spot in [
        (Shape(2000, 0), Spot("a")),
        (Shape(0, 2000), Spot("a")),
        (Shape(0, 0, 1, 1000), Spot("a", (2,))),
        (Shape(0, 0, 2, 1000), Spot("a", (0, 0))),
        (Shape(0, 0, 2, 1000), Spot("a", (0,))),
    ]:
        with pytest.raises(AssertionError):
            pool.take(shape, spot)
        with pytest.raises(AssertionError):
            pool.release(Shape(1, 0), Spot("a"))
        assert pool.free("a") == capacity(machine)
    pool.take(Shape(0, 0, 1, 1), Spot("a", (1,)))
    with pytest.raises(AssertionError):
        pool.leave("a")
    with pytest.raises(AssertionError):
        pool.change(Machine("a", 1000, 1000, 1))
