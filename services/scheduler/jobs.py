"""Jobs: what was asked for, where it is, and what became of it."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Generic, TypeVar

import msgspec

from libs.contracts.events import JobRequested, Resources
from services.scheduler import levels
from services.scheduler.nodes import DIMENSIONS
from services.scheduler.shapes import GPU_MILLI, GPUS_MAX, Shape, Spot
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
DURATION_S_MAX = 1 << 31
MODELS_MAX = LABELS_MAX = 64
SPEC_BYTES_MAX = RESULT_BYTES_MAX = 1 << 20
"""Spec and result travel together in `JobSucceeded`, which must fit a bus message (8 MiB)."""

ASKS_KEPT = 1 << 12
"""Of jobs that ask for the same there is one `Ask`, as long as no more are asked for in between."""

Key = tuple[str, str]
"""(project, job)"""
T = TypeVar("T")


class once(Generic[T]):  # noqa: N801 - used as a decorator
    """`functools.cached_property` without its lock, which costs 1 us a job until Python 3.12."""

    def __init__(self, of: "Callable[[Job], T]") -> None:
        self.of = of
        self.name = of.__name__

    def __get__(self, job: "Job", _: Any) -> T:
        value = vars(job)[self.name] = self.of(job)
        return value


class Ask(msgspec.Struct, frozen=True, order=True):
    """What decides whether a gang fits; jobs that ask for the same wait in one line."""

    shape: Shape
    workers: int
    one_node: bool


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one node holds of an attempt."""

    node: str
    rank: int
    """Of the first worker here."""
    gpus: list[tuple[int, ...]]
    """Of each worker here."""
    model: str = ""
    """Of those GPUs, as the node said when it was placed."""

    @property
    def spots(self) -> list[Spot]:
        return [Spot(self.node, gpus) for gpus in self.gpus]


class Placement(msgspec.Struct, omit_defaults=True):
    """The one live attempt of a job: all its workers."""

    attempt: int
    token: int
    parts: list[Part] = []
    rank: int = 0
    """The job's priority when it was placed, aged: what it is defended with."""
    placed_at: float = 0.0
    running_at: float = 0.0
    """Since when all its nodes have started it; 0 before."""
    started: list[str] = []
    """Nodes that said they have."""
    done: list[str] = []
    """Nodes that said they are through."""
    result: dict[str, object] = {}
    """Of its first worker, until all are through."""
    node: str = ""
    """Where a snapshot of an earlier release has the whole gang; `restore` makes a part of it."""

    @property
    def nodes(self) -> set[str]:
        return {part.node for part in self.parts}

    def part_on(self, node: str) -> Part | None:
        return next((part for part in self.parts if part.node == node), None)


class Job(msgspec.Struct, kw_only=True, dict=True, omit_defaults=True):
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
    preempted: int = 0
    """Attempts that were taken back for another job; they do not count against its limit."""
    attained_gpu_s: float = 0.0
    """Service of earlier attempts."""
    ran_s: float = 0.0
    """Time in placements, which does not age it."""
    is_overdue: bool = False
    """It has waited as long as anybody may, in a queue by attained service."""
    ended_at: float = 0.0

    @once
    def key(self) -> Key:
        return self.request.project, self.request.job

    @once
    def ask(self) -> Ask:
        return ask_of(self.request)

    @once
    def gpu_milli(self) -> int:
        """Of the whole gang."""
        return self.ask.workers * self.ask.shape.gpus * self.ask.shape.gpu_milli

    @property
    def need(self) -> Resources:
        """Of the whole gang."""
        return self.need_of(self.ask.workers)

    def need_of(self, workers: int) -> Resources:
        """Of so many of its workers; GPUs as milli in all."""
        shape = self.ask.shape
        gpu_milli = workers * shape.gpus * shape.gpu_milli
        return Resources(workers * shape.cpu_milli, workers * shape.memory_mib, gpu_milli)

    @property
    def live(self) -> Placement:
        """Of a job that is placed."""
        assert self.placement is not None, self.key
        return self.placement

    def releases(self) -> list[tuple[Shape, Spot]]:
        """What its end gives back."""
        shape = self.ask.shape
        return [(shape, spot) for part in self.live.parts for spot in part.spots]

    def attained(self, now: float) -> float:
        """GPU seconds so far, of all attempts."""
        placement = self.placement
        if placement is None or not placement.running_at:
            return self.attained_gpu_s
        return self.attained_gpu_s + self.gpu_milli / GPU_MILLI * (now - placement.running_at)

    def waited(self, now: float) -> float:
        """In all, seconds; a placement's time is none of it."""
        end = now if self.placement is None else self.placement.placed_at
        return end - self.submitted_at - self.ran_s

    def standing(self, now: float) -> levels.Standing:
        return levels.Standing(self.number, self.gpu_milli, self.attained(now), self.waited(now))

    def rank(self, aging_s: int, now: float) -> int:
        """Its priority, raised by what it has waited; frozen while it is placed."""
        if self.placement is not None:
            return self.placement.rank
        return self.request.priority + (int(self.waited(now) // aging_s) if aging_s else 0)


def ask_of(request: JobRequested) -> Ask:
    return asked(
        request.resources,
        request.workers,
        request.topology == "node",
        request.kind,
        tuple(request.gpu_models),
        tuple(request.labels.items()),
    )


@lru_cache(ASKS_KEPT)
def asked(
    each: Resources,
    workers: int,
    one_node: bool,
    kind: str,
    models: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
) -> Ask:
    """2000 milli of one GPU are two whole ones: so they were asked for before there was `gpus`."""
    gpus, milli = (each.gpus, each.gpu_milli) if each.gpu_milli else (0, 0)
    if gpus == 1 and milli > GPU_MILLI:
        gpus, milli = milli // GPU_MILLI, GPU_MILLI
    shape = Shape(
        cpu_milli=each.cpu_milli,
        memory_mib=each.memory_mib,
        gpus=gpus,
        gpu_milli=milli if gpus else 0,
        gpu_models=tuple(sorted(set(models))),
        kind=kind,
        labels=tuple(sorted(labels)),
    )
    return Ask(shape, workers, one_node)


def problem_of(request: JobRequested) -> tuple[str, str]:
    """(field, what is wrong with it) of a request that can never be a job; else ("", "")."""
    if not PROJECT.fullmatch(request.project):
        return "project", f"1 to 63 of A-Z a-z 0-9 _ -, got {request.project[:80]!r}"
    for field in ("job", "kind", "queue"):
        name = getattr(request, field)
        if not NAME.fullmatch(name):
            return field, f"1 to 200 of A-Z a-z 0-9 _ . : @ -, got {name[:80]!r}"
    for field, (low, amount, high) in bounds_of(request).items():
        if not low <= amount <= high:
            return field, f"{low} to {high}, got {amount}"
    if problem := gpu_problem_of(request.resources):
        return "resources.gpu_milli", problem
    if not request.spec:
        return "", ""
    size = len(msgspec.json.encode(request.spec))
    if size > SPEC_BYTES_MAX:
        return "spec", f"at most {SPEC_BYTES_MAX} bytes of JSON, got {size}"
    return "", ""


def bounds_of(request: JobRequested) -> dict[str, tuple[int, int, int]]:
    """Field -> (least, asked for, most)."""
    bounds = {
        "workers": (1, request.workers, WORKERS_MAX),
        "attempts_max": (1, request.attempts_max, ATTEMPTS_MAX),
        "priority": (-PRIORITY_MAX, request.priority, PRIORITY_MAX),
        "duration_s": (0, request.duration_s, DURATION_S_MAX),
        "gpu_models": (0, len(request.gpu_models), MODELS_MAX),
        "labels": (0, len(request.labels), LABELS_MAX),
        "resources.gpus": (0, request.resources.gpus, GPUS_MAX),
    }
    for name in DIMENSIONS:
        bounds[f"resources.{name}"] = (0, getattr(request.resources, name), AMOUNT_MAX)
    return bounds


def gpu_problem_of(each: Resources) -> str:
    """A part of one GPU, or whole ones."""
    milli = each.gpu_milli
    if each.gpus > 1 and milli not in (0, GPU_MILLI):
        return f"{GPU_MILLI} of each of {each.gpus} GPUs, or a part of one; got {milli}"
    if milli > GPU_MILLI and (milli % GPU_MILLI or milli > GPUS_MAX * GPU_MILLI):
        return f"at most {GPU_MILLI}, or whole GPUs up to {GPUS_MAX * GPU_MILLI}; got {milli}"
    return ""
