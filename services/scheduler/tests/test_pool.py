"""The pool by examples: what fits where, which node and GPU a policy takes, and gangs."""

import msgspec
import pytest

from services.scheduler import scores
from services.scheduler.pool import PythonPool
from services.scheduler.shapes import Free, Machine, Shape, Spot, room

HALF = Shape(1000, 0, 1, 500)
WHOLE = Shape(1000, 0, 1, 1000)
FOUR = Shape(4000, 0, 4, 1000)


def pool_of(*machines: Machine, policy: str = "fgd") -> PythonPool:
    pool = PythonPool(policy)
    for machine in machines:
        pool.join(machine)
        pool.open(machine.node, True)
    return pool


def eight(node: str, gpus: int = 8) -> Machine:
    return Machine(node, 64_000, 65_536, gpus, "V100")


def test_only_open_nodes_that_admit_a_shape_take_it() -> None:
    pool = pool_of(eight("a"), Machine("b", 64_000, 65_536, 8, "T4", ("train",), (("zone", "x"),)))
    assert pool.find(Shape(1, 1, 1, 1000, gpu_models=("T4",))) == Spot("b", (0,))
    assert pool.find(Shape(1, 1, kind="train")) == Spot("b")
    assert pool.find(Shape(1, 1, labels=(("zone", "x"),))) == Spot("b")
    assert pool.find(Shape(1, 1, labels=(("zone", "y"),))) is None
    assert pool.find(Shape(1, 1, kind="serve")) is None
    pool.open("b", False)
    assert pool.find(Shape(1, 1, kind="train")) is None


def test_taking_more_than_there_is_is_our_mistake() -> None:
    pool = pool_of(eight("a"))
    pool.take(HALF, Spot("a", (3,)))
    with pytest.raises(AssertionError):
        pool.take(WHOLE, Spot("a", (3,)))


def test_a_node_that_holds_work_cannot_leave() -> None:
    pool = pool_of(eight("a"))
    pool.take(HALF, Spot("a", (3,)))
    with pytest.raises(AssertionError):
        pool.leave("a")


def test_best_fit_takes_the_fullest_node_and_gpu() -> None:
    pool = pool_of(eight("a"), eight("b"), policy="best_fit")
    pool.take(HALF, Spot("b", (5,)))
    assert pool.find(HALF) == Spot("b", (5,))


def test_fgd_keeps_whole_gpus_whole() -> None:
    pool = pool_of(eight("a"), eight("b"))
    pool.learn([(WHOLE, 3), (HALF, 1)])
    pool.take(HALF, Spot("b", (5,)))
    assert pool.find(HALF) == Spot("b", (5,))


def test_a_gang_that_fits_one_node_waits_for_one() -> None:
    pool = pool_of(eight("a"), eight("b"))
    for node in "ab":
        pool.take(FOUR, Spot(node, (0, 1, 2, 3)))
    pool.take(WHOLE, Spot("a", (4,)))
    assert pool.find_gang(WHOLE, 4, one_node=False) == [Spot("b", (i,)) for i in (4, 5, 6, 7)]
    pool.take(WHOLE, Spot("b", (4,)))
    assert pool.find_gang(WHOLE, 4, one_node=False) is None


def test_a_larger_gang_spreads_over_the_fewest_nodes() -> None:
    pool = pool_of(eight("a", 4), eight("b"), eight("c", 2))
    found = pool.find_gang(WHOLE, 10, one_node=False)
    assert found is not None
    assert [spot.node for spot in found] == ["b"] * 8 + ["c"] * 2
    assert pool.find_gang(WHOLE, 10, one_node=True) is None
    assert pool.fits_empty(WHOLE, 14, one_node=False)
    assert not pool.fits_empty(WHOLE, 15, one_node=False)
    assert not pool.fits_empty(WHOLE, 9, one_node=True)


def test_who_is_to_be_spread_goes_where_the_least_is_used_of_what_is_used_most() -> None:
    """Shares count and not amounts, whatever the policy: of `a` an eighth of the GPUs is used, of
    `b` a quarter of the memory."""
    half = msgspec.structs.replace(HALF, spread=True)
    pool = pool_of(eight("a"), Machine("b", 640_000, 4096, 8, "V100"), policy="best_fit")
    pool.take(WHOLE, Spot("a", (0,)))
    pool.take(Shape(0, 1024), Spot("b"))
    assert pool.find(half) == Spot("a", (1,))
    assert pool.find(HALF) == Spot("a", (1,))
    pool.take(half, Spot("a", (1,)))
    pool.take(Shape(0, 20_000), Spot("a"))
    assert pool.find(half) == Spot("b", (0,))
    assert pool.find(HALF) == Spot("a", (1,))
    assert pool.find_gang(msgspec.structs.replace(FOUR, spread=True), 2, False) == [
        Spot("b", (0, 1, 2, 3)),
        Spot("b", (4, 5, 6, 7)),
    ]


def test_parts_of_gpus_make_a_gang() -> None:
    pool = pool_of(eight("a", 2))
    found = pool.find_gang(Shape(1, 1, 1, 300), 6, one_node=True)
    assert found is not None
    assert sorted(spot.gpus for spot in found) == [(0,)] * 3 + [(1,)] * 3
    assert pool.find_gang(Shape(1, 1, 1, 300), 7, one_node=True) is None


def test_a_trial_changes_nothing() -> None:
    pool = pool_of(eight("a"))
    held = [(FOUR, Spot("a", (0, 1, 2, 3))), (FOUR, Spot("a", (4, 5, 6, 7)))]
    for shape, spot in held:
        pool.take(shape, spot)
    before = pool.free("a")
    assert pool.try_without(held[:1], FOUR, 1, one_node=True) == [Spot("a", (0, 1, 2, 3))]
    assert pool.try_without(held[:1], FOUR, 2, one_node=True) is None
    assert pool.free("a") == before
    assert pool.find(WHOLE) is None


def test_a_node_that_changes_keeps_what_it_holds() -> None:
    pool = pool_of(eight("a"))
    pool.take(FOUR, Spot("a", (0, 1, 2, 3)))
    pool.change(Machine("a", 5000, 100, 6))
    assert pool.free("a") == Free(1000, 100, (0, 0, 0, 0, 1000, 1000))
    with pytest.raises(AssertionError):
        pool.change(Machine("a", 5000, 100, 3))


def test_room_counts_parts_of_each_gpu() -> None:
    free = Free(10_000, 10_000, (1000, 700, 299))
    assert room(free, Shape(1, 1, 1, 300)) == 5
    assert room(free, Shape(4000, 1, 1, 300)) == 2
    assert room(free, Shape(1, 1, 2, 1000)) == 0


def test_a_fragment_is_what_the_typical_shapes_cannot_use() -> None:
    """By hand: 700 milli are too few for a whole GPU, and no GPU is enough for four."""
    known = scores.fragments([(WHOLE, 1), (FOUR, 2), (Shape(1, 1), 4)])
    left = Free(64_000, 0, (1000, 1000, 700))
    assert known.fragment(eight("a"), left) == 1 * 700 + 2 * 2700 + 4 * 2700


def test_a_gradient_is_scored_by_the_sigmoid_in_hundredths() -> None:
    """sigmoid(0) is exactly a half; one GPU less of fragments is 1 / (1 + 1/e) = .731."""
    known = scores.fragments([(WHOLE, 7)])
    assert known.score(0) == 50
    assert known.score(7 * 1000) == 73
    assert known.score(-7 * 1000) == 26
