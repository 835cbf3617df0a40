"""The book: jobs, nodes and queues, and every move a job can make.

A move along `JOB_MOVES` keeps the three in step and notes what is to be said about it.
"""

import bisect
from collections.abc import Callable

import msgspec

from libs.contracts.events import (
    AttemptPlaced,
    AttemptStopped,
    Event,
    JobFailed,
    JobRequested,
    JobSucceeded,
)
from services.scheduler.jobs import (
    CANCELLED,
    FAILED,
    PLACED,
    RUNNING,
    SUCCEEDED,
    WAITING,
    Job,
    Key,
    Placement,
)
from services.scheduler.nodes import Node, minus, plus
from services.scheduler.stimuli import QueueSpec, Running


class Impossible(AssertionError):
    """A move that no table has: a mistake of ours, never of a user's."""


class Cause(msgspec.Struct, frozen=True):
    """What a move needs to know."""

    reason: str = ""
    node: str = ""
    result: dict[str, object] = {}
    stop: bool = False
    """The attempt may still run: its node is told to stop it."""


class Book:
    """What there is, without what decides."""

    def __init__(self) -> None:
        self.token = 0
        """Of the last placement."""
        self.number = 0
        """Of the last job."""
        self.now = 0.0
        self.jobs: dict[Key, Job] = {}
        self.nodes: dict[str, Node] = {}
        """By name, sorted: the order of first fit."""
        self.queues: dict[str, list[tuple[int, int, Key]]] = {}
        self.finished: dict[Key, None] = {}
        self.specs: dict[str, QueueSpec] = {}
        self.decided: list[Event] = []

    def add(self, request: JobRequested, traceparent: str) -> Job:
        self.number += 1
        job = Job(
            request=request,
            traceparent=traceparent,
            number=self.number,
            submitted_at=self.now,
            waiting_since=self.now,
        )
        self.jobs[job.key] = job
        self.enqueue(job)
        return job

    def try_again(self, job: Job, cause: Cause) -> None:
        if job.attempt < job.request.attempts_max:
            self.move(job, WAITING, cause)
        else:
            reason = f"{cause.reason} (all {job.request.attempts_max} attempts used)"
            self.move(job, FAILED, msgspec.structs.replace(cause, reason=reason))

    def move(self, job: Job, to: str, cause: Cause) -> None:
        change = JOB_MOVES.get((job.state, to))
        if change is None:
            raise Impossible(f"job {'/'.join(job.key)}: {job.state} -> {to}")
        job.state = to
        change(self, job, cause)

    def start(self, job: Job, cause: Cause) -> None:
        self.dequeue(job)
        node = self.nodes[cause.node]
        node.allocated = plus(node.allocated, job.need)
        self.token += 1
        job.attempt += 1
        job.placement = Placement(node.node, job.attempt, self.token)
        self.decided.append(
            AttemptPlaced(
                project=job.request.project,
                job=job.request.job,
                attempt=job.attempt,
                token=self.token,
                node=node.node,
                kind=job.request.kind,
                workers=job.request.workers,
                spec=job.request.spec,
            )
        )

    def note(self, job: Job, cause: Cause) -> None:
        """It runs."""

    def queue_again(self, job: Job, cause: Cause) -> None:
        self.release(job, cause)
        job.reason = cause.reason
        job.waiting_since = self.now
        self.enqueue(job)

    def accept(self, job: Job, cause: Cause) -> None:
        self.release(job, cause)
        job.result = cause.result
        job.reason = ""
        request = job.request
        self.decided.append(
            JobSucceeded(
                project=request.project,
                job=request.job,
                kind=request.kind,
                attempt=job.attempt,
                spec=request.spec,
                result=cause.result,
            )
        )
        self.end(job)

    def give_up(self, job: Job, cause: Cause) -> None:
        self.leave(job, cause)
        request = job.request
        self.decided.append(
            JobFailed(
                project=request.project,
                job=request.job,
                kind=request.kind,
                attempt=job.attempt,
                spec=request.spec,
                reason=cause.reason,
            )
        )
        self.end(job)

    def call_off(self, job: Job, cause: Cause) -> None:
        self.leave(job, cause)
        self.end(job)

    def leave(self, job: Job, cause: Cause) -> None:
        """Its queue or its node, wherever it is."""
        job.reason = cause.reason
        if job.placement is None:
            self.dequeue(job)
        else:
            self.release(job, cause)

    def release(self, job: Job, cause: Cause) -> None:
        placement = job.placement
        assert placement is not None
        node = self.nodes[placement.node]
        node.allocated = minus(node.allocated, job.need)
        if cause.stop:
            identified = (*job.key, placement.attempt, placement.token)
            node.stopping = sorted([*node.stopping, Running(*identified)])
            self.say_stop(*identified, node.node, cause.reason)
        job.placement = None

    def say_stop(
        self, project: str, job: str, attempt: int, token: int, node: str, reason: str
    ) -> None:
        self.decided.append(
            AttemptStopped(
                project=project, job=job, attempt=attempt, token=token, node=node, reason=reason
            )
        )

    def end(self, job: Job) -> None:
        job.request = msgspec.structs.replace(job.request, spec={})
        self.finished[job.key] = None

    def enqueue(self, job: Job) -> None:
        bisect.insort(self.queues.setdefault(job.request.queue, []), job.place)

    def dequeue(self, job: Job) -> None:
        queue = self.queues[job.request.queue]
        queue.pop(bisect.bisect_left(queue, job.place))
        if not queue:
            del self.queues[job.request.queue]


JobMove = Callable[[Book, Job, Cause], None]
JOB_MOVES: dict[tuple[str, str], JobMove] = {
    (WAITING, PLACED): Book.start,
    (WAITING, FAILED): Book.give_up,
    (WAITING, CANCELLED): Book.call_off,
    (PLACED, RUNNING): Book.note,
    (PLACED, WAITING): Book.queue_again,
    (PLACED, SUCCEEDED): Book.accept,
    (PLACED, FAILED): Book.give_up,
    (PLACED, CANCELLED): Book.call_off,
    (RUNNING, WAITING): Book.queue_again,
    (RUNNING, SUCCEEDED): Book.accept,
    (RUNNING, FAILED): Book.give_up,
    (RUNNING, CANCELLED): Book.call_off,
}
"""A result may overtake the news that its attempt started, so `placed` ends like `running`."""
