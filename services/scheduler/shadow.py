"""Shadow prices: how much more of who waits could start for one more unit of what is scarce.

    max  sum of l, g: size(l) y(l, g)
    so that  sum of l: need(l, r) y(l, g) <= free(g, r)         of every group of nodes g
             sum of l, g: need(l, r) y(l, g) <= room(q, r)      of every quota (queue q, resource r)
             sum of g: y(l, g) <= waiting(l),  0 <= y(l, g) <= places(l, g)

A line l is jobs of one queue that ask for the same, y how many of its gangs start there, and a
group is the Healthy nodes that are alike but for what is free on them. `places` counts gangs node
by node, so that what is free in pieces is no place. A gang's size is its GPU milli, or its CPU
milli where nobody who waits needs a GPU: a price is so many of them placed for each unit. The
program passes over who comes first and takes a part of a gang for one: its prices say what is
scarce, not who is next. It is solved by HiGHS, off the decision path.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from services.scheduler.book import Book
from services.scheduler.jobs import Ask
from services.scheduler.lines import Line
from services.scheduler.nodes import HEALTHY
from services.scheduler.placement import AMOUNTS, amounts_of_free, amounts_of_shape
from services.scheduler.quota import NO_LIMIT, amounts_of
from services.scheduler.shapes import Free, Machine, admits, room

LINES_MAX = 64
"""The longest, and the job's own: the program stays small whatever waits."""
GROUPS_MAX = 64
"""The largest; a cluster has a few."""

Nodes = Sequence[tuple[Machine, Free]]


class Prices(msgspec.Struct, frozen=True):
    """Placed milli of `unit` per unit of each."""

    unit: str
    quota: dict[str, float] = {}
    """By resource, of the job's queue."""
    nodes: dict[str, float] = {}
    """By resource (a worker's GPU, CPU, memory), of the dearest group the job may use."""
    place: float = 0.0
    """Of one more place for a whole gang like the job's."""


def prices(book: Book, queue: str, ask: Ask) -> Prices:
    """For a job that waits in a queue and asks for this."""
    mine = book.lines.of[queue, ask]
    others = [line for line in book.lines.of.values() if line is not mine]
    others.sort(key=lambda line: -len(line.places))
    lines = [mine, *others[:LINES_MAX]]
    groups = grouped(book)
    columns = [
        (line, group) for line in lines for group in groups if admits(group[0][0], line.ask.shape)
    ]
    unit = "gpu_milli" if any(line.ask.shape.gpus for line in lines) else "cpu_milli"
    return (
        solved(book, columns, groups, unit) if mine in [one for one, _ in columns] else Prices(unit)
    )


def grouped(book: Book) -> Sequence[Nodes]:
    groups: dict[object, list[tuple[Machine, Free]]] = {}
    for name, node in book.nodes.items():
        if node.state == HEALTHY:
            one = book.machines[name]
            alike = groups.setdefault((one.gpu_model, one.kinds, one.labels), [])
            alike.append((one, book.pool.free(name)))
    return sorted(groups.values(), key=len, reverse=True)[:GROUPS_MAX]


def places_of(ask: Ask, nodes: Nodes) -> int:
    rooms = [room(free, ask.shape) for _, free in nodes]
    return sum(one // ask.workers for one in rooms) if ask.one_node else sum(rooms) // ask.workers


def amount(line: Line, resource: str) -> int:
    return line.ask.workers * amounts_of_shape(line.ask)[resource]


def solved(
    book: Book, columns: Sequence[tuple[Line, Nodes]], groups: Sequence[Nodes], unit: str
) -> Prices:
    mine = columns[0][0]
    rows: list[tuple[tuple[str, ...], int, list[int]]] = []
    """(what, how much there is, how much of it each column takes)"""
    for g, group in enumerate(groups):
        for resource in AMOUNTS:
            free = sum(amounts_of_free(one)[resource] for _, one in group)
            takes = [amount(line, resource) * (at is group) for line, at in columns]
            rows.append((("nodes", resource, str(g)), free, takes))
    for queue, spec in book.specs.items():
        for resource in spec.nominal:
            left = book.quota.room(queue, resource)
            takes = [
                amounts_of(line.ask, {at[0][0].gpu_model: line.ask.workers}).get(resource, 0)
                * (line.queue == queue)
                for line, at in columns
            ]
            if left < NO_LIMIT and any(takes):
                rows.append((("quota", resource, queue), max(0, left), takes))
    for line in dict.fromkeys(line for line, _ in columns):
        takes = [int(one is line) for one, _ in columns]
        rows.append((("waiting", ""), len(line.places), takes))
    for i, (line, at) in enumerate(columns):
        takes = [int(i == j) for j in range(len(columns))]
        rows.append((("place" if line is mine else "places", ""), places_of(line.ask, at), takes))
    size = np.array([max(1, amount(line, unit)) for line, _ in columns], dtype=float)
    most = float(size.max())
    from scipy.optimize import linprog  # as in planner.py

    result = linprog(
        -size / most, np.array([row for _, _, row in rows]), [has for _, has, _ in rows]
    )
    assert result.status == 0, result.message
    duals = [-float(dual) * most for dual in result.ineqlin.marginals]
    return read(mine, [what for what, _, _ in rows], duals, unit)


def read(mine: Line, whats: Sequence[tuple[str, ...]], duals: Sequence[float], unit: str) -> Prices:
    quota: dict[str, float] = {}
    nodes: dict[str, float] = {}
    place = 0.0
    for what, dual in zip(whats, duals, strict=True):
        if what[0] == "quota" and what[2] == mine.queue:
            quota[what[1]] = dual
        elif what[0] == "nodes":
            nodes[what[1]] = max(dual, nodes.get(what[1], 0.0))
        elif what[0] == "place":
            place = max(place, dual)
    return Prices(unit, quota, nodes, place)
