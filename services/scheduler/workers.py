"""What an agent makes of `AttemptPlaced`, and what it says of what became of it. Pure.

An attempt's share on a node is a few workers, and each carries everything that is needed to tell
it from others and to report on it: an engine keeps that beside the worker (labels of a container,
metadata of a Ray job, a file), so that an agent that starts again adopts what runs.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Resources,
)

GRACE_S_MAX = 300.0
TAIL_BYTES_MAX = 4096
"""Of what a worker wrote last, in its result or the reason why it failed."""

IDENTITY = ("project", "job", "attempt", "token", "node")


class Unusable(ValueError):
    """What was asked for can never be started here: trying again would end the same."""

    retryable = False


class Refused(Unusable):
    """The engine would not start it, for reasons of its own."""

    retryable = True


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The `spec` of a job that an engine runs."""

    argv: list[str]
    env: dict[str, str] = {}
    cwd: str = ""
    image: str = ""
    """For containers alone, and needed there."""
    grace_s: float = 10.0
    """From SIGTERM to SIGKILL."""


class Worker(msgspec.Struct, frozen=True):
    """One process, container or actor of an attempt."""

    project: str
    job: str
    attempt: int
    token: int
    node: str
    rank: int
    """In the whole gang."""
    local: int
    """0, 1, ... of those on this node."""
    here: int
    """So many are on this node."""
    world: int
    """So many are in the gang."""
    gpus: tuple[int, ...] = ()
    resources: Resources = Resources(cpu_milli=0, memory_mib=0)
    traceparent: str = ""

    @property
    def key(self) -> str:
        """Of the attempt's share on this node; safe as a file's name. No other platform's, where
        tokens repeat, and no other node's: two may share an engine."""
        return key_of(self)

    @property
    def name(self) -> str:
        return f"{self.key}-{self.local}"

    def environment(self) -> dict[str, str]:
        """What it is told of itself; its GPUs as CUDA wants them named."""
        told = {
            "JOB": self.job,
            "JOB_ATTEMPT": str(self.attempt),
            "JOB_TOKEN": str(self.token),
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local),
            "WORLD_SIZE": str(self.world),
        }
        if self.gpus:
            told["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpus))
        return told


class Seen(msgspec.Struct, frozen=True):
    """A worker as its engine has it."""

    worker: Worker
    running: bool
    exit_code: int | None = None
    """Negative for a signal; None while it runs, or where nobody can say any more."""
    problem: str = ""
    """Why it ended, if that is more than its exit code."""
    lost: bool = False
    """It ended through no fault of its own."""
    tail: str = ""

    @property
    def failed(self) -> bool:
        return not self.running and (self.exit_code != 0 or self.lost)

    @property
    def retryable(self) -> bool:
        """A signal that nobody here sent is the machine's doing, an exit code the user's."""
        return self.lost or self.exit_code is None or (self.exit_code < 0 and not self.problem)

    @property
    def reason(self) -> str:
        code = self.exit_code
        ended = "is gone" if code is None else f"ended with exit code {code}"
        if code is not None and code < 0:
            ended = f"was ended by signal {-code}"
        told = f"worker {self.worker.rank} {ended}"
        return ": ".join(part for part in (told, self.problem, self.tail.strip()) if part)


def spec_of(placed: AttemptPlaced) -> Spec:
    """Raises `Unusable`."""
    try:
        spec = msgspec.convert(placed.spec, Spec)
    except msgspec.ValidationError as error:
        raise Unusable(f"spec: {error}") from error
    if not spec.argv:
        raise Unusable("spec.argv: empty")
    if not 0 <= spec.grace_s <= GRACE_S_MAX:
        raise Unusable(f"spec.grace_s: 0 to {GRACE_S_MAX:g}, got {spec.grace_s:g}")
    return spec


def workers_of(placed: AttemptPlaced, traceparent: str) -> list[Worker]:
    world = sum(share.workers for share in placed.gang) or placed.workers
    return [
        Worker(
            project=placed.project,
            job=placed.job,
            attempt=placed.attempt,
            token=placed.token,
            node=placed.node,
            rank=placed.rank + local,
            local=local,
            here=placed.workers,
            world=world,
            gpus=tuple(placed.gpus[local]) if placed.gpus else (),
            resources=placed.resources,
            traceparent=traceparent,
        )
        for local in range(placed.workers)
    ]


def verdict_of(share: Sequence[Seen]) -> AttemptSucceeded | AttemptFailed | None:
    """None while nothing can be said; one that failed speaks for all."""
    failed = next((one for one in share if one.failed), None)
    if failed is not None:
        return failed_of(failed.worker, failed.reason, failed.retryable)
    if any(one.running for one in share):
        return None
    first = share[0]
    return AttemptSucceeded(**identity_of(first.worker), result={"tail": first.tail})


def failed_of(worker: Worker, reason: str, retryable: bool) -> AttemptFailed:
    return AttemptFailed(**identity_of(worker), reason=reason, retryable=retryable)


def started_of(worker: Worker) -> AttemptStarted:
    return AttemptStarted(**identity_of(worker))


def identity_of(one: Worker) -> dict[str, Any]:
    return {name: getattr(one, name) for name in IDENTITY}


def key_of(one: Worker | AttemptPlaced | AttemptStopped) -> str:
    said = msgspec.json.encode([one.project, one.job, one.attempt, one.token, one.node])
    return hashlib.sha256(said).hexdigest()[:32]
