"""What is free, and where the next worker goes.

`PythonPool` says what is right; it looks at every node for every decision. Where the native pool
(`native/placement.h`) is installed it answers the same, faster.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from services.scheduler import native_pool, scores
from services.scheduler.scores import Prices
from services.scheduler.shapes import (
    GPU_MILLI,
    GPUS_MAX,
    Free,
    Machine,
    Shape,
    Spot,
    admits,
    capacity,
    merged,
    room,
)

log = logging.getLogger(__name__)
SCORES = {
    "random": scores.random(0),
    "dot_product": scores.dot_product,
    "clustering": scores.clustering,
    "packing": scores.packing,
    "best_fit": scores.best_fit,
    "fgd": scores.fgd(scores.Fragments()),
    "priced": scores.priced(scores.Prices()),
}


class Pool(Protocol):
    """Nodes, what is taken of them, and a policy's choice among them.

    Every answer follows from the state alone: which machines there are, which are open, what is
    taken, what was learned.
    """

    def join(self, machine: Machine) -> None:
        """A node that was not there; closed."""

    def leave(self, node: str) -> None:
        """Nothing is taken there any more."""

    def change(self, machine: Machine) -> None:
        """Its node has another capacity, still enough for what is taken there."""

    def open(self, node: str, is_open: bool) -> None:
        """Only open nodes get new work."""

    def learn(self, typical: Sequence[tuple[Shape, int]]) -> None:
        """Shapes that come, and how often: what FGD keeps room for."""

    def price(self, prices: Prices) -> None:
        """A new plan: what `priced` decides by."""

    def find(self, shape: Shape) -> Spot | None:
        """The policy's choice now."""

    def find_gang(self, shape: Shape, workers: int, one_node: bool) -> list[Spot] | None:
        """A place for every worker, or None.

        On one node if `one_node`, and whenever they have GPUs and one open node could hold them
        all if it were empty; else over as few nodes as possible.
        """

    def fits_empty(self, shape: Shape, workers: int, one_node: bool) -> bool:
        """Whether `find_gang` would find it if nothing were taken."""

    def try_without(
        self,
        releases: Sequence[tuple[Shape, Spot]],
        shape: Shape,
        workers: int,
        one_node: bool,
    ) -> list[Spot] | None:
        """What `find_gang` would say after the releases."""

    def take(self, shape: Shape, spot: Spot) -> None: ...
    def release(self, shape: Shape, spot: Spot) -> None: ...
    def free(self, node: str) -> Free: ...


class Node:
    """A machine and what is taken of it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.free = capacity(machine)
        self.is_open = False
        self.held: Counter[int] = Counter()

    @property
    def view(self) -> scores.View:
        return scores.View(self.machine, self.free, tuple(sorted(self.held)))

    def fits(self, shape: Shape, workers: int = 1) -> bool:
        able = self.is_open and admits(self.machine, shape)
        return able and room(self.free, shape) >= workers

    def move(self, shape: Shape, gpus: Sequence[int], sign: int) -> None:
        """Takes (1) or gives back (-1); never more than there is."""
        whole = capacity(self.machine)
        left = list(self.free.gpus)
        assert len(gpus) == len(set(gpus)) == shape.gpus, (self.machine.node, shape, gpus)
        for i in gpus:
            left[i] -= sign * shape.gpu_milli
        self.free = Free(
            self.free.cpu_milli - sign * shape.cpu_milli,
            self.free.memory_mib - sign * shape.memory_mib,
            tuple(left),
        )
        assert 0 <= self.free.cpu_milli <= whole.cpu_milli, (self.machine, self.free)
        assert 0 <= self.free.memory_mib <= whole.memory_mib, (self.machine, self.free)
        assert all(0 <= milli <= GPU_MILLI for milli in left), (self.machine, self.free)
        if shape.gpus:
            self.held[scores.sort_of(shape)] += sign
            self.held = +self.held

    def become(self, machine: Machine) -> None:
        more = machine.cpu_milli - self.machine.cpu_milli
        memory = machine.memory_mib - self.machine.memory_mib
        gpus = self.free.gpus[: machine.gpus]
        gone = self.free.gpus[machine.gpus :]
        assert all(milli == GPU_MILLI for milli in gone), (self.machine, machine, self.free)
        gpus += (GPU_MILLI,) * (machine.gpus - len(gpus))
        self.free = Free(self.free.cpu_milli + more, self.free.memory_mib + memory, gpus)
        assert self.free.cpu_milli >= 0, (self.machine, machine)
        assert self.free.memory_mib >= 0, (self.machine, machine)
        self.machine = machine


class PythonPool:
    """The reference."""

    def __init__(self, policy: str = "fgd", seed: int = 0) -> None:
        assert policy in SCORES, policy
        self.policy = policy
        self.nodes: dict[str, Node] = {}
        self.lots = scores.mixed(seed)
        """A sum over what is taken: the same whenever the same is."""
        self.packed = SCORES[policy]
        if policy == "random":
            self.packed = scores.random(scores.mixed(self.lots))

    def choose(self, view: scores.View, shape: Shape) -> scores.Choice:
        return scores.spread(view, shape) if shape.spread else self.packed(view, shape)

    def learn(self, typical: Sequence[tuple[Shape, int]]) -> None:
        if self.policy == "fgd":
            self.packed = scores.fgd(scores.fragments(typical))

    def price(self, prices: Prices) -> None:
        if self.policy == "priced":
            self.packed = scores.priced(prices)

    def join(self, machine: Machine) -> None:
        assert machine.node not in self.nodes, machine.node
        assert machine.gpus <= GPUS_MAX, machine
        self.nodes[machine.node] = Node(machine)
        self.nodes = dict(sorted(self.nodes.items()))

    def leave(self, node: str) -> None:
        gone = self.nodes.pop(node)
        assert gone.free == capacity(gone.machine), (node, gone.free)

    def change(self, machine: Machine) -> None:
        self.nodes[machine.node].become(machine)

    def open(self, node: str, is_open: bool) -> None:
        self.nodes[node].is_open = is_open

    def take(self, shape: Shape, spot: Spot) -> None:
        self.move(shape, spot, 1)

    def release(self, shape: Shape, spot: Spot) -> None:
        self.move(shape, spot, -1)

    def move(self, shape: Shape, spot: Spot, sign: int) -> None:
        self.nodes[spot.node].move(shape, spot.gpus, sign)
        self.lots = (self.lots + sign * scores.hashed(spot.node)) & scores.WORD
        if self.policy == "random":
            self.packed = scores.random(scores.mixed(self.lots))

    def free(self, node: str) -> Free:
        return self.nodes[node].free

    def find(self, shape: Shape) -> Spot | None:
        return self.best(shape, (node for node in self.nodes.values() if node.fits(shape)))

    def best(self, shape: Shape, nodes: Iterable[Node]) -> Spot | None:
        """The highest score, the first by name of equal ones."""
        best: tuple[int, Spot] | None = None
        for node in nodes:
            score, gpus = self.choose(node.view, shape)
            if best is None or score > best[0]:
                best = score, Spot(node.machine.node, gpus)
        return best[1] if best else None

    def find_gang(self, shape: Shape, workers: int, one_node: bool) -> list[Spot] | None:
        if one_node or (shape.gpus and self.fits_empty(shape, workers, one_node=True)):
            return self.find_together(shape, workers)
        return self.find_spread(shape, workers)

    def find_together(self, shape: Shape, workers: int) -> list[Spot] | None:
        if shape.gpus and shape.gpu_milli < GPU_MILLI:
            able = (node for node in self.nodes.values() if node.fits(shape, workers))
            spot = self.best(shape, able)
        else:
            spot = self.find(merged(shape, workers))
        return self.fill(self.nodes[spot.node], shape, workers) if spot else None

    def fill(self, node: Node, shape: Shape, workers: int) -> list[Spot]:
        """One worker after the other onto a node that has room."""
        view = node.view
        spots = []
        for _ in range(workers):
            _, gpus = self.choose(view, shape)
            spots.append(Spot(node.machine.node, gpus))
            view.free = scores.after(view.free, shape, gpus)
        return spots

    def find_spread(self, shape: Shape, workers: int) -> list[Spot] | None:
        """Over as few nodes as possible.

        The workers are alike, so k nodes hold them if and only if the k with the most room do:
        taking from the largest on uses the fewest nodes, and fails only when all together have
        too little. The last one is the smallest that has room for what remains.
        """
        rooms = []
        for node in self.nodes.values():
            if node.fits(shape):
                score, _ = self.choose(node.view, shape)
                rooms.append((room(node.free, shape), score, node))
        if sum(count for count, _, _ in rooms) < workers:
            return None
        rooms.sort(key=lambda one: (-one[0], -one[1]))
        spots: list[Spot] = []
        for at, (count, _, node) in enumerate(rooms):
            rest = workers - len(spots)
            if rest <= count:
                last = min(rooms[at:], key=lambda one: (one[0] < rest, one[0]))
                return spots + self.fill(last[2], shape, rest)
            spots += self.fill(node, shape, count)
        raise AssertionError((shape, workers, rooms))

    def fits_empty(self, shape: Shape, workers: int, one_node: bool) -> bool:
        able = [n.machine for n in self.nodes.values() if n.is_open and admits(n.machine, shape)]
        rooms = [room(capacity(machine), shape) for machine in able]
        return (max(rooms, default=0) if one_node else sum(rooms)) >= workers

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


def make(policy: str = "fgd", seed: int = 0) -> Pool:
    """The native one where it is built."""
    if native_pool.available():
        return native_pool.NativePool(policy, seed)
    log.warning("the native pool is not built (scripts/native.sh): placement is slower")
    return PythonPool(policy, seed)
