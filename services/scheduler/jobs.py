"""Jobs: what was asked for, and what became of it."""

import re

import msgspec

from libs.contracts.events import JobRequested, Resources
from services.scheduler.nodes import DIMENSIONS, times
from services.scheduler.stimuli import AMOUNT_MAX

WAITING, PLACED, RUNNING = "waiting", "placed", "running"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
STATES = (WAITING, PLACED, RUNNING, SUCCEEDED, FAILED, CANCELLED)
LIVE = (PLACED, RUNNING)
TERMINAL = (SUCCEEDED, FAILED, CANCELLED)

PROJECT = re.compile(r"[A-Za-z0-9_-]{1,63}")
"""A token of the bus subjects its events go out under."""
NAME = re.compile(r"[A-Za-z0-9_.:@-]{1,200}")
WORKERS_MAX = 1024
PRIORITY_MAX = 1_000_000
ATTEMPTS_MAX = 1_000_000_000
SPEC_BYTES_MAX = RESULT_BYTES_MAX = 1 << 20
"""Spec and result travel together in `JobSucceeded`, which must fit a bus message (8 MiB)."""

Key = tuple[str, str]
"""(project, job)"""


class Placement(msgspec.Struct, frozen=True):
    """The one live attempt of a job: all its workers, on one node."""

    node: str
    attempt: int
    token: int


class Job(msgspec.Struct, kw_only=True):
    request: JobRequested
    """Without its spec once the job has ended."""
    traceparent: str
    number: int
    """Order of submission."""
    submitted_at: float
    waiting_since: float
    state: str = WAITING
    attempt: int = 0
    """Of the last placement; 0 before the first."""
    placement: Placement | None = None
    reason: str = ""
    """What ended it, or its last attempt."""
    result: dict[str, object] = {}

    @property
    def key(self) -> Key:
        return self.request.project, self.request.job

    @property
    def need(self) -> Resources:
        """Of the whole gang."""
        return times(self.request.workers, self.request.resources)

    @property
    def place(self) -> tuple[int, int, Key]:
        """In its queue: by priority, then by submission."""
        return -self.request.priority, self.number, self.key


def problem_of(request: JobRequested) -> tuple[str, str]:
    """(field, what is wrong with it) of a request that can never be a job; else ("", "")."""
    if not PROJECT.fullmatch(request.project):
        return "project", f"1 to 63 of A-Z a-z 0-9 _ -, got {request.project[:80]!r}"
    for field in ("job", "kind", "queue"):
        name = getattr(request, field)
        if not NAME.fullmatch(name):
            return field, f"1 to 200 of A-Z a-z 0-9 _ . : @ -, got {name[:80]!r}"
    bounds = {
        "workers": (1, request.workers, WORKERS_MAX),
        "attempts_max": (1, request.attempts_max, ATTEMPTS_MAX),
        "priority": (-PRIORITY_MAX, request.priority, PRIORITY_MAX),
    }
    for name in DIMENSIONS:
        bounds[f"resources.{name}"] = (0, getattr(request.resources, name), AMOUNT_MAX)
    for field, (low, amount, high) in bounds.items():
        if not low <= amount <= high:
            return field, f"{low} to {high}, got {amount}"
    size = len(msgspec.json.encode(request.spec))
    if size > SPEC_BYTES_MAX:
        return "spec", f"at most {SPEC_BYTES_MAX} bytes of JSON, got {size}"
    return "", ""
