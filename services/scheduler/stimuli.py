"""Everything that can move the scheduler; each is a line of its log.

Requests and results come from the bus as the contracts' own events, heartbeats from nodes, ticks
from the clock.
"""

from typing import Literal, get_args

import msgspec

from libs.contracts.autoscaling import Autoscaling
from libs.contracts.events import (
    AttemptFailed,
    AttemptStarted,
    AttemptSucceeded,
    JobCancelled,
    JobRequested,
    Resources,
)
from services.scheduler.scores import Prices

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


class Load(msgspec.Struct, frozen=True):
    """What one replica of a deployment had to do since it last said so."""

    project: str
    model: str
    concurrency_milli: int
    """Requests there at a time, waiting or being computed: the average, and at least those that
    wait now."""
    p95_ms: int = 0
    """From arrival to answer; 0 where nothing was answered."""
    requests: int = 0
    ready: bool = True
    """It is served there; else somebody waits for it there."""


class Heartbeat(msgspec.Struct, frozen=True):
    """What a node says of itself, twice a second, on `heartbeats.<node>`; where several agents are
    a node together, each on `heartbeats.<agent>` (`voices.py`)."""

    node: str
    incarnation: str | int
    """New whenever the agent starts; what an earlier one ran and this one does not is lost."""
    kinds: list[str]
    capacity: Resources
    running: list[Running] = []
    health: str = "Healthy"
    gpu_model: str = ""
    """All GPUs of a node are of one model."""
    labels: dict[str, str] = {}
    loads: list[Load] = []
    """What it serves, and what somebody waits for there. Not logged: decisions on it are."""
    agent: str = ""
    """Who says it, of several that are the node together; "" where one is all of it."""


class Tick(msgspec.Struct, frozen=True):
    """Time passed, and these nodes were silent for too long."""

    silent: list[str] = []
    look: bool = False
    """What the scheduler wanted to look at again by now (`Scheduler.due_at`) is due."""


class Deployed(msgspec.Struct, frozen=True, kw_only=True):
    """The registry wants it served, in this generation and by so many replicas."""

    project: str
    model: str
    generation: int
    wanted: Autoscaling
    resources: Resources
    traceparent: str = ""


class Scaled(msgspec.Struct, frozen=True):
    """A deployment's traffic asks for so many replicas; `spare` of them have nothing to do."""

    project: str
    model: str
    replicas: int
    spare: int = 0


class QueueSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A queue, in Kueue's words. Amounts are by resource: `cpu_milli`, `memory_mib`, `gpu_milli`,
    or `gpu_milli/<MODEL>` for the GPUs of one model.
    """

    queue: str
    cohort: str = ""
    """Queues of one cohort lend each other what they do not use; "" for alone."""
    nominal: dict[str, int] = {}
    """What is its own; a resource that is not named is not limited."""
    borrowing_limit: dict[str, int] = {}
    """At most so much more than its own; not named: whatever the cohort lends."""
    lending_limit: dict[str, int] = {}
    """At most so much of its own; not named: all of it."""
    weight: int = 1000
    """Milli, in the fair share of what is borrowed."""
    order: Literal["priority", "attained"] = "priority"
    """`attained`: least attained service first, for jobs whose duration nobody knows."""
    within_queue: Literal["never", "lower"] = "never"
    """Which jobs of this queue may be preempted for another of its own."""
    reclaim: Literal["never", "lower", "any"] = "never"
    """Which borrowers of the cohort may be preempted for what is this queue's own."""
    grace_s: int = 0
    """How long a borrower may keep what is reclaimed."""
    aging_s: int = 0
    """Waiting so long raises a job's priority by 1; 0 for never."""
    placement: Literal["pack", "spread"] = "pack"
    """`spread`: each job where most is free. A gang stays together as it can, either way."""


class QueueApplied(msgspec.Struct, frozen=True):
    """The queue is as this says from now on."""

    spec: QueueSpec


class QueueDeleted(msgspec.Struct, frozen=True):
    """Its jobs stay, without quota and by priority."""

    queue: str


class Planned(msgspec.Struct, frozen=True):
    """The planner's prices (`planner.py`): what placement goes by from now on."""

    prices: Prices


Stimulus = (
    JobSubmitted
    | JobCancelled
    | AttemptStarted
    | AttemptSucceeded
    | AttemptFailed
    | Heartbeat
    | Tick
    | Deployed
    | Scaled
    | QueueApplied
    | QueueDeleted
    | Planned
)
BY_NAME: dict[str, type[Stimulus]] = {kind.__name__: kind for kind in get_args(Stimulus)}


def decode(name: str, payload: bytes) -> Stimulus:
    """A line of the log -> what it was."""
    return msgspec.json.decode(payload, type=BY_NAME[name])
