"""Everything that can move the scheduler; each is a line of its log.

Requests and results come from the bus as the contracts' own events, heartbeats from nodes, ticks
from the clock.
"""

from typing import get_args

import msgspec

from libs.contracts.events import (
    AttemptFailed,
    AttemptStarted,
    AttemptSucceeded,
    JobCancelled,
    JobRequested,
    Resources,
)

AMOUNT_MAX = 1 << 48
"""Of one resource, so that sums fit an int64."""


class JobSubmitted(msgspec.Struct, frozen=True):
    request: JobRequested
    traceparent: str = ""
    """Where it was asked for: its placements continue from there."""


class Running(msgspec.Struct, frozen=True, order=True):
    """An attempt a node says it runs."""

    project: str
    job: str
    attempt: int
    token: int


class Heartbeat(msgspec.Struct, frozen=True):
    """What a node says of itself, every second, on `heartbeats.<node>`."""

    node: str
    incarnation: str | int
    """New whenever the agent starts; what an earlier one ran and this one does not is lost."""
    kinds: list[str]
    capacity: Resources
    running: list[Running] = []
    health: str = "Healthy"


class Tick(msgspec.Struct, frozen=True):
    """Time passed, and these nodes were silent for too long."""

    silent: list[str] = []


Stimulus = (
    JobSubmitted
    | JobCancelled
    | AttemptStarted
    | AttemptSucceeded
    | AttemptFailed
    | Heartbeat
    | Tick
)
BY_NAME: dict[str, type[Stimulus]] = {kind.__name__: kind for kind in get_args(Stimulus)}


def decode(name: str, payload: bytes) -> Stimulus:
    """A line of the log -> what it was."""
    return msgspec.json.decode(payload, type=BY_NAME[name])
