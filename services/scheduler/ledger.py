"""An account of the scheduler's own, kept from what it was told and what it said.

It knows none of the scheduler's counters. After every stimulus it asserts: no CPU, memory or GPU is
given twice; a gang is placed whole and taken back whole; a job is in one state and has one attempt
at most, under a token that only grows; quotas hold whenever something is placed; victims are the
fewest, and only for who is placed then. In small worlds (`conserving`) also: whatever waits fits
nowhere, by trying everything.
"""

from dataclasses import dataclass, field

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
from services.scheduler.sheets import Sheet, gpus_of, milli_of
from services.scheduler.stimuli import (
    Heartbeat,
    JobSubmitted,
    QueueApplied,
    QueueDeleted,
    QueueSpec,
    Stimulus,
    Tick,
)

Key = tuple[str, str]
WAITING, LIVE, SUCCEEDED, FAILED, CANCELLED = "waiting", "live", "succeeded", "failed", "cancelled"
ENDED = (SUCCEEDED, FAILED, CANCELLED)
FOR, MOVED = "preempted for ", "moved for "
NO_LIMIT = 1 << 62


@dataclass
class Attempt:
    key: Key
    token: int
    shares: dict[str, AttemptPlaced]
    models: dict[str, str]
    """GPU model of each node when it was placed."""
    done: set[str] = field(default_factory=set)
    started: set[str] = field(default_factory=set)


class Ledger:
    def __init__(self, *, conserving: bool = False) -> None:
        self.conserving = conserving
        self.sheets: dict[str, Sheet] = {}
        self.requests: dict[Key, JobRequested] = {}
        self.states: dict[Key, str] = {}
        self.live: dict[Key, Attempt] = {}
        self.attempts: dict[Key, int] = {}
        self.preempted: dict[Key, int] = {}
        self.specs: dict[str, QueueSpec] = {}
        self.token = 0
        self.owed: set[tuple[Key, int, str]] = set()
        """(job, token, node): whoever may still run a share of what was taken back is told."""
        self.owes_end: set[Key] = set()
        self.victims: dict[Key, list[Attempt]] = {}
        """Of whom, for a job that is not placed yet."""
        self.moved: set[Key] = set()
        """By the stimulus that is being handled."""
        self.touched: set[str] = set()

    def enter(self, stimulus: Stimulus, said: list[Event], now: float) -> None:
        """Asserts that this may be said on that."""
        self.now = now
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
            case QueueDeleted(queue):
                self.specs.pop(queue, None)

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

    def on(self, node: str) -> list[Attempt]:
        return [attempt for attempt in self.live.values() if node in attempt.shares]

    # --- what was said

    def read(self, event: Event, said: list[Event]) -> None:
        key = event.project, getattr(event, "job", "")
        match event:
            case AttemptPlaced():
                if event.token > self.token:
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

    def place(self, key: Key, events: list[AttemptPlaced]) -> None:
        request, first = self.requests[key], events[0]
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
        attempt = Attempt(key, first.token, {event.node: event for event in events}, models)
        victims = self.victims.pop(key, [])
        self.check_fewest(request, victims)
        for event in events:
            assert self.sheets[event.node].suits(request), (event.node, request)
        by_model: dict[str, int] = {}
        for event in events:
            model = models[event.node]
            by_model[model] = by_model.get(model, 0) + event.workers
        assert not self.beyond_quota(request, by_model), (key, by_model, self.specs)
        self.token, self.attempts[key] = first.token, first.attempt
        self.live[key], self.states[key] = attempt, LIVE
        self.book(attempt, 1)
        for event in events:
            self.sheets[event.node].check()

    def withdraw(self, attempt: Attempt, reason: str) -> None:
        """The scheduler's own doing: for another job, or because a node shrank."""
        self.take_back(attempt)
        if not reason.startswith((FOR, MOVED)):
            return
        project, _, job = reason.removeprefix(FOR).removeprefix(MOVED).partition("/")
        request, head = self.requests[attempt.key], self.requests[project, job]
        assert request.preemptible, attempt.key
        if reason.startswith(MOVED):
            assert self.specs[request.queue].order == "attained", request
            self.moved.add(attempt.key)
        else:
            assert self.may_go(head, request), (head, request)
        self.preempted[attempt.key] = self.preempted.get(attempt.key, 0) + 1
        self.victims.setdefault((project, job), []).append(attempt)

    def take_back(self, attempt: Attempt, teller: str = "") -> None:
        del self.live[attempt.key]
        self.states[attempt.key] = WAITING
        self.book(attempt, -1)
        told = attempt.done | {teller}
        self.owed |= {(attempt.key, attempt.token, node) for node in attempt.shares.keys() - told}

    def book(self, attempt: Attempt, sign: int) -> None:
        request = self.requests[attempt.key]
        for name, share in attempt.shares.items():
            sheet = self.sheets[name]
            sheet.cpu_milli += sign * share.workers * request.resources.cpu_milli
            sheet.memory_mib += sign * share.workers * request.resources.memory_mib
            assert len(share.gpus) == (share.workers if gpus_of(request) else 0), share
            for worker in share.gpus:
                assert len(set(worker)) == len(worker) == gpus_of(request), share
                for gpu in worker:
                    taken = sheet.gpu_milli.get(gpu, 0) + sign * milli_of(request)
                    sheet.gpu_milli[gpu] = taken
            self.touched.add(name)

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
        if self.conserving:
            self.check_conserving()

    def check_conserving(self) -> None:
        if any(self.requests[key].duration_s for key in self.live):
            return  # a reservation may keep something free
        for key, state in self.states.items():
            if state == WAITING:
                assert not self.fits(self.requests[key]), f"{key} waits and fits"

    def check_fewest(self, request: JobRequested, victims: list[Attempt]) -> None:
        """With any one of them back the job would not fit; so it would not with more of them."""
        assert not victims or self.fits(request), request
        for victim in victims:
            self.live[victim.key] = victim
            self.book(victim, 1)
            assert not self.fits(request), f"{victim.key} could have stayed for {request.job}"
            self.book(victim, -1)
            del self.live[victim.key]

    def fits(self, request: JobRequested) -> bool:
        """Whether quota and nodes have room, by looking at all of them."""
        models: list[str | None] = [None]
        spec = self.specs.get(request.queue)
        if spec and gpus_of(request) and any("/" in name for name in spec.nominal):
            present = {sheet.last.gpu_model for sheet in self.sheets.values()}
            models = [*(set(request.gpu_models) or present - {""})]
        return any(self.fits_on(request, model) for model in models)

    def fits_on(self, request: JobRequested, model: str | None) -> bool:
        by_model = {} if model is None else {model: request.workers}
        if self.beyond_quota(request, by_model):
            return False
        sheets = [sheet for sheet in self.sheets.values() if sheet.suits(request)]
        if model is not None:
            sheets = [sheet for sheet in sheets if sheet.last.gpu_model == model]
        rooms = [sheet.room(request) for sheet in sheets]
        whole = max((sheet.room(request, empty=True) for sheet in sheets), default=0)
        together = gpus_of(request) and whole >= request.workers
        if request.topology == "node" or together:
            return max(rooms, default=0) >= request.workers
        return sum(rooms) >= request.workers

    def may_go(self, head: JobRequested, victim: JobRequested) -> bool:
        """What the queues' words allow, apart from ages and times."""
        mine, other = self.specs.get(head.queue), self.specs.get(victim.queue)
        if mine is None:
            return False
        if head.queue == victim.queue:
            lower = mine.aging_s > 0 or victim.priority < head.priority
            return mine.order == "attained" or (mine.within_queue == "lower" and lower)
        if other is None or not mine.cohort or mine.cohort != other.cohort:
            return False
        return mine.reclaim != "never"

    # --- quotas

    def beyond_quota(self, request: JobRequested, by_model: dict[str, int]) -> list[str]:
        """The resources of which its queue would have too much with it."""
        workers, each = request.workers, request.resources
        gpu = gpus_of(request) * milli_of(request)
        adds = {
            "cpu_milli": workers * each.cpu_milli,
            "memory_mib": workers * each.memory_mib,
            "gpu_milli": workers * gpu,
        } | {f"gpu_milli/{model}": count * gpu for model, count in by_model.items()}
        return [name for name, more in adds.items() if self.excess(request.queue, name, more) > 0]

    def used(self, queue: str, resource: str) -> int:
        total = 0
        for key, attempt in self.live.items():
            request = self.requests[key]
            if request.queue == queue:
                kind, _, model = resource.partition("/")
                gpu = gpus_of(request) * milli_of(request)
                each = gpu if kind == "gpu_milli" else getattr(request.resources, kind)
                shares = attempt.shares.values()
                of_model = [s for s in shares if not model or attempt.models[s.node] == model]
                total += each * sum(share.workers for share in of_model)
        return total

    def excess(self, queue: str, resource: str, more: int) -> int:
        """By how much the queue, or the pot of its cohort, would be above its limit."""
        spec = self.specs.get(queue)
        if spec is None or resource not in spec.nominal or more == 0:
            return 0
        own = spec.nominal[resource]
        after = self.used(queue, resource) + more
        if not spec.cohort:
            return after - own
        pot = drawn = 0
        for one in self.specs.values():
            if one.cohort == spec.cohort and resource in one.nominal:
                used = after if one.queue == queue else self.used(one.queue, resource)
                lends = lent(one, resource)
                pot += lends
                drawn += max(0, used - (one.nominal[resource] - lends))
        above = after - own - spec.borrowing_limit.get(resource, NO_LIMIT)
        draws = after > own - lent(spec, resource)
        return max(above, drawn - pot if draws else above)


def lent(spec: QueueSpec, resource: str) -> int:
    """What others of the cohort may have of it."""
    own = spec.nominal[resource]
    return min(own, spec.lending_limit.get(resource, own))
