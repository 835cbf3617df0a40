"""The scheduler as a pure state machine: a stimulus in, the events it decides on out.

`handle` is deterministic: the same stimuli at the same times give the same state and the same
events, so that the log of stimuli is the state. Jobs and nodes move only along two tables
(`book.py`, `fleet.py`); a move that is not in them raises `Impossible`.

What a token fences: every placement gets a larger one, and only the attempt that holds the job's
token counts. A node that comes back from the dead is told to stop what it still runs.
"""

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
)
from services.scheduler import audit, elastic, quota, resume
from services.scheduler.backfill import Reservation
from services.scheduler.book import Cause
from services.scheduler.debts import Account
from services.scheduler.deployments import Deployment
from services.scheduler.fleet import Fleet
from services.scheduler.jobs import (
    CANCELLED,
    FAILED,
    PLACED,
    RESULT_BYTES_MAX,
    RUNNING,
    SUCCEEDED,
    TERMINAL,
    WAITING,
    Job,
    Key,
    problem_of,
)
from services.scheduler.lines import Lines
from services.scheduler.nodes import HEALTHY, NOTHING, SILENT_S, UNHEALTHY, Node
from services.scheduler.placement import explain
from services.scheduler.scores import Prices
from services.scheduler.shapes import Shape
from services.scheduler.stimuli import (
    Deployed,
    Heartbeat,
    JobSubmitted,
    Planned,
    QueueApplied,
    QueueDeleted,
    QueueSpec,
    Running,
    Scaled,
    Stimulus,
    Tick,
)
from services.scheduler.typical import FIRST_ARRIVALS, Typical

FINISHED_MIN, FINISHED_MAX = 10_000, 100_000
"""Ended jobs that are remembered; the oldest are forgotten first, a few with each stimulus."""
FORGET_MAX = 256
KNOWN_S = 600.0
"""Who asks again for a job that has ended, because the answer was lost, does so within this. At
5,000 jobs/s the fewest that are remembered would be known for 2 s."""


class State(msgspec.Struct, kw_only=True):
    """A snapshot: all there is, apart from what `restore` rebuilds."""

    sequence: int
    token: int
    number: int
    jobs: list[Job]
    nodes: list[Node]
    finished: list[Key]
    specs: list[QueueSpec] = []
    debts: dict[str, Account] = {}
    reservation: Reservation | None = None
    looked_at: float = 0.0
    deployments: list[Deployment] = []
    prices: Prices = Prices()
    typical: list[tuple[Shape, int]] = []
    """What came lately and how often, the oldest first."""
    arrivals: int = 0
    plan_due_at: int = FIRST_ARRIVALS


class Scheduler(Fleet):
    """Decides."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = 0
        """Stimuli handled so far."""
        self.typical = Typical()
        self.prices = Prices()

    def handle(self, stimulus: Stimulus, now: float) -> list[Event]:
        """Moves the state by one stimulus; returns what is to be said, in order."""
        self.now = now
        self.sequence += 1
        self.token_before = self.token
        STIMULI[type(stimulus)](self, stimulus)
        if elastic.concerns(self, stimulus) or (self.freed and self.deployments):
            elastic.settle(self)
        self.place_what_fits()
        evicted = 0
        while self.deployments and len(self.evicted) > evicted:  # room beside who evicted them
            evicted = len(self.evicted)
            elastic.settle(self)
            self.place_what_fits()
        self.evicted.clear()
        self.forget()
        decided, self.decided = self.decided, []
        return decided

    def is_news(self, stimulus: Stimulus) -> bool:
        """Whether it could change anything: of heartbeats and ticks, few do."""
        match stimulus:
            case Tick():
                return stimulus.look or any(self.is_alive(name) for name in stimulus.silent)
            case Heartbeat():
                return self.tells_something(stimulus)
            case Deployed():
                known = self.deployments.get((stimulus.project, stimulus.model))
                return known is None or known.generation < stimulus.generation
            case Scaled():
                known = self.deployments[stimulus.project, stimulus.model]
                return (known.replicas, known.spare) != (stimulus.replicas, stimulus.spare)
            case QueueApplied():
                return self.specs.get(stimulus.spec.queue) != stimulus.spec
            case QueueDeleted():
                return stimulus.queue in self.specs
        return True

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
        else:
            self.typical.note(job.ask.shape, job.ask.workers)

    def on_cancelled(self, cancelled: JobCancelled) -> None:
        """A job cancelled before it was asked for never starts: events may overtake."""
        job = self.jobs.get((cancelled.project, cancelled.job))
        if job is None:
            job = self.add(JobRequested(project=cancelled.project, job=cancelled.job, kind=""), "")
        if job.state not in TERMINAL:
            self.move(job, CANCELLED, Cause(reason=cancelled.reason or "cancelled"))

    def on_started(self, started: AttemptStarted) -> None:
        """It runs once all its nodes have said so."""
        job = self.holder(started)
        if job is None or job.state != PLACED or started.node in job.live.started:
            return
        job.live.started.append(started.node)
        if len(job.live.started) == len(job.live.parts):
            self.move(job, RUNNING, Cause())

    def on_succeeded(self, succeeded: AttemptSucceeded) -> None:
        """It has succeeded once all its nodes are through; its result is the first worker's."""
        job = self.holder(succeeded)
        if job is None or succeeded.node in job.live.done:
            return
        size = len(msgspec.json.encode(succeeded.result))
        if size > RESULT_BYTES_MAX:
            reason = f"result: at most {RESULT_BYTES_MAX} bytes of JSON, got {size}"
            self.move(job, FAILED, Cause(reason=reason, teller=succeeded.node))
            return
        job.live.done.append(succeeded.node)
        if job.live.parts[0].node == succeeded.node:
            job.live.result = succeeded.result
        if len(job.live.done) == len(job.live.parts):
            self.move(job, SUCCEEDED, Cause(result=job.live.result))

    def on_failed(self, failed: AttemptFailed) -> None:
        """One share that fails takes the whole gang back."""
        job = self.holder(failed)
        if job is None or failed.node in job.live.done:
            return
        reason = f"attempt {job.attempt} on {failed.node}: {failed.reason}"
        cause = Cause(reason=reason, teller=failed.node)
        if failed.retryable:
            self.try_again(job, cause)
        else:
            self.move(job, FAILED, cause)

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        node = self.nodes.get(heartbeat.node) or self.welcome(heartbeat)
        restarted = node.incarnation != heartbeat.incarnation
        node.incarnation = heartbeat.incarnation
        if restarted:
            self.take_back_missing(node, heartbeat)
        self.fit(node, heartbeat)
        self.turn(node, heartbeat.health, f"node {node.node} says it is {heartbeat.health}")
        self.stop_orphans(node, self.orphans(heartbeat))

    def on_tick(self, tick: Tick) -> None:
        for name in tick.silent:
            if self.is_alive(name):
                reason = f"node {name} was silent for more than {SILENT_S:g} s"
                self.turn(self.nodes[name], UNHEALTHY, reason)
        if tick.look:
            self.look()

    def on_queue_applied(self, applied: QueueApplied) -> None:
        """Raises nothing: what a user got wrong was refused at the door."""
        if not quota.problem_of(applied.spec):
            self.set_specs(self.specs | {applied.spec.queue: applied.spec})

    def on_queue_deleted(self, deleted: QueueDeleted) -> None:
        rest = {name: spec for name, spec in self.specs.items() if name != deleted.queue}
        self.set_specs(rest)

    def on_deployed(self, deployed: Deployed) -> None:
        elastic.deploy(self, deployed)

    def on_scaled(self, scaled: Scaled) -> None:
        elastic.scale(self, scaled)

    def on_planned(self, planned: Planned) -> None:
        self.prices = planned.prices
        self.pool.price(planned.prices)
        self.typical.planned()

    def set_specs(self, specs: dict[str, QueueSpec]) -> None:
        """Who stands where in line follows from the queue, so all stand in line again."""
        if specs == self.specs:
            return
        self.changes += 1
        for queue in self.specs:
            self.debts.settle(queue, self.now, self.lines)
        self.quota.apply(specs.values())
        self.debts.open(self.now)
        self.lines, self.overdue = Lines(), []
        for job in self.jobs.values():
            if job.state == WAITING:
                self.enqueue(job)

    # --- jobs

    def holder(self, about: AttemptStarted | AttemptSucceeded | AttemptFailed) -> Job | None:
        """The job, if this is its attempt in force; anything older is refused."""
        running = Running(about.project, about.job, about.attempt, about.token)
        if not self.holds(about.node, running):
            return None
        self.touched.add((about.project, about.job))
        return self.jobs[about.project, about.job]

    def why(self, job: Job) -> str:
        """Why it waits, or how it or its last attempt ended."""
        if job.state != WAITING:
            return job.reason
        waits = self.lacks_quota(job) or explain(list(self.nodes.values()), self.pool, job.ask)
        return f"{waits}; before: {job.reason}" if job.reason else waits

    def lacks_quota(self, job: Job) -> str:
        """Of which resource its queue may have no more; "" for none."""
        queue = job.request.queue
        if any(self.quota.allows(queue, claim.amounts) for claim in self.claims(job)):
            return ""
        for claim in self.claims(job):
            for name, amount in claim.amounts.items():
                left = self.quota.room(queue, name)
                if amount > left:
                    return f"needs {amount} {name}; queue {queue!r} may have {max(0, left)} more"
        return f"needs a GPU; queue {queue!r} has a quota for none of the models"

    def forget(self) -> None:
        for _ in range(min(FORGET_MAX, len(self.finished) - FINISHED_MIN)):
            key = self.finished[0]
            is_recent = self.now - self.jobs[key].ended_at <= KNOWN_S
            if is_recent and len(self.finished) <= FINISHED_MAX:
                return
            self.finished.popleft()
            self.touched.add(key)
            del self.jobs[key]

    # --- what can be kept

    def snapshot(self) -> State:
        return State(
            sequence=self.sequence,
            token=self.token,
            number=self.number,
            jobs=list(self.jobs.values()),
            nodes=list(self.nodes.values()),
            finished=list(self.finished),
            specs=list(self.specs.values()),
            debts=self.debts.accounts,
            reservation=self.reservation,
            looked_at=self.looked_at,
            deployments=list(self.deployments.values()),
            prices=self.prices,
            typical=list(self.typical.counts.items()),
            arrivals=self.typical.arrivals,
            plan_due_at=self.typical.due_at,
        )

    def validate(self) -> None:
        """Recomputes from the jobs alone what is kept beside them."""
        audit.check(self)


def restore(state: State) -> Scheduler:
    """A snapshot -> the scheduler it was taken of."""
    scheduler = Scheduler()
    scheduler.sequence, scheduler.token = state.sequence, state.token
    scheduler.number = state.number
    scheduler.reservation, scheduler.looked_at = state.reservation, state.looked_at
    scheduler.jobs = {(job.request.project, job.request.job): job for job in state.jobs}
    scheduler.finished.extend(state.finished)
    scheduler.deployments = {one.key: one for one in state.deployments}
    scheduler.quota.apply(state.specs)
    scheduler.debts.accounts = state.debts
    scheduler.debts.open(0.0)
    scheduler.typical = Typical(dict(state.typical), state.arrivals, state.plan_due_at)
    if state.prices != scheduler.prices:
        scheduler.prices = state.prices
        scheduler.pool.price(state.prices)
    for node in sorted(state.nodes, key=lambda node: node.node):
        node.allocated = NOTHING
        scheduler.nodes[node.node] = node
        scheduler.models[node.gpu_model] += 1
        scheduler.machines[node.node] = node.machine
        scheduler.pool.join(node.machine)
    resume.placed(scheduler)
    for node in scheduler.nodes.values():
        scheduler.pool.open(node.node, node.state == HEALTHY)
    for job in state.jobs:
        if job.state == WAITING:
            scheduler.enqueue(job)
    scheduler.lines.open.clear()
    scheduler.lines.may_evict.clear()
    scheduler.touched.clear()
    return scheduler


def on(job: Job) -> str:
    """The nodes that hold it, by rank; "" for none."""
    return ", ".join(part.node for part in job.placement.parts) if job.placement else ""


STIMULI: dict[type[Stimulus], Callable[[Scheduler, Any], None]] = {
    JobSubmitted: Scheduler.on_submitted,
    JobCancelled: Scheduler.on_cancelled,
    AttemptStarted: Scheduler.on_started,
    AttemptSucceeded: Scheduler.on_succeeded,
    AttemptFailed: Scheduler.on_failed,
    Heartbeat: Scheduler.on_heartbeat,
    Tick: Scheduler.on_tick,
    Deployed: Scheduler.on_deployed,
    Scaled: Scheduler.on_scaled,
    QueueApplied: Scheduler.on_queue_applied,
    QueueDeleted: Scheduler.on_queue_deleted,
    Planned: Scheduler.on_planned,
}
