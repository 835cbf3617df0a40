"""Proves that a plan's prices are an optimum of its linear program (by all patterns there are),
that its tables mean what they say, that deciding by them packs better than best fit and FGD, also
where plans are late and lost, and that typical shapes are learned within their bounds."""

import random
from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler import planner, planning
from services.scheduler.openb import Replay
from services.scheduler.planner import Demand, Group, Model, Plan, grouped, plan, solve
from services.scheduler.pool import PythonPool
from services.scheduler.scores import WORTH, Prices
from services.scheduler.shapes import Free, Machine, Shape
from services.scheduler.stimuli import Planned
from services.scheduler.typical import ARRIVALS_MAX, EVERY_ARRIVALS, SHAPES_MAX, Typical

MACHINES = [Machine(f"n{i:02}", 96_000, 393_216, 8, "G2") for i in range(10)] + [
    Machine(f"t{i:02}", 104_000, 524_288, 2, "T4") for i in range(10)
]
MIX = [
    (Shape(3_152, 5_600, 1, 810), 30),
    (Shape(11_300, 49_152, 1, 1000), 30),
    (Shape(18_708, 64_512, 1, 1000), 10),
    (Shape(11_908, 47_104, 1, 470), 20),
    (Shape(4_000, 16_000, 1, 320), 10),
    (Shape(64_000, 262_144, 8, 1000), 1),
    (Shape(12_500, 57_344), 10),
]


def worth(prices: Prices, model: str, milli: int) -> int:
    table = prices.gpu[prices.models.index(model)]
    return table[milli * (len(table) - 1) // 1000]


def test_what_nothing_can_fill_up_costs_the_whole_gpu() -> None:
    prices = plan(MACHINES, MIX).prices
    assert worth(prices, "G2", 1000) == WORTH
    assert worth(prices, "G2", 810) == WORTH
    assert worth(prices, "G2", 470) == WORTH // 2
    assert worth(prices, "G2", 190) == 0


def test_the_load_is_what_fits_with_nothing_refused() -> None:
    """By hand: of 10 GPUs, 7 hold one of 700, and 300 beside it; 3 are left for threes of 300."""
    machines = [Machine("a", 64_000, 64_000, 10, "A")]
    mix = [(Shape(0, 0, 1, 700), 7), (Shape(0, 0, 1, 300), 16)]
    assert plan(machines, mix).load_milli == 7 * 700 + 16 * 300


def test_a_model_that_only_some_may_use_has_its_own_prices() -> None:
    mix = [(Shape(1_000, 1_000, 1, 600, ("G2",)), 50), (Shape(1_000, 1_000, 1, 500), 50)]
    prices = plan(MACHINES, mix).prices
    assert prices.models == ("G2", "T4")
    assert worth(prices, "T4", 600) == worth(prices, "T4", 500)
    assert worth(prices, "G2", 600) > worth(prices, "G2", 500)


def test_workers_that_no_node_can_hold_price_nothing() -> None:
    small = [Machine("a", 64_000, 64_000, 2, "A"), Machine("b", 64_000, 64_000, 2, "A")]
    assert plan(small, [*MIX[:3], (Shape(0, 0, 4, 1000), 9)]) == plan(small, MIX[:3])


def test_without_gpus_there_is_no_plan() -> None:
    assert plan([Machine("a", 1_000, 1_000)], MIX) == Plan()
    assert plan(MACHINES, []) == Plan()
    assert plan(MACHINES, [(Shape(1_000, 1_000, 1, 500, ("H100",)), 3)]) == Plan()


def test_where_the_solver_gives_up_the_round_before_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of pieces alone the first is solved without an iteration, before the solver begins."""
    pieces = [(Shape(0, 0, 1, size), 100 - size // 20) for size in range(110, 900, 70)]
    whole = plan(MACHINES, pieces)
    monkeypatch.setattr(planner, "ITERATIONS_MAX", 0)
    assert plan(MACHINES, MIX) == Plan()
    early = plan(MACHINES, pieces)
    assert 0 < early.load_milli < whole.load_milli
    assert early.prices.models == whole.prices.models


sizes = st.sampled_from([110, 160, 220, 330, 470, 550, 650, 810, 1000])
demands = st.builds(
    lambda size, models: Demand(1, size, models), sizes, st.sampled_from([(), ("A",)])
)
mixes = st.dictionaries(demands, st.integers(1, 50), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(mixes, st.integers(1, 9), st.integers(1, 9))
def test_no_pattern_is_worth_more_than_its_gpu_and_the_rents_pay_the_load(
    mix: dict[Demand, int], of_a: int, of_b: int
) -> None:
    """A solution of the dual that is worth as much as one of the primal is an optimum of both."""
    asked = sorted(mix)
    counts = [mix[demand] for demand in asked]
    groups = grouped(asked, [Model("A", of_a, 1), Model("B", of_b, 1)])
    solution = solve(asked, counts, groups)
    assert solution is not None
    rents = [max_worth(asked, solution.worth, group) for group in groups]
    load = sum(n * d.gpu_milli for n, d in zip(counts, asked, strict=True)) / 1000
    price = sum(n * w for n, w in zip(counts, solution.worth, strict=True)) / load
    paid = sum(rent * group.gpus for rent, group in zip(rents, groups, strict=True))
    assert solution.load * price == pytest.approx(paid, rel=1e-4)


def max_worth(asked: list[Demand], worths: list[float], group: Group) -> float:
    """By all sets of workers that fit on one GPU."""
    best = 0.0
    for many in range(1, 10):
        found = False
        for chosen in combinations_with_replacement(group.demands, many):
            if sum(asked[i].gpu_milli for i in chosen) <= 1000:
                found = True
                best = max(best, sum(worths[i] for i in chosen))
        if not found:
            break
    return best


def test_the_tables_of_cpu_and_memory_are_concave_and_end_at_the_whole() -> None:
    prices = plan(MACHINES, MIX).prices
    for table in (*prices.cpu, *prices.memory):
        steps = [right - left for left, right in pairwise(table)]
        assert table[0] == 0
        assert table[-1] == WORTH
        assert all(step >= 0 for step in steps)
        assert all(right <= left + 2 for left, right in pairwise(steps))


def test_gpus_without_cpu_are_worth_nothing_and_more_cpu_never_less() -> None:
    prices = plan(MACHINES, MIX).prices
    at = [
        prices.worth(MACHINES[0], Free(cpu, 393_216, (1000,) * 8)) for cpu in range(0, 96_001, 500)
    ]
    assert at[0] == 0
    assert at == sorted(at)


def test_names_and_the_order_of_nodes_change_no_price() -> None:
    renamed = [
        Machine(f"x{i}", m.cpu_milli, m.memory_mib, m.gpus, m.gpu_model)
        for i, m in enumerate(MACHINES)
    ]
    assert plan(MACHINES, MIX) == plan(reversed(renamed), MIX)


def packed(policy: str, seed: int) -> int:
    """GPU milli that are allocated when half as much again is asked for."""
    rng = random.Random(seed)
    shapes, weights = [shape for shape, _ in MIX], [weight for _, weight in MIX]
    pool = PythonPool(policy)
    for machine in MACHINES:
        pool.join(machine)
        pool.open(machine.node, True)
    pool.learn(MIX)
    pool.price(plan(MACHINES, MIX).prices)
    taken = 0
    for shape in rng.choices(shapes, weights, k=220):
        spot = pool.find(shape)
        if spot is not None:
            pool.take(shape, spot)
            taken += shape.gpus * shape.gpu_milli
    return taken


def test_deciding_by_prices_packs_more() -> None:
    by_policy = {
        policy: sum(packed(policy, seed) for seed in range(2))
        for policy in ("priced", "fgd", "best_fit")
    }
    others = max(by_policy["fgd"], by_policy["best_fit"])
    assert by_policy["priced"] > others, by_policy


class Unlucky(Replay):
    """Of its plans every other is lost, and what comes is 20 arrivals late."""

    made = comes_at = 0

    def plan(self) -> None:
        if self.pods == self.comes_at:
            self.tell(self.under_way)
        given = planning.wanted(self.scheduler)
        if given is None or self.pods < self.comes_at:
            return
        self.made += 1
        plan = planner.Plan() if self.made % 2 == 0 else planner.plan(*given)
        self.under_way: Planned = planning.planned(plan, self.scheduler)[0]
        self.comes_at = self.pods + 20


def learned(kind: type[Replay], policy: str = "priced", plans: bool = True) -> int:
    """GPU milli that are allocated by a scheduler that is not told what comes."""
    taken = 0
    for seed in range(6):
        run = kind(MACHINES, policy)
        run.plans = run.plans and plans
        shapes, weights = zip(*MIX, strict=True)
        for shape in random.Random(seed).choices(shapes, weights, k=220):
            if run.place(shape) is not None:
                taken += shape.gpus * shape.gpu_milli
    return taken


def test_plans_that_are_late_and_lost_cost_little() -> None:
    in_time, unlucky = learned(Replay), learned(Unlucky)
    assert 0.985 * in_time < unlucky < in_time
    assert unlucky > learned(Replay, plans=False)
    assert unlucky > learned(Replay, "best_fit")


# --- typical shapes


def test_typical_shapes_are_the_arrivals() -> None:
    typical = Typical()
    for shape, count in MIX:
        typical.note(shape, count)
    assert dict(typical.shapes()) == dict(MIX)
    assert typical.arrivals == sum(count for _, count in MIX)
    assert [count for _, count in typical.shapes()] == sorted((n for _, n in MIX), reverse=True)


def test_only_so_many_shapes_are_kept_and_the_frequent_ones_stay() -> None:
    typical = Typical()
    for cpu in range(4 * SHAPES_MAX):
        typical.note(Shape(cpu, 1), 1)
        typical.note(MIX[0][0], 1)
    assert len(typical.counts) == SHAPES_MAX
    assert typical.shapes()[0] == (MIX[0][0], 4 * SHAPES_MAX)
    assert typical.arrivals == sum(typical.counts.values())


def test_what_no_longer_comes_is_forgotten() -> None:
    typical = Typical()
    old, new = MIX[0][0], MIX[1][0]
    typical.note(old, 100)
    for _ in range(10 * ARRIVALS_MAX):
        typical.note(new)
    assert old not in typical.counts
    assert typical.arrivals < ARRIVALS_MAX


def test_plans_are_due_as_arrivals_double_and_then_steadily() -> None:
    typical, at = Typical(), []
    for arrival in range(1, 5 * ARRIVALS_MAX):
        typical.note(MIX[0][0])
        if typical.is_due:
            typical.planned()
            at.append(arrival)
    assert at[:5] == [16, 32, 64, 128, 256]
    gaps = {right - left for left, right in pairwise(at[9:])}
    assert gaps == {EVERY_ARRIVALS}
