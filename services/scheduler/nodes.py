"""Nodes: what they hold, what is taken of it, and which of them was heard lately."""

from collections.abc import Callable, Iterable

import msgspec

from libs.contracts.events import Resources
from services.scheduler.shapes import GPU_MILLI, GPUS_MAX, Machine
from services.scheduler.stimuli import AMOUNT_MAX, Heartbeat, Running

INITIALIZING, HEALTHY, DEGRADED, UNHEALTHY = "Initializing", "Healthy", "Degraded", "Unhealthy"
HEALTH = (INITIALIZING, HEALTHY, DEGRADED, UNHEALTHY)
SILENT_S = 2.5
"""A node silent for longer is lost: five of its heartbeats are missing."""
DEAF_S = 1.0
"""The scheduler hears its own ping every tick; longer without it, its ears are to blame."""
NOTHING = Resources(cpu_milli=0, memory_mib=0, gpu_milli=0)
DIMENSIONS = ("cpu_milli", "memory_mib", "gpu_milli")


class Node(msgspec.Struct, kw_only=True):
    """A node as of its last heartbeat that said something new."""

    node: str
    incarnation: str | int
    kinds: list[str]
    capacity: Resources
    allocated: Resources = NOTHING
    state: str = INITIALIZING
    stopping: list[Running] = []
    """Attempts it was told to stop and may still list as running."""
    gpu_model: str = ""
    labels: dict[str, str] = {}

    @property
    def machine(self) -> Machine:
        """A part of a GPU that a node offers is none: work is placed on whole ones."""
        return Machine(
            node=self.node,
            cpu_milli=self.capacity.cpu_milli,
            memory_mib=self.capacity.memory_mib,
            gpus=gpus_of(self.capacity),
            gpu_model=self.gpu_model,
            kinds=tuple(self.kinds),
            labels=tuple(sorted(self.labels.items())),
        )


def gpus_of(capacity: Resources) -> int:
    return capacity.gpu_milli * capacity.gpus // GPU_MILLI


def combine(left: Resources, right: Resources, by: Callable[[int, int], int]) -> Resources:
    """Each dimension of both, combined."""
    return Resources(
        cpu_milli=by(left.cpu_milli, right.cpu_milli),
        memory_mib=by(left.memory_mib, right.memory_mib),
        gpu_milli=by(left.gpu_milli, right.gpu_milli),
    )


def plus(left: Resources, right: Resources) -> Resources:
    return combine(left, right, int.__add__)


def minus(left: Resources, right: Resources) -> Resources:
    return combine(left, right, int.__sub__)


def total(amounts: Iterable[Resources]) -> Resources:
    result = NOTHING
    for amount in amounts:
        result = plus(result, amount)
    return result


def problem_of(heartbeat: Heartbeat) -> str:
    """What makes a heartbeat unusable; "" for a good one."""
    if not heartbeat.node:
        return "node: empty"
    if heartbeat.health not in HEALTH:
        return f"health: {heartbeat.health!r} is none of {', '.join(HEALTH)}"
    for name in DIMENSIONS:
        amount = getattr(heartbeat.capacity, name)
        if not 0 <= amount <= AMOUNT_MAX:
            return f"capacity.{name}: 0 to {AMOUNT_MAX}, got {amount}"
    gpus = gpus_of(heartbeat.capacity)
    if heartbeat.capacity.gpus < 0 or gpus > GPUS_MAX:
        return f"capacity.gpus: 0 to {GPUS_MAX} GPUs of a node, got {gpus}"
    return ""


class Liveness:
    """When each node was last heard, on a clock that only grows.

    It is no part of the scheduler's state, because most heartbeats are not logged. What was missed
    while the scheduler itself could not hear (it was down, paused, or cut off from the bus) does
    not count, nor does it hide a node that was silent before and after.
    """

    def __init__(self, nodes: Iterable[str], now: float) -> None:
        self.seen = dict.fromkeys(nodes, now)
        self.lost: set[str] = set()
        """Silent, and everybody knows: not said again until they are heard."""
        self.ear = now

    def heard_itself(self, now: float) -> None:
        if (deaf := now - self.ear) > DEAF_S:
            self.seen = {node: min(now, at + deaf) for node, at in self.seen.items()}
        self.ear = now

    def heard(self, node: str, now: float) -> None:
        self.seen[node] = now
        self.lost.discard(node)

    def is_silent(self, node: str, now: float) -> bool:
        return now - self.seen.get(node, now) > SILENT_S

    def silent(self, now: float) -> list[str]:
        if now - self.ear > DEAF_S:
            return []
        silent = (node for node, at in self.seen.items() if now - at > SILENT_S)
        return sorted(node for node in silent if node not in self.lost)

    def known(self, silent: Iterable[str], now: float) -> None:
        """That these were silent at `now` is committed; not of those that were heard since."""
        self.lost.update(node for node in silent if self.is_silent(node, now))
