"""The scheduler under random stimuli, against a ledger that knows only what was said aloud."""

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    JobCancelled,
    JobFailed,
    JobRequested,
    JobSucceeded,
    Resources,
)
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.nodes import minus
from services.scheduler.stimuli import Heartbeat, JobSubmitted, Running, Stimulus, Tick, decode

NODES = ("a", "b", "c")
KINDS = ("train", "serve")
DIMENSIONS = ("cpu_milli", "memory_mib", "gpu_milli")
amounts = st.builds(
    Resources,
    cpu_milli=st.integers(0, 4) | st.just(3),
    memory_mib=st.integers(0, 3),
    gpu_milli=st.sampled_from([0, 0, 1000]),
)
capacities = st.builds(
    Resources,
    cpu_milli=st.integers(2, 8),
    memory_mib=st.integers(2, 8),
    gpu_milli=st.sampled_from([0, 1000, 2000]),
)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.snapshot = msgspec.json.encode(self.scheduler.snapshot())
        self.log: list[tuple[str, bytes, float, list[Event]]] = []
        self.now = 1000.0
        self.requests: dict[str, JobRequested] = {}
        self.said_of_nodes: dict[str, Heartbeat] = {}
        """The last heartbeat of each node that is not lost."""
        self.agents: dict[str, set[Running]] = {name: set() for name in NODES}
        """What each agent runs; it may be slow to obey."""
        self.ledger: dict[str, AttemptPlaced] = {}
        """The attempt in force of each job, by what was said."""
        self.placed: list[AttemptPlaced] = []
        self.ended: dict[str, Event] = {}
        self.cancelled: set[str] = set()
        self.stopped: set[tuple[str, str, int]] = set()
        """(node, job, token) of every order to stop."""
        self.over: set[tuple[str, str, int]] = set()
        """(node, job, token) of every attempt that ended by itself."""

    # --- the world

    def tell(self, stimulus: Stimulus) -> list[Event]:
        self.now += 1
        if isinstance(stimulus, Heartbeat | Tick) and not self.scheduler.is_news(stimulus):
            before = msgspec.json.encode(self.scheduler.snapshot())
            assert self.scheduler.handle(stimulus, self.now) == []
            self.scheduler.sequence -= 1
            assert msgspec.json.encode(self.scheduler.snapshot()) == before, "it was news"
            return []
        said = self.scheduler.handle(stimulus, self.now)
        payload = msgspec.json.encode(stimulus)
        self.log.append((type(stimulus).__name__, payload, self.now, said))
        for event in said:
            self.enter(event)
        return said

    def enter(self, event: Event) -> None:
        match event:
            case AttemptPlaced():
                assert event.job not in self.ledger, "two attempts in force"
                said = self.said_of_nodes[event.node]
                assert said.health == "Healthy"
                assert event.kind in said.kinds
                assert event.job not in self.ended | dict.fromkeys(self.cancelled)
                assert not self.placed or event.token > self.placed[-1].token
                earlier = [one.attempt for one in self.placed if one.job == event.job]
                assert event.attempt == len(earlier) + 1
                self.ledger[event.job] = event
                self.placed.append(event)
                self.agents[event.node].add(running_of(event))
            case AttemptStopped():
                self.stopped.add((event.node, event.job, event.token))
                if (held := self.ledger.get(event.job)) and held.token == event.token:
                    del self.ledger[event.job]
            case JobSucceeded() | JobFailed():
                assert event.job not in self.ended, "said twice"
                self.ended[event.job] = event
                self.ledger.pop(event.job, None)

    def need(self, job: str) -> dict[str, int]:
        request = self.requests[job]
        return {name: request.workers * getattr(request.resources, name) for name in DIMENSIONS}

    def free(self, node: str) -> dict[str, int]:
        """By the ledger and the node's own word."""
        left = {name: getattr(self.said_of_nodes[node].capacity, name) for name in DIMENSIONS}
        for job, placed in self.ledger.items():
            if placed.node == node:
                left = {name: left[name] - self.need(job)[name] for name in DIMENSIONS}
        return left

    # --- what may happen

    @rule(
        number=st.integers(0, 9),
        kind=st.sampled_from(KINDS),
        workers=st.integers(1, 3),
        resources=amounts,
        priority=st.integers(-1, 1),
        queue=st.sampled_from(["default", "other"]),
        attempts_max=st.sampled_from([1, 3, 5]),
    )
    def submit(
        self,
        number: int,
        kind: str,
        workers: int,
        resources: Resources,
        priority: int,
        queue: str,
        attempts_max: int,
    ) -> None:
        request = JobRequested(
            project="p",
            job=f"job-{number}",
            kind=kind,
            queue=queue,
            priority=priority,
            workers=workers,
            resources=resources,
            attempts_max=attempts_max,
        )
        known = request.job in self.requests or request.job in self.cancelled
        self.requests.setdefault(request.job, request)
        said = self.tell(JobSubmitted(request))
        assert not (known and said), "asked for twice, done twice"

    @rule(
        node=st.sampled_from(NODES),
        capacity=capacities,
        kinds=st.sets(st.sampled_from(KINDS), min_size=1).map(sorted),
        health=st.sampled_from(["Healthy"] * 6 + ["Degraded", "Initializing", "Unhealthy"]),
        new=st.booleans(),
    )
    def heartbeat(
        self, node: str, capacity: Resources, kinds: list[str], health: str, new: bool
    ) -> None:
        """`new`: with another capacity, too."""
        last = self.said_of_nodes.get(node)
        if last is not None and not new:
            capacity = last.capacity
        self.beat(node, capacity, kinds, health, last.incarnation if last else 1)

    @rule(node=st.sampled_from(NODES), keeps=st.booleans())
    def reboot(self, node: str, keeps: bool) -> None:
        """Another incarnation, which runs nothing or all that the earlier one ran."""
        last = self.said_of_nodes.get(node)
        if last is None:
            return
        if not keeps:
            self.agents[node].clear()
        before = len(self.placed)
        self.beat(node, last.capacity, last.kinds, "Healthy", int(last.incarnation) + 1)
        for placed in self.placed[:before]:
            if placed.node == node and self.ledger.get(placed.job) == placed:
                assert running_of(placed) in self.said_of_nodes[node].running, "lost, not missed"

    @rule(node=st.sampled_from(NODES), token=st.integers(1, 5))
    def stray(self, node: str, token: int) -> None:
        """An agent runs what nobody placed."""
        self.agents[node].add(Running("p", "stranger", 1, token))

    def beat(
        self, node: str, capacity: Resources, kinds: list[str], health: str, incarnation: int | str
    ) -> None:
        heard = Heartbeat(node, incarnation, kinds, capacity, sorted(self.agents[node]), health)
        self.said_of_nodes[node] = heard
        self.tell(heard)

    @rule(node=st.sampled_from(NODES))
    def silence(self, node: str) -> None:
        self.tell(Tick([node]))
        last = self.said_of_nodes.get(node)
        if last is not None:
            self.said_of_nodes[node] = msgspec.structs.replace(last, health="Unhealthy")

    @rule(node=st.sampled_from(NODES))
    def obey(self, node: str) -> None:
        """The agent does what it was told: it ends everything that is not in force."""
        in_force = {running_of(placed) for placed in self.ledger.values()}
        self.agents[node] &= in_force

    @precondition(lambda self: self.placed)
    @rule(
        data=st.data(),
        outcome=st.sampled_from(["started", "succeeded", "fails", "breaks"]),
    )
    def answer(self, data: st.DataObject, outcome: str) -> None:
        """Of any attempt there ever was, in force or not."""
        placed = data.draw(st.sampled_from(self.placed[-6:]))
        in_force = self.ledger.get(placed.job) == placed
        if outcome != "started":
            self.over.add((placed.node, placed.job, placed.token))
            self.agents[placed.node].discard(running_of(placed))
        if in_force and outcome in ("fails", "breaks"):
            del self.ledger[placed.job]
        said = self.tell(answer_of(placed, outcome))
        if not in_force:
            assert said == [], "an old token was listened to"
        elif outcome == "succeeded":
            ended = self.ended[placed.job]
            assert isinstance(ended, JobSucceeded)
            assert ended.result == {"by": placed.token}
        elif outcome == "breaks":
            assert isinstance(self.ended[placed.job], JobFailed)

    @rule(number=st.integers(0, 11))
    def cancel(self, number: int) -> None:
        job = f"job-{number}"
        if job not in self.ended:
            self.cancelled.add(job)
        self.tell(JobCancelled(project="p", job=job))
        assert job not in self.ledger

    @rule(snapshot=st.booleans())
    def restart(self, snapshot: bool) -> None:
        """From the last snapshot and what was logged since, to the same state and decisions."""
        before = msgspec.json.encode(self.scheduler.snapshot())
        self.scheduler = restore(msgspec.json.decode(self.snapshot, type=State))
        for name, payload, at, said in self.log:
            assert self.scheduler.handle(decode(name, payload), at) == said
        assert msgspec.json.encode(self.scheduler.snapshot()) == before
        if snapshot:
            self.snapshot, self.log = before, []

    # --- what must hold, always

    @invariant()
    def is_consistent(self) -> None:
        self.scheduler.validate()

    @invariant()
    def agrees_with_the_ledger(self) -> None:
        for name, node in self.scheduler.nodes.items():
            free = self.free(name)
            left = minus(node.capacity, node.allocated)
            assert {d: getattr(left, d) for d in DIMENSIONS} == free
            assert min(free.values()) >= 0, "over capacity"
        placements = {job.key[1]: job.placement for job in self.scheduler.jobs.values()}
        in_force = {job: token.token for job, token in placements.items() if token}
        assert in_force == {job: placed.token for job, placed in self.ledger.items()}

    @invariant()
    def stops_what_is_not_in_force(self) -> None:
        in_force = {(one.node, one.job, one.token) for one in self.ledger.values()}
        for node, said in self.said_of_nodes.items():
            ran = {(node, one.job, one.token) for one in said.running}
            assert ran <= in_force | self.stopped | self.over

    @invariant()
    def loses_no_job(self) -> None:
        for job in self.requests:
            state = self.scheduler.jobs["p", job].state
            event = self.ended.get(job)
            assert (state == "succeeded") == isinstance(event, JobSucceeded)
            assert (state == "failed") == isinstance(event, JobFailed)
            assert (state == "cancelled") == (job in self.cancelled)
            assert (state in ("placed", "running")) == (job in self.ledger)

    @invariant()
    def leaves_nothing_waiting_that_fits(self) -> None:
        for job in self.requests:
            if self.scheduler.jobs["p", job].state != "waiting":
                continue
            need = self.need(job)
            for node, said in self.said_of_nodes.items():
                able = said.health == "Healthy" and self.requests[job].kind in said.kinds
                free = self.free(node)
                assert not (able and all(need[d] <= free[d] for d in DIMENSIONS)), (job, node)
            assert self.scheduler.why(self.scheduler.jobs["p", job])


def running_of(placed: AttemptPlaced) -> Running:
    return Running(placed.project, placed.job, placed.attempt, placed.token)


def answer_of(placed: AttemptPlaced, outcome: str) -> Stimulus:
    fields = msgspec.structs.asdict(placed)
    about = {name: fields[name] for name in ("project", "job", "attempt", "token", "node")}
    match outcome:
        case "started":
            return AttemptStarted(**about)
        case "succeeded":
            return AttemptSucceeded(**about, result={"by": placed.token})
        case _:
            return AttemptFailed(**about, reason="it broke", retryable=outcome == "fails")


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
