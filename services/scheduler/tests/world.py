"""A scheduler, its agents and its ledger: what tests let happen, and what must hold after it."""

import msgspec

from libs.contracts.autoscaling import NODE_LABEL, REPLICA_KIND
from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptSucceeded,
    Event,
    Resources,
)
from services.scheduler.debts import FINE
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.ledger import CANCELLED, WAITING, Ledger
from services.scheduler.owings import ROUNDED
from services.scheduler.stimuli import Heartbeat, Running, Stimulus, decode

NEVER = float("inf")


class World:
    def __init__(self, *, conserving: bool = True) -> None:
        self.scheduler = Scheduler()
        self.ledger = Ledger(conserving=conserving)
        self.snapshot = msgspec.json.encode(self.scheduler.snapshot())
        self.log: list[tuple[str, bytes, float, list[Event]]] = []
        self.now = 1000.0
        self.last: dict[str, Heartbeat] = {}
        self.agents: dict[str, set[Running]] = {}
        """What each runs; it may be slow to obey."""
        self.placed: list[AttemptPlaced] = []
        self.ends: dict[int, float] = {}
        """Of each placement, by its token: its bound, where its job told one."""
        self.promises = 0
        """That were looked at."""

    def tell(self, stimulus: Stimulus, after_s: float = 1.0) -> list[Event]:
        self.now += after_s
        if not self.scheduler.is_news(stimulus):
            before, at = self.state(), min(self.now, self.scheduler.due_at - 0.001)
            assert self.scheduler.handle(stimulus, at) == []
            self.scheduler.sequence -= 1
            assert self.state() == before, "it was news"
            return []
        said = self.scheduler.handle(stimulus, self.now)
        self.log.append((type(stimulus).__name__, msgspec.json.encode(stimulus), self.now, said))
        self.ledger.enter(stimulus, said, self.now)
        check_debts(self.scheduler, self.ledger)
        for event in said:
            if isinstance(event, AttemptPlaced):
                self.placed.append(event)
                self.agents[event.node].add(running_of(event))
                request = self.ledger.requests[event.project, event.job]
                if request.duration_s:
                    self.ends[event.token] = self.now + request.duration_s
        return said

    def state(self) -> bytes:
        return msgspec.json.encode(self.scheduler.snapshot())

    def beat(
        self,
        node: str,
        has: Resources,
        model: str = "",
        labels: dict[str, str] | None = None,
        health: str = "Healthy",
        reboots: bool = False,
    ) -> list[Event]:
        runs = sorted(self.agents.setdefault(node, set()))
        incarnation = int(self.last[node].incarnation) if node in self.last else 1
        heard = Heartbeat(
            node,
            incarnation + reboots,
            ["serve", "train"],
            has,
            runs,
            health,
            model,
            {NODE_LABEL: node} | (labels or {}),
        )
        self.last[node] = heard
        return self.tell(heard)

    def reboot(self, node: str, keeps: bool) -> None:
        """Another incarnation, which runs nothing or all that the earlier one ran."""
        if not keeps:
            self.agents[node].clear()
        last = self.last[node]
        self.beat(node, last.capacity, last.gpu_model, last.labels, reboots=True)

    def recover(self, node: str) -> None:
        last = self.last[node]
        self.beat(node, last.capacity, last.gpu_model, last.labels)

    def obey(self, node: str) -> None:
        """The agent does what it was told: it ends everything that is not in force."""
        live = self.ledger.live.values()
        self.agents[node] &= {running_of(one.shares[node]) for one in live if node in one.shares}

    def answer(self, placed: AttemptPlaced, outcome: str) -> None:
        """Of any attempt there ever was, in force or not."""
        if outcome != "starts":
            self.agents[placed.node].discard(running_of(placed))
        self.tell(answer_of(placed, outcome))

    def crash(self, keeps: bool) -> None:
        """From the last snapshot and what was logged since, to the same state and decisions."""
        before = self.state()
        self.scheduler = restore(msgspec.json.decode(self.snapshot, type=State))
        for name, payload, at, said in self.log:
            assert self.scheduler.handle(decode(name, payload), at) == said
        assert self.state() == before
        if keeps:
            self.snapshot, self.log = before, []

    def check_promise(self) -> None:
        """Who has a reservation has room by then if what runs ends at its bound, by the ledger's
        account; quotas aside. So nothing that passed makes it later. Of nodes that stay as they
        are."""
        reservation, ledger = self.scheduler.reservation, self.ledger
        if reservation is None:
            return
        self.promises += 1
        ended = [
            attempt
            for attempt in ledger.live.values()
            if self.ends.get(attempt.token, NEVER) <= reservation.at
        ]
        specs, ledger.specs = ledger.specs, {}
        for attempt in ended:
            del ledger.live[attempt.key]
            ledger.book(attempt, -1)
        fits = ledger.fits(ledger.requests[reservation.job])
        for attempt in ended:
            ledger.live[attempt.key] = attempt
            ledger.book(attempt, 1)
        ledger.specs = specs
        assert fits, f"{reservation.job} cannot start at {reservation.at}"

    def check(self) -> None:
        self.scheduler.validate()
        jobs = {key: job.state for key, job in self.scheduler.jobs.items()}
        states = {key: "live" if s in ("placed", "running") else s for key, s in jobs.items()}
        for key, state in states.items():
            if key in self.ledger.replicas and self.ledger.states[key] == WAITING:
                assert state in (WAITING, CANCELLED), "nobody says which"
            elif key in self.ledger.states or self.scheduler.jobs[key].request.kind != REPLICA_KIND:
                assert state == self.ledger.states[key], key
        assert self.ledger.states.keys() <= states.keys()
        for key, attempt in self.ledger.live.items():
            job = self.scheduler.jobs[key]
            assert job.live.token == attempt.token
            assert (job.state == "running") == (attempt.started >= set(attempt.shares)), key


def check_debts(scheduler: Scheduler, ledger: Ledger) -> None:
    """What queues owe is what the ledger counts, as of its last entry."""
    debts, owings = scheduler.debts, ledger.owings
    lend = {queue for queue, spec in ledger.specs.items() if spec.cohort and spec.nominal}
    assert debts.accounts.keys() == lend
    for queue in lend:
        owed = debts.owed_by(queue, ledger.now, scheduler.lines)
        for name in ledger.specs[queue].nominal:
            counted = owings.owes.get((queue, name), 0)
            assert abs(owed.get(name, 0) / FINE - counted) <= ROUNDED, (queue, name, counted, owed)


def running_of(placed: AttemptPlaced) -> Running:
    return Running(placed.project, placed.job, placed.attempt, placed.token)


def answer_of(placed: AttemptPlaced, outcome: str) -> Stimulus:
    fields = msgspec.structs.asdict(placed)
    about = {name: fields[name] for name in ("project", "job", "attempt", "token", "node")}
    match outcome:
        case "starts":
            return AttemptStarted(**about)
        case "succeeds":
            return AttemptSucceeded(**about, result={"by": placed.token})
        case _:
            return AttemptFailed(**about, reason="it broke", retryable=outcome == "fails")
