"""The planner: what free GPUs are worth to the shapes that come, by a linear program.

Off the decision path. What decides is `scores.priced`: a worker goes where it takes least of the
worth of what is free. The worth has two factors, and this file computes a table for each.

1. GPUs. The cluster is asked how much of the typical mix it could hold:

       max t   so that   sum of p: times(d, p) x(p) >= share(d) t    for every demand d
                         sum of p on g: gpus(p) x(p) <= gpus(g)      for every group of GPUs g
                         x >= 0

   where a pattern p is a set of workers that fit on one GPU together, or one worker of several
   GPUs, and x(p) how often it is used. There are more patterns than can be listed: they are
   generated (Gilmore and Gomory, 1961): solve over those known, look by a knapsack over a GPU's
   milli for a pattern that the dual prices value above the GPU it takes, add it, until there is
   none. The price of a demand is its dual: 810 milli cost a whole GPU where nothing comes that
   fills the other 190, and 470 a half. What f free milli are worth is the most valuable pattern
   that fits into them.

2. CPU and memory. A node whose CPU ends before its GPUs strands them. Of the mix, taken from what
   needs least CPU for its price, the part that can run with so much CPU for a GPU's worth is the
   part of the GPUs' worth that can be had: concave, 1 where the whole mix can run. So a worker that
   needs much CPU goes where CPU is left over, and a node's CPU and GPUs are used up together.

The tables are integers; the program is solved in floating point, once, and its result is put into
the scheduler's log, so that decisions replay.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from services.scheduler.scores import WORTH, Prices
from services.scheduler.shapes import GPU_MILLI, Machine, Shape

log = logging.getLogger(__name__)
ROUNDS_MAX = 100
"""openb needs 20 to 30; prices of a round too few are nearly those of the last."""
ITERATIONS_MAX = 100_000
"""Of the solver in one round."""
BETTER = 1e-7
"""Of a GPU: a pattern that is worth less more is not generated."""
STEPS = 512
"""Entries of the tables of CPU and memory."""

Typical = Sequence[tuple[Shape, int]]


class Demand(msgspec.Struct, frozen=True, order=True):
    """Shapes of the same GPUs, whatever else they need."""

    gpus: int
    gpu_milli: int
    gpu_models: tuple[str, ...]


class Model(msgspec.Struct, frozen=True, order=True):
    name: str
    gpus: int
    """In all."""
    node_gpus: int
    """Of the largest node."""


class Group(msgspec.Struct, frozen=True):
    """GPUs of models that the same demands may use."""

    models: tuple[str, ...]
    gpus: int
    demands: tuple[int, ...]
    """Their indices."""


class Pattern(msgspec.Struct, frozen=True):
    group: int
    gpus: int
    times: tuple[tuple[int, int], ...]
    """(demand, how many of it)"""


class Plan(msgspec.Struct, frozen=True):
    prices: Prices = Prices()
    load_milli: int = 0
    """Of GPUs: as much of the mix, whole, as could be allocated with nothing refused. No policy
    does better before it refuses its first worker."""


class Solution(msgspec.Struct, frozen=True):
    load: float
    """In GPUs of the mix."""
    worth: list[float]
    """Of each demand, in GPUs."""


def demand_of(shape: Shape) -> Demand:
    return Demand(shape.gpus, shape.gpu_milli, shape.gpu_models)


def plan(machines: Iterable[Machine], typical: Typical) -> Plan:
    """Prices for these machines and this mix; an empty plan where either has no GPUs, or where
    the program could not be solved."""
    mix: Counter[Demand] = Counter()
    for shape, count in typical:
        if shape.gpus:
            mix[demand_of(shape)] += count
    models = models_of(machines)
    demands = sorted(demand for demand in mix if any(may_use(demand, one) for one in models))
    if not demands:
        return Plan()
    groups = grouped(demands, models)
    solution = solve(demands, [mix[demand] for demand in demands], groups)
    if solution is None:
        return Plan()
    worths = dict(zip(demands, solution.worth, strict=True))
    load_milli = int(GPU_MILLI * solution.load * (1 + 1e-9))
    return Plan(tabulated(demands, worths, groups, typical), load_milli)


def models_of(machines: Iterable[Machine]) -> list[Model]:
    """Those there are, by name."""
    models: dict[str, Model] = {}
    for machine in machines:
        if machine.gpus:
            known = models.get(machine.gpu_model, Model(machine.gpu_model, 0, 0))
            largest = max(known.node_gpus, machine.gpus)
            models[known.name] = Model(known.name, known.gpus + machine.gpus, largest)
    return sorted(models.values())


def may_use(demand: Demand, model: Model) -> bool:
    named = not demand.gpu_models or model.name in demand.gpu_models
    return named and demand.gpus <= model.node_gpus


def grouped(demands: Sequence[Demand], models: Iterable[Model]) -> list[Group]:
    """Models that nobody may use are in none."""
    alike: dict[tuple[int, ...], list[Model]] = {}
    for model in models:
        able = tuple(i for i, demand in enumerate(demands) if may_use(demand, model))
        if able:
            alike.setdefault(able, []).append(model)
    return [
        Group(tuple(one.name for one in ones), sum(one.gpus for one in ones), able)
        for able, ones in alike.items()
    ]


# --- the linear program


def solve(
    demands: Sequence[Demand], counts: Sequence[int], groups: Sequence[Group]
) -> Solution | None:
    """Duals of the program at the top of this file, scaled so that the dearest GPU is worth 1.

    Where the solver gives up, those of the round before; None in the first.
    """
    load = sum(n * d.gpus * d.gpu_milli for n, d in zip(counts, demands, strict=True)) / GPU_MILLI
    shares = [count / load for count in counts]
    patterns = first_patterns(demands, groups)
    solution = None
    for _ in range(ROUNDS_MAX):
        solved = master(shares, groups, patterns)
        if solved is None:
            break
        held, prices, rents = solved
        dearest = max(rents)
        solution = Solution(load=held, worth=[price / dearest for price in prices])
        new = [
            pattern
            for g, group in enumerate(groups)
            for pattern in better(demands, prices, g, group, rents[g] + BETTER * dearest)
        ]
        if not new:
            break
        patterns.update(dict.fromkeys(new))
    return solution


def first_patterns(demands: Sequence[Demand], groups: Sequence[Group]) -> dict[Pattern, None]:
    """As many of one demand as a GPU holds, and the workers of several GPUs."""
    patterns: dict[Pattern, None] = {}
    for g, group in enumerate(groups):
        for i in group.demands:
            many = GPU_MILLI // demands[i].gpu_milli if demands[i].gpus == 1 else 1
            patterns[Pattern(g, demands[i].gpus, ((i, many),))] = None
    return patterns


def master(
    shares: Sequence[float], groups: Sequence[Group], patterns: Iterable[Pattern]
) -> tuple[float, list[float], list[float]] | None:
    """(t, the price of every demand, the rent of a GPU of every group); None where the solver
    gives up."""
    size = sum(group.gpus for group in groups)
    rows, columns, values = list(range(len(shares))), [0] * len(shares), list(shares)
    for column, pattern in enumerate(patterns, start=1):
        rows += [i for i, _ in pattern.times] + [len(shares) + pattern.group]
        columns += [column] * (len(pattern.times) + 1)
        values += [-times for _, times in pattern.times] + [pattern.gpus]
    # Where it is used: a scheduler that starts again needs no solver for half a minute.
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    shape = max(rows) + 1, max(columns) + 1
    bounds = [0.0] * len(shares) + [group.gpus / size for group in groups]
    goal = np.zeros(shape[1])
    goal[0] = -1
    matrix = csr_array((values, (rows, columns)), shape=shape)
    result = linprog(goal, matrix, bounds, options={"maxiter": ITERATIONS_MAX})
    if result.status != 0:
        log.warning("no prices: %s", result.message)
        return None
    duals = [-float(dual) for dual in result.ineqlin.marginals]
    return float(result.x[0]) * size, duals[: len(shares)], duals[len(shares) :]


def better(
    demands: Sequence[Demand], prices: Sequence[float], g: int, group: Group, rent: float
) -> list[Pattern]:
    """The most valuable pattern of one GPU, if it is worth more than the GPU's rent."""
    parts = [i for i in group.demands if demands[i].gpus == 1]
    sizes = [demands[i].gpu_milli for i in parts]
    best, last = knapsack(sizes, [prices[i] for i in parts])
    if not parts or best[-1] <= rent:
        return []
    times: Counter[int] = Counter()
    left = len(best) - 1
    unit = GPU_MILLI // left
    while left and last[left] >= 0:
        times[parts[last[left]]] += 1
        left -= sizes[last[left]] // unit
    return [Pattern(g, 1, tuple(sorted(times.items())))]


def knapsack(sizes: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[int]]:
    """What every part of a GPU can hold at most, and what was put into it last (-1: nothing).

    Parts are the multiples of what divides a GPU and all sizes. A part that holds no more than
    a smaller one is filled like that one and then the rest is left: `last` names what fills it.
    """
    unit = math.gcd(GPU_MILLI, *sizes)
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    units = np.array([sizes[i] // unit for i in order], np.int64)
    gains = np.array([values[i] for i in order])
    parts = np.arange(GPU_MILLI // unit + 1)
    best, last = np.zeros(len(parts)), np.full(len(parts), -1)
    for part, fitting in enumerate(np.searchsorted(units, parts, side="right").tolist()):
        if part:
            best[part], last[part] = best[part - 1], last[part - 1]
        if fitting:
            filled = best[part - units[:fitting]] + gains[:fitting]
            item = int(filled.argmax())
            if filled[item] > best[part]:
                best[part], last[part] = filled[item], order[item]
    return best.tolist(), last.tolist()


# --- the tables


def tabulated(
    demands: Sequence[Demand],
    worths: dict[Demand, float],
    groups: Sequence[Group],
    typical: Typical,
) -> Prices:
    gpu, cpu, memory = [], [], []
    for group in groups:
        able = [demands[i] for i in group.demands]
        parts = [demand for demand in able if demand.gpus == 1]
        best, _ = knapsack([d.gpu_milli for d in parts], [worths[d] for d in parts])
        gpu.append(tuple(round(WORTH * value) for value in best))
        mix = [(shape, n) for shape, n in typical if shape.gpus and demand_of(shape) in able]
        weights = [(worths[demand_of(shape)], n) for shape, n in mix]
        cpu.append(reach(weights, [shape.cpu_milli for shape, _ in mix]))
        memory.append(reach(weights, [shape.memory_mib for shape, _ in mix]))
    cpu_step, memory_step = step_of(cpu), step_of(memory)
    rows = [(model, g) for g, group in enumerate(groups) for model in group.models]
    return Prices(
        models=tuple(model for model, _ in rows),
        gpu=tuple(gpu[g] for _, g in rows),
        cpu=tuple(stepped(cpu[g], cpu_step) for _, g in rows),
        memory=tuple(stepped(memory[g], memory_step) for _, g in rows),
        cpu_step=cpu_step,
        memory_step=memory_step,
    )


Knots = tuple[list[float], list[float]]
"""A piecewise linear function: where, and how much there."""


def reach(weights: Sequence[tuple[float, int]], amounts: Sequence[int]) -> Knots:
    """(resource for a GPU's worth, the part of the mix's worth that runs with so much of it)."""
    priced = [
        (amount / worth, worth * count)
        for (worth, count), amount in zip(weights, amounts, strict=True)
        if worth > BETTER
    ]
    priced.sort()
    whole = sum(worth for _, worth in priced)
    if not whole:
        return [0.0], [1.0]
    used = np.cumsum([0.0] + [need * worth / whole for need, worth in priced])
    part = np.cumsum([0.0] + [worth / whole for _, worth in priced])
    return used.tolist(), part.tolist()


def step_of(tables: Sequence[Knots]) -> int:
    return max(1, math.ceil(max(used[-1] for used, _ in tables) / (STEPS - 1)))


def stepped(knots: Knots, step: int) -> tuple[int, ...]:
    used, part = knots
    entries = np.interp(np.arange(STEPS) * step, used, part)
    return tuple(round(WORTH * float(entry)) for entry in entries)
