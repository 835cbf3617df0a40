"""The native pool (native/placement.h) as a `pool.Pool`: numbers there, shapes and names here."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import msgspec

from services.scheduler import scores
from services.scheduler.shapes import GPUS_MAX, Free, Machine, Shape, Spot

EXTENSION = "leptonic_placement"
POLICIES = ("random", "dot_product", "clustering", "packing", "best_fit", "fgd", "priced")
"""In the order of `Policy` there."""
SHAPES_MAX = 1 << 16
"""Whose numbers are remembered, on both sides."""


def available() -> bool:
    return find_spec(EXTENSION) is not None


def described(machine: Machine) -> tuple[Any, ...]:
    return (
        machine.cpu_milli,
        machine.memory_mib,
        machine.gpus,
        machine.gpu_model,
        list(machine.kinds),
        list(machine.labels),
    )


class NativePool:
    """A `pool.Pool`."""

    def __init__(self, policy: str, seed: int) -> None:
        self.policy = policy
        self.core = import_module(EXTENSION).Pool(POLICIES.index(policy), seed)
        self.numbers: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.shapes: dict[Shape, int] = {}

    def number(self, shape: Shape) -> int:
        known = self.shapes.get(shape)
        if known is None:
            self.make_way(1)
            known = self.core.shape(
                shape.cpu_milli,
                shape.memory_mib,
                shape.gpus,
                shape.gpu_milli,
                list(shape.gpu_models),
                shape.kind,
                list(shape.labels),
                shape.spread,
            )
            self.shapes[shape] = known
        return known

    def make_way(self, shapes: int) -> None:
        """Gangs on one node add shapes of their own there, a few a decision."""
        if self.core.shapes() + shapes > SHAPES_MAX:
            self.core.forget_shapes()
            self.shapes.clear()

    def join(self, machine: Machine) -> None:
        assert machine.gpus <= GPUS_MAX, machine
        number = self.core.join(machine.node, *described(machine))
        self.numbers[machine.node] = number
        self.names[number] = machine.node

    def leave(self, node: str) -> None:
        self.core.leave(node)
        del self.names[self.numbers.pop(node)]

    def change(self, machine: Machine) -> None:
        self.core.change(self.numbers[machine.node], *described(machine))

    def open(self, node: str, is_open: bool) -> None:
        self.core.open(self.numbers[node], is_open)

    def learn(self, typical: Sequence[tuple[Shape, int]]) -> None:
        if self.policy == "fgd":
            self.make_way(len(typical))
            known = [(self.number(shape), weight) for shape, weight in typical]
            self.core.learn(known, list(scores.fragments(typical).steps))

    def price(self, prices: scores.Prices) -> None:
        if self.policy == "priced":
            self.core.price(*msgspec.structs.astuple(prices))

    def find(self, shape: Shape) -> Spot | None:
        found = self.core.find(self.number(shape))
        return Spot(self.names[found[0]], found[1]) if found else None

    def find_gang(self, shape: Shape, workers: int, one_node: bool) -> list[Spot] | None:
        found = self.core.find_gang(self.number(shape), workers, one_node)
        return None if found is None else [Spot(self.names[node], gpus) for node, gpus in found]

    def fits_empty(self, shape: Shape, workers: int, one_node: bool) -> bool:
        return bool(self.core.fits_empty(self.number(shape), workers, one_node))

    def try_without(
        self,
        releases: Sequence[tuple[Shape, Spot]],
        shape: Shape,
        workers: int,
        one_node: bool,
    ) -> list[Spot] | None:
        for held, spot in releases:
            self.release(held, spot)
        found = self.find_gang(shape, workers, one_node)
        for held, spot in releases:
            self.take(held, spot)
        return found

    def take(self, shape: Shape, spot: Spot) -> None:
        self.core.take(self.number(shape), self.numbers[spot.node], spot.gpus)

    def release(self, shape: Shape, spot: Spot) -> None:
        self.core.release(self.number(shape), self.numbers[spot.node], spot.gpus)

    def free(self, node: str) -> Free:
        return Free(*self.core.free(self.numbers[node]))
