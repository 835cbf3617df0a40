"""Edge placement: which node serves which source.

A source s sends so much work, its demand, and reaches node n in L(s, n) microseconds; the node
serves at most C(n). A unit of the work costs D = L / C there: a far node is slow, and so is a small
one. Every source is served whole by one node. Wanted, with x = 1 where node n serves source s:

    min sum of s, n: demand(s) D(s, n) x(s, n)
    so that   sum of n: x(s, n) = 1               for every source
              sum of s: demand(s) x(s, n) <= C(n)   for every node

With x >= 0 instead of whole ones it is a linear program: the bound, and the prices of the nodes'
capacity (its duals). The decision is greedy: every source, the largest first, goes where D plus the
price is least and there is room. The price is what keeps near, large nodes free for those who need
them most; taking them as they come costs a quarter to a half more than the bound.

Few of a program's sources x nodes are ever used: it is solved over each source's cheapest nodes,
and those that its prices show to be cheaper are added until there is none (column generation).
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array

COST = 1_000_000
"""D is in millionths, an integer."""
CHEAPEST = 4
"""Nodes of each source to begin with."""
ADDED = 3
"""At most, of each source, in a round."""
UNSERVED = 8
"""Times the dearest D: what it costs in the program to serve a unit nowhere."""
CLOSE = 1e-9
SHARES = 1024
"""Of equal nodes the one that has more of the source in the program: in parts of so many."""

Matrix = Any
"""A numpy array, sources x nodes."""


class Source(msgspec.Struct, frozen=True):
    source: str
    demand: int
    latency_us: tuple[int, ...]
    """To every node, in the nodes' order."""


class EdgeNode(msgspec.Struct, frozen=True):
    node: str
    capacity: int


class Plan(msgspec.Struct, frozen=True):
    prices: tuple[int, ...]
    """Of a unit of every node, in millionths."""
    shares: Matrix
    """x of the program, in parts of `SHARES`."""
    bound: float
    """No way to serve all sources costs less."""


def costs(sources: Sequence[Source], nodes: Sequence[EdgeNode]) -> Matrix:
    """D, in millionths."""
    latencies = np.array([source.latency_us for source in sources], np.int64)
    return latencies.reshape(len(sources), len(nodes)) * COST // capacities(nodes)


def capacities(nodes: Sequence[EdgeNode]) -> Matrix:
    return np.array([node.capacity for node in nodes], np.int64)


def demands(sources: Sequence[Source]) -> Matrix:
    return np.array([source.demand for source in sources], np.int64)


# --- the plan


def plan(sources: Sequence[Source], nodes: Sequence[EdgeNode]) -> Plan:
    """The program's optimum."""
    each, asked, room = costs(sources, nodes), demands(sources), capacities(nodes)
    scale = max(1, int(each.max()))
    used = np.zeros(each.shape, bool)
    np.put_along_axis(used, np.argsort(each, axis=1, kind="stable")[:, :CHEAPEST], True, axis=1)
    while True:
        at, result = solve(each / scale, asked, room, used)
        prices = -result.ineqlin.marginals
        worth = result.eqlin.marginals / asked
        missing = cheaper(each / scale + prices - worth[:, None], used)
        if not missing.any():
            break
        used |= missing
    shares = np.zeros(each.shape, np.int64)
    shares[at] = np.rint(SHARES * result.x[: len(at[0])])
    integers = tuple(int(price) for price in np.rint(np.maximum(prices, 0) * scale))
    return Plan(integers, shares, float(result.fun) * scale)


def solve(each: Matrix, asked: Matrix, room: Matrix, used: Matrix) -> tuple[Matrix, Any]:
    """Over the pairs that are used, and being served nowhere."""
    at = np.nonzero(used)
    pairs, sources = len(at[0]), len(asked)
    columns = np.arange(pairs)
    goal = np.concatenate([each[at] * asked[at[0]], UNSERVED * asked])
    loads = csr_array((asked[at[0]], (at[1], columns)), shape=(len(room), pairs + sources))
    whom = np.concatenate([at[0], np.arange(sources)])
    once = csr_array((np.ones(pairs + sources), (whom, np.arange(pairs + sources))))
    result = linprog(goal, loads, room, once, np.ones(sources), method="highs-ds")
    assert result.status == 0, result.message
    return at, result


def cheaper(reduced: Matrix, used: Matrix) -> Matrix:
    """The pairs of most negative reduced cost that are not used yet."""
    gains = np.where(used | (reduced >= -CLOSE), 0.0, reduced)
    best = np.zeros(used.shape, bool)
    np.put_along_axis(best, np.argsort(gains, axis=1, kind="stable")[:, :ADDED], True, axis=1)
    return best & (gains < 0)


# --- the decision


class Serving:
    """Nodes and the work they have; decides for one source after the other."""

    def __init__(self, nodes: Sequence[EdgeNode], prices: Sequence[int] = ()) -> None:
        self.capacities = capacities(nodes)
        self.free = self.capacities.copy()
        self.prices = np.array(prices or [0] * len(nodes), np.int64)

    def serve(self, source: Source) -> int | None:
        """The node's index; None where no node has room."""
        latencies = np.array(source.latency_us, np.int64)
        return self.take(source.demand, latencies * COST // self.capacities + self.prices)

    def take(self, demand: int, keys: Matrix) -> int | None:
        """Where the key is least of those that have room, the first of equal ones."""
        able = np.flatnonzero(self.free >= demand)
        if not len(able):
            return None
        node = int(able[keys[able].argmin()])
        self.free[node] -= demand
        return node

    def release(self, demand: int, node: int) -> None:
        self.free[node] += demand
        assert self.free[node] <= self.capacities[node], (node, demand)


def assign(sources: Sequence[Source], nodes: Sequence[EdgeNode], planned: Plan) -> list[int | None]:
    """A node's index for every source: by price, the largest first."""
    serving = Serving(nodes)
    keys = (costs(sources, nodes) + np.array(planned.prices)) * (SHARES + 1) - planned.shares
    found: list[int | None] = [None] * len(sources)
    for i in sorted(range(len(sources)), key=lambda i: (-sources[i].demand, i)):
        found[i] = serving.take(sources[i].demand, keys[i])
    return found


def as_they_come(sources: Sequence[Source], nodes: Sequence[EdgeNode]) -> list[int | None]:
    """Each where D is least among what is left: what the plan is measured against."""
    serving = Serving(nodes)
    return [serving.serve(source) for source in sources]


def cost(
    sources: Sequence[Source], nodes: Sequence[EdgeNode], served: Sequence[int | None]
) -> int | None:
    """The sum of demand x D, in millionths; None if a source is served by none."""
    each = costs(sources, nodes)
    if None in served:
        return None
    pairs = zip(sources, enumerate(served), strict=True)
    return sum(source.demand * int(each[s, n]) for source, (s, n) in pairs)
