"""The scheduler as a pure state machine: a stimulus in, the events it decides on out.

`handle` is deterministic: the same stimuli at the same times give the same state and the same
events, so that the log of stimuli is the state. Jobs and nodes move only along the two tables at
the end of this file; a move that is not in them raises `Impossible`.

What a token fences: every placement gets a larger one, and only the attempt that holds the job's
token counts. A node that comes back from the dead is told to stop what it still runs.
"""

import heapq
from collections.abc import Callable
from typing import Any

import msgspec

from libs.contracts.events import (
    AttemptFailed,
    AttemptStarted,
    AttemptSucceeded,
    Event,
    JobCancelled,
    JobRequested,
    Resources,
)
from services.scheduler.book import Book, Cause, Impossible
from services.scheduler.jobs import (
    CANCELLED,
    FAILED,
    LIVE,
    PLACED,
    RESULT_BYTES_MAX,
    RUNNING,
    STATES,
    SUCCEEDED,
    TERMINAL,
    WAITING,
    Job,
    Key,
    Placement,
    problem_of,
)
from services.scheduler.nodes import (
    DEGRADED,
    HEALTH,
    HEALTHY,
    INITIALIZING,
    NOTHING,
    SILENT_S,
    UNHEALTHY,
    Node,
    lacking,
    total,
)
from services.scheduler.placement import explain, first_fit
from services.scheduler.stimuli import (
    Heartbeat,
    JobSubmitted,
    QueueApplied,
    QueueDeleted,
    QueueSpec,
    Running,
    Stimulus,
    Tick,
)

FINISHED_MAX = 10_000
"""Ended jobs that are remembered; the oldest are forgotten first."""


class State(msgspec.Struct, kw_only=True):
    """A snapshot: all there is, apart from what `restore` rebuilds."""

    sequence: int
    token: int
    number: int
    jobs: list[Job]
    nodes: list[Node]
    finished: list[Key]
    specs: list[QueueSpec] = []


class Scheduler(Book):
    """Decides."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = 0
        """Stimuli handled so far."""

    def handle(self, stimulus: Stimulus, now: float) -> list[Event]:
        """Moves the state by one stimulus; returns what is to be said, in order."""
        self.now = now
        self.sequence += 1
        STIMULI[type(stimulus)](self, stimulus)
        self.place_what_fits()
        self.forget()
        decided, self.decided = self.decided, []
        return decided

    def is_news(self, stimulus: Stimulus) -> bool:
        """Whether it could change anything: of heartbeats and ticks, few do."""
        match stimulus:
            case Tick():
                return any(self.is_alive(name) for name in stimulus.silent)
            case Heartbeat():
                return self.tells_something(stimulus)
            case QueueApplied():
                return self.specs.get(stimulus.spec.queue) != stimulus.spec
            case QueueDeleted():
                return stimulus.queue in self.specs
        return True

    def is_alive(self, name: str) -> bool:
        return name in self.nodes and self.nodes[name].state != UNHEALTHY

    def tells_something(self, heartbeat: Heartbeat) -> bool:
        node = self.nodes.get(heartbeat.node)
        if node is None:
            return True
        known = (node.incarnation, node.kinds, node.capacity, node.state, node.stopping)
        kinds = sorted(heartbeat.kinds)
        told = (heartbeat.incarnation, kinds, heartbeat.capacity, heartbeat.health)
        return known != (*told, self.orphans(heartbeat))

    # --- what the stimuli do

    def on_submitted(self, stimulus: JobSubmitted) -> None:
        """A job that is known, even one that has ended, is not asked for twice."""
        if (stimulus.request.project, stimulus.request.job) in self.jobs:
            return
        field, problem = problem_of(stimulus.request)
        job = self.add(stimulus.request, stimulus.traceparent)
        if field:
            job.request = msgspec.structs.replace(job.request, spec={})
            self.move(job, FAILED, Cause(reason=f"{field}: {problem}"))

    def on_cancelled(self, cancelled: JobCancelled) -> None:
        """A job cancelled before it was asked for never starts: events may overtake."""
        job = self.jobs.get((cancelled.project, cancelled.job))
        if job is None:
            job = self.add(JobRequested(project=cancelled.project, job=cancelled.job, kind=""), "")
        if job.state not in TERMINAL:
            reason = cancelled.reason or "cancelled"
            self.move(job, CANCELLED, Cause(reason=reason, stop=True))

    def on_started(self, started: AttemptStarted) -> None:
        job = self.holder(started)
        if job is not None and job.state == PLACED:
            self.move(job, RUNNING, Cause())

    def on_succeeded(self, succeeded: AttemptSucceeded) -> None:
        job = self.holder(succeeded)
        if job is None:
            return
        size = len(msgspec.json.encode(succeeded.result))
        if size > RESULT_BYTES_MAX:
            reason = f"result: at most {RESULT_BYTES_MAX} bytes of JSON, got {size}"
            self.move(job, FAILED, Cause(reason=reason))
        else:
            self.move(job, SUCCEEDED, Cause(result=succeeded.result))

    def on_failed(self, failed: AttemptFailed) -> None:
        job = self.holder(failed)
        if job is None:
            return
        reason = f"attempt {job.attempt} on {failed.node}: {failed.reason}"
        if failed.retryable:
            self.try_again(job, Cause(reason=reason))
        else:
            self.move(job, FAILED, Cause(reason=reason))

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        node = self.nodes.get(heartbeat.node)
        if node is None:
            node = Node(
                node=heartbeat.node,
                incarnation=heartbeat.incarnation,
                kinds=sorted(heartbeat.kinds),
                capacity=heartbeat.capacity,
            )
            self.nodes[node.node] = node
            self.nodes = dict(sorted(self.nodes.items()))
        restarted = node.incarnation != heartbeat.incarnation
        node.incarnation = heartbeat.incarnation
        node.kinds = sorted(heartbeat.kinds)
        node.capacity = heartbeat.capacity
        if restarted:
            self.take_back_missing(node, heartbeat)
        self.shed(node)
        self.turn(node, heartbeat.health, f"node {node.node} says it is {heartbeat.health}")
        self.stop_orphans(node, self.orphans(heartbeat))

    def on_tick(self, tick: Tick) -> None:
        for name in tick.silent:
            if self.is_alive(name):
                reason = f"node {name} was silent for more than {SILENT_S:g} s"
                self.turn(self.nodes[name], UNHEALTHY, reason)

    def on_queue_applied(self, applied: QueueApplied) -> None:
        self.specs[applied.spec.queue] = applied.spec

    def on_queue_deleted(self, deleted: QueueDeleted) -> None:
        self.specs.pop(deleted.queue, None)

    # --- nodes

    def turn(self, node: Node, to: str, reason: str) -> None:
        if node.state == to:
            return
        change = NODE_MOVES.get((node.state, to))
        if change is None:
            raise Impossible(f"node {node.node}: {node.state} -> {to}")
        change(self, node, reason)
        node.state = to

    def stay(self, node: Node, reason: str) -> None:
        """What runs there goes on; only a Healthy node takes more."""

    def lose(self, node: Node, reason: str) -> None:
        for job in self.placed_on(node):
            self.try_again(job, Cause(reason=reason, stop=True))

    def take_back_missing(self, node: Node, heartbeat: Heartbeat) -> None:
        """What an earlier incarnation ran and the new one does not."""
        tokens = {running.token for running in heartbeat.running}
        for job in self.placed_on(node):
            assert job.placement is not None
            if job.placement.token not in tokens:
                reason = f"node {node.node} restarted without attempt {job.attempt}"
                self.try_again(job, Cause(reason=reason, stop=True))

    def shed(self, node: Node) -> None:
        """A node that shrank gives up its newest attempts until the rest fits."""
        newest_first = sorted(self.placed_on(node), key=token_of, reverse=True)
        for job in newest_first:
            if not lacking(node.allocated, node.capacity):
                break
            reason = f"node {node.node} shrank below what attempt {job.attempt} holds"
            self.try_again(job, Cause(reason=reason, stop=True))

    def placed_on(self, node: Node) -> list[Job]:
        return [job for job in self.jobs.values() if job.placement and on(job) == node.node]

    def orphans(self, heartbeat: Heartbeat) -> list[Running]:
        """What it runs under a token that no job holds there (any more)."""
        return sorted({one for one in heartbeat.running if not self.holds(heartbeat.node, one)})

    def holds(self, node: str, running: Running) -> bool:
        job = self.jobs.get((running.project, running.job))
        if job is None or job.placement is None:
            return False
        return job.placement == Placement(node, running.attempt, running.token)

    def stop_orphans(self, node: Node, orphans: list[Running]) -> None:
        """Says so once for each, until the node lists it no more."""
        for one in orphans:
            if one not in node.stopping:
                reason = f"token {one.token} is not the one in force"
                self.say_stop(one.project, one.job, one.attempt, one.token, node.node, reason)
        node.stopping = orphans

    # --- jobs

    def holder(self, about: AttemptStarted | AttemptSucceeded | AttemptFailed) -> Job | None:
        """The job, if this is its attempt in force; anything older is refused."""
        running = Running(about.project, about.job, about.attempt, about.token)
        return self.jobs[about.project, about.job] if self.holds(about.node, running) else None

    def place_what_fits(self) -> None:
        """Everything that fits now, best first; what fits nowhere lets smaller jobs pass."""
        hopeless: set[tuple[str, Resources]] = set()
        for _, _, key in list(heapq.merge(*self.queues.values())):
            job = self.jobs[key]
            shape = job.request.kind, job.need
            if shape in hopeless:
                continue
            node = first_fit(self.nodes.values(), *shape)
            if node is None:
                hopeless.add(shape)
            else:
                self.move(job, PLACED, Cause(node=node.node))

    def why(self, job: Job) -> str:
        """Why it waits, or how it or its last attempt ended."""
        if job.state != WAITING:
            return job.reason
        nodes = list(self.nodes.values())
        waits = explain(nodes, job.request.kind, job.request.workers, job.request.resources)
        return f"{waits}; before: {job.reason}" if job.reason else waits

    def forget(self) -> None:
        while len(self.finished) > FINISHED_MAX:
            key = next(iter(self.finished))
            del self.finished[key]
            del self.jobs[key]

    # --- what can be kept and checked

    def snapshot(self) -> State:
        return State(
            sequence=self.sequence,
            token=self.token,
            number=self.number,
            jobs=list(self.jobs.values()),
            nodes=list(self.nodes.values()),
            finished=list(self.finished),
            specs=list(self.specs.values()),
        )

    def validate(self) -> None:
        """Recomputes from the jobs alone what is kept beside them."""
        placed = [job for job in self.jobs.values() if job.placement is not None]
        for name, node in self.nodes.items():
            taken = total(job.need for job in placed if on(job) == name)
            assert node.node == name, name
            assert node.allocated == taken, (name, node.allocated, taken)
            assert not lacking(taken, node.capacity), (name, taken, node.capacity)
            assert node.state in HEALTH, (name, node.state)
            assert node.state != UNHEALTHY or taken == NOTHING, name
        assert list(self.nodes) == sorted(self.nodes)
        for key, job in self.jobs.items():
            assert job.key == key
            assert job.state in STATES, (key, job.state)
            assert (job.placement is not None) == (job.state in LIVE), (key, job.state)
            assert (key in self.finished) == (job.state in TERMINAL), (key, job.state)
            assert job.attempt <= job.request.attempts_max, (key, job.attempt)
        tokens = [token_of(job) for job in placed]
        assert len(set(tokens)) == len(tokens)
        assert all(0 < token <= self.token for token in tokens)
        self.validate_queues()

    def validate_queues(self) -> None:
        queued = [place for queue in self.queues.values() for place in queue]
        waiting = [job.place for job in self.jobs.values() if job.state == WAITING]
        assert sorted(queued) == sorted(waiting)
        for name, queue in self.queues.items():
            assert queue, name
            assert queue == sorted(queue), name
            assert all(self.jobs[key].request.queue == name for _, _, key in queue), name
        assert not self.decided


def restore(state: State) -> Scheduler:
    """A snapshot -> the scheduler it was taken of."""
    scheduler = Scheduler()
    scheduler.sequence, scheduler.token = state.sequence, state.token
    scheduler.number = state.number
    scheduler.jobs = {job.key: job for job in state.jobs}
    scheduler.nodes = {node.node: node for node in state.nodes}
    scheduler.finished = dict.fromkeys(state.finished)
    scheduler.specs = {spec.queue: spec for spec in state.specs}
    for job in state.jobs:
        if job.state == WAITING:
            scheduler.enqueue(job)
    scheduler.validate()
    return scheduler


def on(job: Job) -> str:
    """The node that holds it; "" for none."""
    return job.placement.node if job.placement else ""


def token_of(job: Job) -> int:
    return job.placement.token if job.placement else 0


STIMULI: dict[type[Stimulus], Callable[[Scheduler, Any], None]] = {
    JobSubmitted: Scheduler.on_submitted,
    JobCancelled: Scheduler.on_cancelled,
    AttemptStarted: Scheduler.on_started,
    AttemptSucceeded: Scheduler.on_succeeded,
    AttemptFailed: Scheduler.on_failed,
    Heartbeat: Scheduler.on_heartbeat,
    Tick: Scheduler.on_tick,
    QueueApplied: Scheduler.on_queue_applied,
    QueueDeleted: Scheduler.on_queue_deleted,
}

NodeMove = Callable[[Scheduler, Node, str], None]
NODE_MOVES: dict[tuple[str, str], NodeMove] = {
    (INITIALIZING, HEALTHY): Scheduler.stay,
    (INITIALIZING, DEGRADED): Scheduler.stay,
    (INITIALIZING, UNHEALTHY): Scheduler.lose,
    (HEALTHY, INITIALIZING): Scheduler.stay,
    (HEALTHY, DEGRADED): Scheduler.stay,
    (HEALTHY, UNHEALTHY): Scheduler.lose,
    (DEGRADED, INITIALIZING): Scheduler.stay,
    (DEGRADED, HEALTHY): Scheduler.stay,
    (DEGRADED, UNHEALTHY): Scheduler.lose,
    (UNHEALTHY, INITIALIZING): Scheduler.stay,
    (UNHEALTHY, HEALTHY): Scheduler.stay,
    (UNHEALTHY, DEGRADED): Scheduler.stay,
}
