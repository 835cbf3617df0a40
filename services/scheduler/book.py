"""The book: jobs, nodes, lines and quotas, and every move a job can make.

A move along `JOB_MOVES` keeps all of them in step and notes what is to be said about it.
"""

import bisect
import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator

import msgspec

from libs.contracts.events import (
    AttemptPlaced,
    AttemptStopped,
    Event,
    JobFailed,
    JobRequested,
    JobSucceeded,
    Share,
)
from services.scheduler import levels, pool
from services.scheduler.debts import Debts
from services.scheduler.deployments import Deployment
from services.scheduler.jobs import (
    CANCELLED,
    FAILED,
    PLACED,
    RUNNING,
    SUCCEEDED,
    WAITING,
    Ask,
    Job,
    Key,
    Part,
    Placement,
)
from services.scheduler.lines import Lines
from services.scheduler.nodes import HEALTHY, Node, minus, plus
from services.scheduler.quota import Amounts, Quota, amounts_of, amounts_placed
from services.scheduler.shapes import Machine, Spot
from services.scheduler.stimuli import QueueSpec, Running


class Impossible(AssertionError):
    """A move that no table has: a mistake of ours, never of a user's."""


class Cause(msgspec.Struct, frozen=True):
    """What a move needs to know."""

    reason: str = ""
    spots: tuple[Spot, ...] = ()
    """Of each worker, by rank."""
    result: dict[str, object] = {}
    teller: str = ""
    """The node that said so: its share has ended, the others are told to stop."""
    preempted: bool = False


class Claim(msgspec.Struct, frozen=True):
    """One way to place a job, and what that takes of its queue's quota."""

    job: Job
    ask: Ask
    amounts: Amounts


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
        """By name, sorted."""
        self.pool = pool.make("priced")
        self.lines = Lines()
        self.quota = Quota()
        self.debts = Debts(self.quota)
        self.finished: deque[Key] = deque()
        """Jobs that have ended, the first first."""
        self.machines: dict[str, Machine] = {}
        self.deployments: dict[tuple[str, str], Deployment] = {}
        """By (project, model)."""
        self.decided: list[Event] = []
        self.on_node: dict[str, dict[Key, None]] = {}
        """In the order of their tokens."""
        self.running: dict[str, list[tuple[int, int, Job]]] = {}
        """Of each queue what is placed, by (-rank, token): who gives way last. What comes is at the
        end: in front of 90,000 it took 25 us."""
        self.ends: list[tuple[float, int, Job]] = []
        """When what is placed ends at the latest, where that is known; by token."""
        self.models: Counter[str] = Counter()
        """Nodes of each GPU model."""
        self.overdue: list[tuple[int, int, int, Job]] = []
        """A heap of (when, number, attempts, job): who waits in a queue by attained service."""
        self.token_before = 0
        """Of the last placement before the stimulus that is being handled."""
        self.evicted: set[Key] = set()
        """By the stimulus that is being handled."""
        self.freed: set[str] = set()
        """Nodes that have more room than when lines were shut."""
        self.loosened: set[str] = set()
        """Queues that hold less."""
        self.touched: set[Key] = set()
        """Jobs that are not as they were when these were last written down, or gone."""
        self.changes = 0
        """Of nodes and of what is placed on them."""

    @property
    def specs(self) -> dict[str, QueueSpec]:
        return self.quota.specs

    def add(self, request: JobRequested, traceparent: str) -> Job:
        self.number += 1
        job = Job(
            request=request,
            traceparent=traceparent,
            number=self.number,
            submitted_at=self.now,
            waiting_since=self.now,
        )
        assert job.key not in self.jobs, job.key
        self.jobs[job.key] = job
        self.enqueue(job)
        return job

    def try_again(self, job: Job, cause: Cause) -> None:
        if job.attempt - job.preempted < job.request.attempts_max:
            self.move(job, WAITING, cause)
        else:
            reason = f"{cause.reason} (all {job.request.attempts_max} attempts used)"
            self.move(job, FAILED, msgspec.structs.replace(cause, reason=reason))

    def move(self, job: Job, to: str, cause: Cause) -> None:
        change = JOB_MOVES.get((job.state, to))
        if change is None:
            raise Impossible(f"job {'/'.join(job.key)}: {job.state} -> {to}")
        self.touched.add(job.key)
        self.debts.settle(job.request.queue, self.now, self.lines)
        before, job.state = job.state, to
        if before == WAITING:
            self.lines.left(job)
        change(self, job, cause)

    # --- what the moves do

    def start(self, job: Job, cause: Cause) -> None:
        rank = self.rank(job)
        self.token += 1
        job.attempt += 1
        parts = list(self.parts_of(cause.spots))
        job.placement = Placement(job.attempt, self.token, parts, rank, self.now)
        self.hold(job)
        gang = [Share(part.node, len(part.gpus), part.rank) for part in parts]
        for part in parts:
            placed = AttemptPlaced(
                project=job.request.project,
                job=job.request.job,
                attempt=job.attempt,
                token=self.token,
                node=part.node,
                kind=job.request.kind,
                workers=len(part.gpus),
                spec=job.request.spec,
                rank=part.rank,
                gpus=[list(gpus) for gpus in part.gpus] if job.gpu_milli else [],
                gang=gang,
                resources=job.request.resources,
            )
            self.decided.append(placed)

    def parts_of(self, spots: tuple[Spot, ...]) -> Iterator[Part]:
        """The workers of one node follow each other."""
        nodes = dict.fromkeys(spot.node for spot in spots)
        rank = 0
        for name in nodes:
            gpus = [spot.gpus for spot in spots if spot.node == name]
            yield Part(name, rank, gpus, self.nodes[name].gpu_model)
            rank += len(gpus)

    def confirm(self, job: Job, cause: Cause) -> None:
        """All its nodes have started it."""
        self.forget_end(job)
        job.live.running_at = self.now
        self.note_end(job)
        self.changes += bool(job.request.duration_s)  # the order of ends

    def queue_again(self, job: Job, cause: Cause) -> None:
        self.release(job, cause)
        job.reason = cause.reason
        job.waiting_since = self.now
        job.preempted += cause.preempted
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
        """Its nodes, wherever it is."""
        job.reason = cause.reason
        if job.placement is not None:
            self.release(job, cause)

    def release(self, job: Job, cause: Cause) -> None:
        """Everything everywhere; whoever may still run a share of it is told to stop."""
        placement = job.live
        self.let_go(job)
        for part in placement.parts:
            if part.node != cause.teller and part.node not in placement.done:
                identified = (*job.key, placement.attempt, placement.token)
                node = self.nodes[part.node]
                node.stopping = sorted([*node.stopping, Running(*identified)])
                self.say_stop(*identified, part.node, cause.reason)
        job.attained_gpu_s = job.attained(self.now)
        job.ran_s += self.now - placement.placed_at
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
        job.ended_at = self.now
        self.finished.append(job.key)

    def enqueue(self, job: Job) -> None:
        self.touched.add(job.key)
        self.debts.settle(job.request.queue, self.now, self.lines)
        spec = self.specs.get(job.request.queue)
        line = self.lines.add(job, spec)
        if line.head is job and not job.attempt:
            self.lines.may_evict.add(line.name)
        if spec is not None and spec.order == "attained" and not job.is_overdue:
            overdue_at = math.ceil(job.submitted_at + job.ran_s + levels.WAIT_MAX_S)
            heapq.heappush(self.overdue, (overdue_at, job.number, job.attempt, job))

    # --- what is kept beside the jobs

    def hold(self, job: Job) -> None:
        """Takes what its placement says."""
        placement = job.live
        self.changes += 1
        for shape, spot in job.releases():
            self.pool.take(shape, spot)
        for part in placement.parts:
            node = self.nodes[part.node]
            node.allocated = plus(node.allocated, job.need_of(len(part.gpus)))
            self.on_node.setdefault(part.node, {})[job.key] = None
        self.quota.take(job.request.queue, amounts_placed(job.ask, placement))
        entry = (-placement.rank, placement.token, job)
        bisect.insort(self.running.setdefault(job.request.queue, []), entry)
        self.note_end(job)

    def let_go(self, job: Job) -> None:
        placement = job.live
        self.changes += 1
        for shape, spot in job.releases():
            self.pool.release(shape, spot)
        for part in placement.parts:
            node = self.nodes[part.node]
            node.allocated = minus(node.allocated, job.need_of(len(part.gpus)))
            del self.on_node[part.node][job.key]
            self.freed.add(part.node)
        self.quota.take(job.request.queue, amounts_placed(job.ask, placement), -1)
        self.loosened.add(job.request.queue)
        queue = self.running[job.request.queue]
        queue.pop(bisect.bisect_left(queue, (-placement.rank, placement.token)))
        self.forget_end(job)

    def end_of(self, job: Job) -> tuple[float, int]:
        placement = job.live
        since = placement.running_at or placement.placed_at
        return since + job.request.duration_s, placement.token

    def note_end(self, job: Job) -> None:
        if job.request.duration_s:
            bisect.insort(self.ends, (*self.end_of(job), job))

    def forget_end(self, job: Job) -> None:
        if job.request.duration_s:
            self.ends.pop(bisect.bisect_left(self.ends, self.end_of(job)))

    # --- what those who decide ask

    def rank(self, job: Job) -> int:
        spec = self.specs.get(job.request.queue)
        ages = spec is not None and spec.order == "priority"
        return job.rank(spec.aging_s if spec and ages else 0, self.now)

    def is_even(self, queue: str, amounts: Amounts) -> bool:
        """Whether its queue owes its cohort nothing of these resources."""
        return self.debts.is_even(queue, amounts, self.now, self.lines)

    def is_due(self, queue: str, amounts: Amounts) -> bool:
        """Whether these are its own, and it owes none of them."""
        return self.quota.owns(queue, amounts) and self.is_even(queue, amounts)

    def running_of(self, queue: str) -> list[Job]:
        """What is placed, in the order in which it gives way."""
        return [job for _, _, job in reversed(self.running.get(queue, ()))]

    def ends_until(self, at: float, most: int) -> list[Job]:
        last = bisect.bisect_right(self.ends, at, key=lambda one: one[0])
        return [job for _, _, job in self.ends[: min(last, most)]]

    def is_open(self, node: str) -> bool:
        return node in self.nodes and self.nodes[node].state == HEALTHY

    def spots_for(self, ask: Ask) -> list[Spot] | None:
        if ask.workers == 1:
            spot = self.pool.find(ask.shape)
            return None if spot is None else [spot]
        return self.pool.find_gang(ask.shape, ask.workers, ask.one_node)

    def known_models(self) -> list[str]:
        return sorted(model for model, nodes in self.models.items() if model and nodes)

    def claims(self, job: Job) -> Iterator[Claim]:
        """The ways to place it: one, or for each model of GPU if its queue counts them apart."""
        ask, spec = job.ask, self.specs.get(job.request.queue)
        if spec is not None and spec.placement == "spread":
            shape = msgspec.structs.replace(ask.shape, spread=True)
            ask = msgspec.structs.replace(ask, shape=shape)
        if not ask.shape.gpus or not self.quota.flavors(job.request.queue):
            yield Claim(job, ask, amounts_of(ask, {}))
            return
        for model in ask.shape.gpu_models or self.known_models():
            shape = msgspec.structs.replace(ask.shape, gpu_models=(model,))
            one = msgspec.structs.replace(ask, shape=shape)
            yield Claim(job, one, amounts_of(ask, {model: ask.workers}))


JobMove = Callable[[Book, Job, Cause], None]
JOB_MOVES: dict[tuple[str, str], JobMove] = {
    (WAITING, PLACED): Book.start,
    (WAITING, FAILED): Book.give_up,
    (WAITING, CANCELLED): Book.call_off,
    (PLACED, RUNNING): Book.confirm,
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
