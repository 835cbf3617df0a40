"""Nodes: what they hold, what is taken of it, and which of them was heard lately."""

from collections.abc import Callable, Iterable

import msgspec

from libs.contracts.events import Resources
from services.scheduler.stimuli import AMOUNT_MAX, Heartbeat, Running

INITIALIZING, HEALTHY, DEGRADED, UNHEALTHY = "Initializing", "Healthy", "Degraded", "Unhealthy"
HEALTH = (INITIALIZING, HEALTHY, DEGRADED, UNHEALTHY)
SILENT_S = 5.0
"""A node silent for longer is lost."""
DEAF_S = 2.0
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

    @property
    def free(self) -> Resources:
        return minus(self.capacity, self.allocated)


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


def times(count: int, each: Resources) -> Resources:
    return combine(each, each, lambda amount, _: count * amount)


def total(amounts: Iterable[Resources]) -> Resources:
    result = NOTHING
    for amount in amounts:
        result = plus(result, amount)
    return result


def lacking(need: Resources, free: Resources) -> list[str]:
    """The dimensions in which the need does not fit."""
    return [name for name in DIMENSIONS if getattr(need, name) > getattr(free, name)]


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
    return ""


class Liveness:
    """When each node was last heard, on a clock that only grows.

    It is no part of the scheduler's state, because most heartbeats are not logged. What was missed
    while the scheduler itself could not hear (it was down, paused, or cut off from the bus) does
    not count: every node then has the whole `SILENT_S` again.
    """

    def __init__(self, nodes: Iterable[str], now: float) -> None:
        self.seen = dict.fromkeys(nodes, now)
        self.ear = now

    def heard_itself(self, now: float) -> None:
        if now - self.ear > DEAF_S:
            self.seen = dict.fromkeys(self.seen, now)
        self.ear = now

    def heard(self, node: str, now: float) -> None:
        self.seen[node] = now

    def silent(self, now: float) -> list[str]:
        if now - self.ear > DEAF_S:
            return []
        return sorted(node for node, at in self.seen.items() if now - at > SILENT_S)
