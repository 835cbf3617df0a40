"""Policies: what a node is worth to a shape that fits there, and which of its GPUs it takes.

Scores are integers and depend on nothing but the node's state, so that they can be kept, and
computed again elsewhere (native/placement_scores.cpp has the same formulas). More is better; the
pool breaks ties by the order of the nodes' names. The formulas are those of FGD's artifact
(hkust-adsl/kubernetes-scheduler-simulator, ATC'23) in integers: their quantisation to 0..100
decides as much as the formulas do.
"""

import math
from collections.abc import Callable, Sequence

import msgspec

from services.scheduler.shapes import GPU_MILLI, Free, Machine, Shape, admits

CPU_UNIT, GPU_UNIT = 128_000, 8_000
"""The artifact's largest node, in milli: what 1.0 of a resource is in best fit and dot product."""
QUANTA = 100
MILLION = 1_000_000


class View(msgspec.Struct):
    """What a policy sees of a node."""

    machine: Machine
    free: Free
    held: tuple[int, ...] = ()
    """The sorts of its GPU workers, each once: their numbers of GPUs, 0 for a part of one."""


Choice = tuple[int, tuple[int, ...]]
"""A score and the GPUs."""
Policy = Callable[[View, Shape], Choice]


def tightest(free: Free, shape: Shape) -> tuple[int, ...]:
    """The GPUs that have the least left and still enough, the first of equal ones."""
    fitting = [i for i, left in enumerate(free.gpus) if left >= shape.gpu_milli]
    return tuple(sorted(sorted(fitting, key=lambda i: (free.gpus[i], i))[: shape.gpus]))


def loosest(free: Free, shape: Shape) -> tuple[int, ...]:
    """The GPUs that have the most left, the first of equal ones."""
    order = sorted(range(len(free.gpus)), key=lambda i: (-free.gpus[i], i))
    return tuple(sorted(order[: shape.gpus]))


def candidates(free: Free, shape: Shape) -> list[tuple[int, ...]]:
    """The choices that differ, the tightest first: for a part of a GPU each that has enough."""
    if shape.gpus == 1 and shape.gpu_milli < GPU_MILLI:
        fitting = [(left, i) for i, left in enumerate(free.gpus) if left >= shape.gpu_milli]
        return [(i,) for _, i in sorted(fitting)]
    return [tightest(free, shape)]


def sort_of(shape: Shape) -> int:
    return shape.gpus if shape.gpu_milli == GPU_MILLI else 0


def after(free: Free, shape: Shape, gpus: Sequence[int]) -> Free:
    left = list(free.gpus)
    for i in gpus:
        left[i] -= shape.gpu_milli
    cpu_milli, memory_mib = free.cpu_milli - shape.cpu_milli, free.memory_mib - shape.memory_mib
    return Free(cpu_milli, memory_mib, tuple(left))


def best_fit(view: View, shape: Shape) -> Choice:
    """The less is left, the better: half by CPU, half by GPU."""
    gpus = tightest(view.free, shape)
    left = after(view.free, shape, gpus)
    spare = left.cpu_milli * GPU_UNIT + sum(left.gpus) * CPU_UNIT
    whole = 2 * CPU_UNIT * GPU_UNIT
    return QUANTA * (whole - spare) // whole, gpus


def spread(view: View, shape: Shape) -> Choice:
    """The less is used of what is used most there, the better; of GPUs the one with most left."""
    gpus = loosest(view.free, shape)
    left, machine = after(view.free, shape, gpus), view.machine
    used = (
        share(machine.cpu_milli, left.cpu_milli),
        share(machine.memory_mib, left.memory_mib),
        share(machine.gpus * GPU_MILLI, sum(left.gpus)),
    )
    return -max(used), gpus


def share(whole: int, left: int) -> int:
    """What is used of it, in millionths."""
    return MILLION * (whole - left) // whole if whole else 0


def packing(view: View, shape: Shape) -> Choice:
    """GPUs in use first, then free ones of a node in use, then a free node."""
    if not shape.gpus:
        return 0, ()
    gpus = tightest(view.free, shape)
    free = view.free.gpus
    whole = free.count(GPU_MILLI)
    if whole == len(free):
        return max(QUANTA // 3 - whole, whole), gpus
    fresh = sum(free[i] == GPU_MILLI for i in gpus)
    if fresh:
        return max(QUANTA // 2 - fresh, QUANTA // 3), gpus
    spare = sum(free[i] * 100 // GPU_MILLI for i in gpus)
    return max(QUANTA - spare // 10, QUANTA // 2), gpus


def clustering(view: View, shape: Shape) -> Choice:
    """Beside workers of the same number of GPUs; then on a free node; then beside others."""
    if not shape.gpus:
        return 0, ()
    if sort_of(shape) in view.held:
        quarter = 3 if len(view.held) == 1 else 2
    else:
        quarter = 0 if view.held else 1
    used = max(0, GPU_UNIT - sum(view.free.gpus))
    return QUANTA // 4 * (used + quarter * GPU_UNIT) // GPU_UNIT, tightest(view.free, shape)


def dot_product(view: View, shape: Shape) -> Choice:
    """Where what is asked for points away from what is free, one used GPU or all free ones seen."""
    free = view.free
    sides: list[Choice] = []
    if shape.gpus <= 1 and shape.gpu_milli < GPU_MILLI:
        used = [(left, (i,)[: shape.gpus]) for i, left in enumerate(free.gpus) if left < GPU_MILLI]
        sides = [(left, gpus) for left, gpus in used if left >= shape.gpu_milli]
    whole = [i for i, left in enumerate(free.gpus) if left == GPU_MILLI]
    if len(whole) >= shape.gpus:
        sides.append((len(whole) * GPU_MILLI, tuple(whole[: shape.gpus])))
    wanted = shape.gpus * shape.gpu_milli * (CPU_UNIT // GPU_UNIT) ** 2
    full = 2 * CPU_UNIT**2
    scored = [
        (QUANTA * (full - shape.cpu_milli * free.cpu_milli - wanted * left) // full, gpus)
        for left, gpus in sides
    ]
    return max(scored, key=lambda choice: choice[0])


WORD = (1 << 64) - 1


def mixed(word: int) -> int:
    """Splitmix64's finaliser: every bit of the word moves every bit of the result."""
    word = (word + 0x9E3779B97F4A7C15) & WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


def hashed(name: str) -> int:
    """FNV-1a."""
    word = 0xCBF29CE484222325
    for byte in name.encode():
        word = (word ^ byte) * 0x100000001B3 & WORD
    return word


def random(salt: int) -> Policy:
    """Any node, by lot; the salt is of the whole pool's state, so that every placement draws."""

    def choose(view: View, shape: Shape) -> Choice:
        lot = mixed(salt ^ hashed(view.machine.node))
        return lot >> 1, tightest(view.free, shape)

    return choose


class Fragments(msgspec.Struct, frozen=True):
    """Typical shapes: what is left on a node is a fragment to those that cannot use it."""

    shapes: tuple[Shape, ...] = ()
    weights: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()
    """The least gradient, times the sum of weights, of score 1, 2, ... 99."""

    def fragment(self, machine: Machine, free: Free) -> int:
        """Milli of GPU that a worker cannot use, summed over the typical ones with their weights.

        All that is left when it cannot run here (or needs no GPU), else what is left on the GPUs
        too full for it: F of the paper.
        """
        total = sum(free.gpus)
        amount = 0
        for shape, weight in zip(self.shapes, self.weights, strict=True):
            fitting = [left for left in free.gpus if left >= shape.gpu_milli]
            runs = (
                0 < shape.gpus <= len(fitting)
                and shape.cpu_milli <= free.cpu_milli
                and admits(machine, shape)
            )
            amount += weight * (total - sum(fitting) if runs else total)
        return amount

    def score(self, gradient: int) -> int:
        """100 x the sigmoid of the fragments that go away, in GPUs, rounded down."""
        return sum(step <= gradient for step in self.steps)


def fragments(typical: Sequence[tuple[Shape, int]]) -> Fragments:
    """Shapes and how often they come -> what the policy needs of them."""
    total = sum(weight for _, weight in typical)
    logits = [math.log(k / (QUANTA - k)) for k in range(1, QUANTA)]
    return Fragments(
        shapes=tuple(shape for shape, _ in typical),
        weights=tuple(weight for _, weight in typical),
        steps=tuple(math.ceil(GPU_MILLI * total * logit) for logit in logits),
    )


def fgd(known: Fragments) -> Policy:
    """Fragmentation gradient descent: where placing it makes the fewest fragments."""

    def choose(view: View, shape: Shape) -> Choice:
        before = known.fragment(view.machine, view.free)
        best: Choice | None = None
        for gpus in candidates(view.free, shape):
            gone = before - known.fragment(view.machine, after(view.free, shape, gpus))
            choice = known.score(gone), gpus
            if best is None or choice[0] > best[0]:
                best = choice
        assert best is not None
        return best

    return choose


WORTH = 1_000_000
"""Of a whole free GPU, about; and 1.0 of what the other resources let of it be used."""
QUANTUM = WORTH * 3 // 1000
LEFT_MAX = 1 << 16
"""More than the milli of a node's GPUs."""
CPU_MAX = 1 << 40
"""More is worth no more; products of it fit a word."""


class Prices(msgspec.Struct, frozen=True):
    """What free GPUs are worth, of each model: a plan's dual prices (planner.py).

    A node's GPUs are worth the sum of theirs, times the part of it that the node's free CPU and
    memory let be used. Models that a plan does not name are worth what is free of them.
    """

    models: tuple[str, ...] = ()
    gpu: tuple[tuple[int, ...], ...] = ()
    """By what is free of a GPU, from nothing to all of it, in equal steps."""
    cpu: tuple[tuple[int, ...], ...] = ()
    """The part that can be used, by the CPU for every `WORTH` of GPUs, in steps of `cpu_step`."""
    memory: tuple[tuple[int, ...], ...] = ()
    cpu_step: int = 1
    memory_step: int = 1

    def worth(self, machine: Machine, free: Free) -> int:
        if machine.gpu_model not in self.models:
            return sum(free.gpus) * WORTH // GPU_MILLI
        model = self.models.index(machine.gpu_model)
        table = self.gpu[model]
        gpus = sum(table[left * (len(table) - 1) // GPU_MILLI] for left in free.gpus)
        if not gpus:
            return 0
        cpu = usable(self.cpu[model], self.cpu_step, free.cpu_milli, gpus)
        memory = usable(self.memory[model], self.memory_step, free.memory_mib, gpus)
        return gpus * min(cpu, memory) // WORTH


def usable(table: Sequence[int], step: int, amount: int, gpus: int) -> int:
    """The part of so much worth of GPUs that an amount of something else lets be used."""
    ratio = min(amount, CPU_MAX) * WORTH // gpus
    at, rest = divmod(ratio, step)
    if at + 1 >= len(table):
        return table[-1]
    return table[at] + (table[at + 1] - table[at]) * rest // step


def priced(prices: Prices) -> Policy:
    """Where it takes least of the worth; of equal ones where the fewest GPU milli are left.

    Losses closer than `QUANTUM` are equal: of nodes as good, a full one beats a good one (on openb
    96.34 % against 96.19).
    """

    def choose(view: View, shape: Shape) -> Choice:
        before = prices.worth(view.machine, view.free)
        spare = sum(view.free.gpus) - shape.gpus * shape.gpu_milli
        best: Choice | None = None
        for gpus in candidates(view.free, shape):
            lost = before - prices.worth(view.machine, after(view.free, shape, gpus))
            choice = -(lost // QUANTUM) * LEFT_MAX - spare, gpus
            if best is None or choice[0] > best[0]:
                best = choice
        assert best is not None
        return best

    return choose
