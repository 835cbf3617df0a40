"""An account of the scheduler's own, kept from what it was told and what it said.

It knows none of the scheduler's counters. After every stimulus it asserts: no CPU, memory or GPU is
given twice; a gang is placed whole and taken back whole; a job is in one state and has one attempt
at most, under a token that only grows; quotas hold whenever something is placed; victims are the
fewest, only for who is placed then, and only such as have to go (`rights.py`), also by what queues
owe, which is counted anew (`owings.py`). Replicas are of one deployment each, apart, and no more
than were decided; they give their room only while they are not needed, and get back only what they
lent. In small worlds (`conserving`) also: whatever waits fits nowhere, by trying everything, and
where replicas lack there is neither room for one nor any lent.
"""

import msgspec

from libs.contracts.autoscaling import NODE_LABEL, REPLICA_KIND, first_replica
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
)
from services.scheduler import rights
from services.scheduler.owings import Owings
from services.scheduler.rooms import Rooms
from services.scheduler.sheets import (
    Attempt,
    Key,
    Service,
    Serving,
    Sheet,
    serving_of,
)
from services.scheduler.stimuli import (
    Deployed,
    Heartbeat,
    JobSubmitted,
    QueueApplied,
    QueueDeleted,
    Scaled,
    Stimulus,
    Tick,
)

WAITING, LIVE, SUCCEEDED, FAILED, CANCELLED = "waiting", "live", "succeeded", "failed", "cancelled"
ENDED = (SUCCEEDED, FAILED, CANCELLED)
FOR, MOVED, GIVES = "preempted for ", "moved for ", "gives its room to "
ENOUGH = "replicas are enough"


class Ledger(Rooms):
    def __init__(self, *, conserving: bool = False) -> None:
        super().__init__()
        self.conserving = conserving
        self.states: dict[Key, str] = {}
        self.attempts: dict[Key, int] = {}
        self.preempted: dict[Key, int] = {}
        self.services: dict[Key, Service] = {}
        self.owings = Owings(self, self.waiting)
        self.token = 0
        self.owed: set[tuple[Key, int, str]] = set()
        """(job, token, node): whoever may still run a share of what was taken back is told."""
        self.owes_end: set[Key] = set()
        self.victims: dict[Key, list[Attempt]] = {}
        """Of whom, for a job that is not placed yet."""
        self.moved: set[Key] = set()
        """By the stimulus that is being handled."""
        self.servings: dict[Key, Serving] = {}
        self.replicas: dict[Key, Key] = {}
        """Job -> deployment. One is known once it is placed; that it waits, nobody says."""
        self.token_before = 0
        """Of the last placement before the stimulus that is being handled."""

    def enter(self, stimulus: Stimulus, said: list[Event], now: float) -> None:
        """Asserts that this may be said on that."""
        self.now = now
        self.owings.pass_to(now)
        self.token_before = self.token
        self.hear(stimulus)
        for event in said:
            self.read(event, said)
        self.close()

    # --- what the stimulus itself brings about

    def hear(self, stimulus: Stimulus) -> None:
        match stimulus:
            case JobSubmitted(request):
                key = request.project, request.job
                if key not in self.states:
                    self.requests[key], self.states[key] = request, WAITING
                    self.services[key] = Service(self.now, self.now)
            case JobCancelled():
                self.hear_cancelled((stimulus.project, stimulus.job))
            case AttemptStarted() | AttemptSucceeded() | AttemptFailed():
                self.hear_answer(stimulus)
            case Heartbeat():
                self.hear_heartbeat(stimulus)
            case Tick():
                for name in stimulus.silent:
                    if name in self.sheets and not self.sheets[name].lost:
                        self.lose(name)
            case QueueApplied(spec):
                self.specs[spec.queue] = spec
                self.owings.forget()
            case QueueDeleted(queue):
                self.specs.pop(queue, None)
                self.owings.forget()
            case Deployed():
                serving = self.servings.setdefault(
                    (stimulus.project, stimulus.model), serving_of(stimulus)
                )
                serving.deploy(stimulus)
            case Scaled():
                self.servings[stimulus.project, stimulus.model].scale(stimulus)

    def hear_cancelled(self, key: Key) -> None:
        if self.states.get(key) not in ENDED:
            if key in self.live:
                self.take_back(self.live[key])
            self.states[key] = CANCELLED

    def hear_answer(self, answer: AttemptStarted | AttemptSucceeded | AttemptFailed) -> None:
        key = answer.project, answer.job
        attempt = self.live.get(key)
        if attempt is None or attempt.token != answer.token or answer.node not in attempt.shares:
            return
        if answer.attempt != attempt.shares[answer.node].attempt or answer.node in attempt.done:
            return
        match answer:
            case AttemptStarted():
                attempt.started.add(answer.node)
                if attempt.started == set(attempt.shares):
                    attempt.running_at = attempt.running_at or self.now
            case AttemptSucceeded():
                attempt.done.add(answer.node)
                if attempt.done == set(attempt.shares):
                    self.take_back(attempt)
                    self.owes_end.add(key)
            case AttemptFailed():
                self.take_back(attempt, teller=answer.node)
                if not answer.retryable:
                    self.owes_end.add(key)

    def hear_heartbeat(self, heartbeat: Heartbeat) -> None:
        name = heartbeat.node
        sheet = self.sheets.setdefault(name, Sheet(heartbeat))
        restarted = sheet.last.incarnation != heartbeat.incarnation
        sheet.last = heartbeat
        tokens = {(one.project, one.job): one.token for one in heartbeat.running}
        for attempt in self.on(name) if restarted else []:
            if tokens.get(attempt.key) != attempt.token and name not in attempt.done:
                self.take_back(attempt)
        sheet.healthy, sheet.lost = heartbeat.health == "Healthy", False
        if heartbeat.health == "Unhealthy":
            self.lose(name)
        self.touched.add(name)

    def lose(self, name: str) -> None:
        sheet = self.sheets[name]
        sheet.healthy, sheet.lost = False, True
        for attempt in self.on(name):
            self.take_back(attempt)
        self.touched.add(name)

    # --- what was said

    def read(self, event: Event, said: list[Event]) -> None:
        key = event.project, getattr(event, "job", "")
        match event:
            case AttemptPlaced():
                if event.token > self.token:
                    self.meet(key, event)
                    same = [e for e in said if isinstance(e, AttemptPlaced)]
                    self.place(key, [e for e in same if e.token == event.token])
                assert event == self.live[key].shares[event.node], event
            case AttemptStopped():
                attempt = self.live.get(key)
                if attempt is not None and attempt.token == event.token:
                    assert event.node in attempt.shares, event
                    self.withdraw(attempt, event.reason)
                self.owed.discard((key, event.token, event.node))
            case JobSucceeded():
                assert self.states[key] == WAITING, (key, self.states[key])
                assert key in self.owes_end, key
                self.states[key] = SUCCEEDED
            case JobFailed():
                if key in self.live:
                    self.take_back(self.live[key])
                assert self.states[key] == WAITING, (key, self.states[key])
                self.states[key] = FAILED
            case _:
                raise AssertionError(f"nobody says {event}")

    def meet(self, key: Key, placed: AttemptPlaced) -> None:
        """A replica, which nobody asked for aloud."""
        owner = placed.project, str(placed.spec.get("model"))
        if placed.kind != REPLICA_KIND or owner not in self.servings:
            return
        if key not in self.requests:
            self.states[key] = WAITING
            replica = self.servings[owner].replica(placed.job)
            self.requests[key] = msgspec.structs.replace(replica, resources=placed.resources)
            self.services[key] = Service(self.now, self.now)
        elif key not in self.replicas and placed.job != first_replica(owner[1]):
            return
        assert self.replicas.setdefault(key, owner) == owner, (key, owner)

    def place(self, key: Key, events: list[AttemptPlaced]) -> None:
        request, first = self.requests[key], events[0]
        spec = self.specs.get(request.queue)
        assert self.states[key] == WAITING, (key, self.states[key])
        assert first.attempt == self.attempts.get(key, 0) + 1, first
        used = first.attempt - self.preempted.get(key, 0)
        assert used <= request.attempts_max, (key, used)
        assert [(s.node, s.workers, s.rank) for s in first.gang] == [
            (e.node, e.workers, e.rank) for e in events
        ], first
        assert all(event.gang == first.gang for event in events)
        assert len({event.node for event in events}) == len(events), events
        ranks = [event.rank + i for event in events for i in range(event.workers)]
        assert ranks == list(range(request.workers)), (key, ranks)
        assert len(events) == 1 or request.topology == "any", key
        models = {event.node: self.sheets[event.node].last.gpu_model for event in events}
        by_model = {
            model: sum(event.workers for event in events if models[event.node] == model)
            for model in models.values()
        }
        attempt = Attempt(key, first.token, {e.node: e for e in events}, models, self.now)
        attempt.ages = bool(spec and spec.order == "priority" and spec.aging_s)
        victims = self.victims.pop(key, [])
        if key in self.replicas:
            self.get_back(key, victims)
            labels = request.labels | {NODE_LABEL: first.node}
            self.check_fewest(msgspec.structs.replace(request, labels=labels), victims)
        else:
            self.check_fewest(request, victims)
            went = [one for one in victims if one.key not in self.moved | self.replicas.keys()]
            if went and spec and rights.is_leveled(self, spec.cohort):
                rights.Rights(self, request, by_model, went).check()
        for event in events:
            assert self.sheets[event.node].suits(request), (event.node, request)
        assert not self.beyond_quota(request, by_model), (key, by_model, self.specs)
        self.token, self.attempts[key] = first.token, first.attempt
        self.live[key], self.states[key] = attempt, LIVE
        self.book(attempt, 1)
        for event in events:
            self.sheets[event.node].check()

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        """The scheduler's own doing: for another job, or because a node shrank."""
        self.take_back(attempt)
        if reason.endswith(ENOUGH) and attempt.key in self.replicas:
            self.states[attempt.key] = CANCELLED
        word = next((one for one in (FOR, MOVED, GIVES) if reason.startswith(one)), "")
        if not word:
            return
        project, _, job = reason.removeprefix(word).partition("/")
        self.victims.setdefault((project, job), []).append(attempt)
        if word == GIVES and attempt.key in self.replicas:
            self.lend(attempt.key, (project, job))
            return
        request = self.requests[attempt.key]
        assert request.preemptible, attempt.key
        if word == MOVED:
            assert self.specs[request.queue].order == "attained", request
            self.moved.add(attempt.key)
        elif word == FOR:
            head = self.requests[project, job]
            assert rights.by_words(self, head, request), (head, request)
        self.preempted[attempt.key] = self.preempted.get(attempt.key, 0) + 1

    def lend(self, replica: Key, to: Key) -> None:
        """It has ended, and others are enough."""
        serving = self.servings[self.replicas[replica]]
        left = len(self.served_on(self.replicas[replica]))
        assert left >= serving.fewest, f"{replica} is needed: {left} of {serving.fewest} are left"
        serving.lent.add(to)
        self.states[replica] = CANCELLED

    def get_back(self, replica: Key, victims: list[Attempt]) -> None:
        """Only what its deployment lent, and only if it is needed."""
        serving = self.servings[self.replicas[replica]]
        placed = len(self.served_on(self.replicas[replica]))
        assert not victims or placed < serving.needs, f"{replica} is spare: {placed} are placed"
        for victim in victims:
            assert victim.key in serving.lent, f"{victim.key} was lent nothing by {replica}"
            serving.lent.discard(victim.key)

    def served_on(self, owner: Key) -> list[str]:
        """The nodes of its replicas that are placed."""
        mine = (one for key, one in self.live.items() if self.replicas.get(key) == owner)
        return [node for attempt in mine for node in attempt.shares]

    def take_back(self, attempt: Attempt, teller: str = "") -> None:
        got = self.services[attempt.key]
        got.gpu_s += self.gpu_s(attempt)
        got.held_s += self.now - attempt.placed_at
        got.waits_since = self.now
        self.states[attempt.key] = WAITING
        self.remove(attempt)
        told = attempt.done | {teller}
        self.owed |= {(attempt.key, attempt.token, node) for node in attempt.shares.keys() - told}

    def gpu_s(self, attempt: Attempt) -> float:
        """What it has been served."""
        gpus = rights.milli(self.requests[attempt.key]) / 1000
        return gpus * (self.now - attempt.running_at) if attempt.running_at else 0

    def waiting(self) -> list[JobRequested]:
        """Without replicas: of them nobody says."""
        known = self.requests.keys() - self.replicas.keys()
        return [self.requests[key] for key in known if self.states[key] == WAITING]

    # --- what must hold

    def close(self) -> None:
        assert not self.owed, f"not told to stop: {self.owed}"
        assert not self.victims, f"evicted for who was not placed: {self.victims}"
        for key in self.moved:
            assert self.states[key] == LIVE, f"{key} was moved and waits"
        self.moved.clear()
        for key in self.owes_end:
            assert self.states[key] in ENDED, (key, self.states[key])
        self.owes_end.clear()
        for name in self.touched:
            self.sheets[name].check()
        self.touched.clear()
        for owner, serving in self.servings.items():
            serving.lent &= self.live.keys()
            nodes = self.served_on(owner)
            assert len(set(nodes)) == len(nodes), (owner, nodes)
            assert len(nodes) <= serving.most, (owner, nodes, serving)
        if self.conserving:
            self.check_conserving()

    def check_conserving(self) -> None:
        if any(self.requests[key].duration_s for key in self.live):
            return  # a reservation may keep something free
        for owner, serving in self.servings.items():
            nodes = self.served_on(owner)
            for node in self.sheets.keys() - nodes if len(nodes) < serving.fewest else ():
                self.check_lacking(serving, serving.replica("", node))
        for key, state in self.states.items():
            if state == WAITING and key not in self.replicas:
                assert not self.fits(self.requests[key]), f"{key} waits and fits"

    def check_lacking(self, serving: Serving, replica: JobRequested) -> None:
        """There is no room on its node, nor would there be with what was lent given back."""
        assert not self.fits(replica), f"a replica lacks and fits: {replica}"
        lent = [self.live[key] for key in serving.lent if self.requests[key].preemptible]
        lent = [attempt for attempt in lent if attempt.token <= self.token_before]
        for attempt in lent:
            self.remove(attempt)
        fits = self.fits(replica)
        for attempt in lent:
            self.restore(attempt)
        assert not fits, f"a replica lacks room that was lent: {replica}"

    def check_fewest(self, request: JobRequested, victims: list[Attempt]) -> None:
        """With any one of them back the job would not fit; so it would not with more of them."""
        assert not victims or self.fits(request), request
        for victim in victims:
            self.restore(victim)
            assert not self.fits(request), f"{victim.key} could have stayed for {request.job}"
            self.remove(victim)
