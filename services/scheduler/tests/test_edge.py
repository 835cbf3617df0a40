"""Proves that no node serves more than it can, that a source is left out only when no node has
room, that the bound is one (by every way to serve small worlds, and by its own dual), and that
deciding by prices comes close to it."""

from itertools import product

import pytest

from bench.edge import instance
from services.scheduler.edge import (
    COST,
    EdgeNode,
    Serving,
    Source,
    as_they_come,
    assign,
    cost,
    costs,
    plan,
)

SEEDS = range(6)


def loads(sources: list[Source], nodes: list[EdgeNode], served: list[int | None]) -> list[int]:
    return [
        sum(source.demand for source, at in zip(sources, served, strict=True) if at == n)
        for n in range(len(nodes))
    ]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_node_serves_more_than_it_can(seed: int) -> None:
    """Where three quarters of the sources are more than there is room for, too."""
    sources, nodes = instance(60, 6, 1.3, seed)
    for served in (assign(sources, nodes, plan(sources, nodes)), as_they_come(sources, nodes)):
        at_work = loads(sources, nodes, served)
        assert all(load <= node.capacity for load, node in zip(at_work, nodes, strict=True))
        assert None in served
        left = [node.capacity - load for load, node in zip(at_work, nodes, strict=True)]
        unserved = [one for one, at in zip(sources, served, strict=True) if at is None]
        assert all(source.demand > max(left) for source in unserved)


@pytest.mark.parametrize("seed", range(20))
def test_small_worlds_by_every_way_to_serve_them(seed: int) -> None:
    sources, nodes = instance(6, 3, 0.6, seed)
    ways = product(range(len(nodes)), repeat=len(sources))
    able = [list(way) for way in ways if fits(sources, nodes, list(way))]
    best = min(found for way in able if (found := cost(sources, nodes, way)) is not None)
    planned = plan(sources, nodes)
    assert planned.bound <= best * (1 + 1e-6)
    found = cost(sources, nodes, assign(sources, nodes, planned))
    assert found is None or found >= best


def fits(sources: list[Source], nodes: list[EdgeNode], way: list[int | None]) -> bool:
    at_work = loads(sources, nodes, way)
    return all(load <= node.capacity for load, node in zip(at_work, nodes, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bound_is_what_its_prices_say(seed: int) -> None:
    """Lagrange: with any prices, each source at its cheapest node less what capacity earns is a
    lower bound; with these it is the bound itself, over all pairs, not only those looked at."""
    sources, nodes = instance(200, 12, 0.9, seed)
    planned = plan(sources, nodes)
    cheapest = (costs(sources, nodes) + list(planned.prices)).min(axis=1)
    paid = sum(int(least) * one.demand for least, one in zip(cheapest, sources, strict=True))
    earned = sum(p * node.capacity for p, node in zip(planned.prices, nodes, strict=True))
    assert paid - earned == pytest.approx(planned.bound, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_prices_come_within_a_hundredth_of_the_bound(seed: int) -> None:
    sources, nodes = instance(600, 15, 0.9, seed)
    planned = plan(sources, nodes)
    priced = cost(sources, nodes, assign(sources, nodes, planned))
    greedy = cost(sources, nodes, as_they_come(sources, nodes))
    assert priced is not None
    assert greedy is not None
    assert planned.bound <= priced <= 1.01 * planned.bound < greedy


def test_a_price_keeps_room_for_who_needs_it_most() -> None:
    """Both would rather have the near node; who comes first costs the other one 90 ms."""
    nodes = [EdgeNode("near", 10), EdgeNode("far", 10)]
    can_go, cannot = Source("a", 10, (1_000, 2_000)), Source("b", 10, (1_000, 91_000))
    assert as_they_come([can_go, cannot], nodes) == [0, 1]
    planned = plan([can_go, cannot], nodes)
    assert assign([can_go, cannot], nodes, planned) == [1, 0]
    assert planned.bound == pytest.approx(10 * COST * (1_000 + 2_000) // 10)


def test_who_comes_later_is_decided_for_by_the_same_prices() -> None:
    """The near node's price is what moving the one that is half on it saves: 40 ms."""
    nodes = [EdgeNode("near", 15), EdgeNode("far", 15)]
    split = Source("c", 10, (1_000, 41_000))
    can_go, cannot = Source("a", 5, (1_000, 2_000)), Source("b", 10, (1_000, 91_000))
    planned = plan([can_go, cannot, split], nodes)
    assert list(planned.prices) == pytest.approx([40_000 * COST // 15, 0])
    serving = Serving(nodes, planned.prices)
    assert [serving.serve(can_go), serving.serve(cannot)] == [1, 0]


def test_what_a_source_had_is_free_when_it_goes() -> None:
    nodes = [EdgeNode("near", 10), EdgeNode("far", 10)]
    serving, source = Serving(nodes), Source("a", 10, (1_000, 2_000))
    assert [serving.serve(source) for _ in range(3)] == [0, 1, None]
    serving.release(10, 0)
    assert serving.serve(source) == 0
    with pytest.raises(AssertionError):
        Serving(nodes).release(1, 0)


def test_the_same_world_is_served_the_same_way() -> None:
    sources, nodes = instance(100, 8, 0.9, 1)
    assert instance(100, 8, 0.9, 1) == (sources, nodes)
    assert assign(sources, nodes, plan(sources, nodes)) == assign(
        sources, nodes, plan(sources, nodes)
    )
