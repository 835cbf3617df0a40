"""Who may go for whom, in the ledger's own words.

In most cohorts the queues' words say it, apart from ages and times. In one all of whose queues go
by attained service nobody of a queue that neither borrows nor owes goes for another queue, and of
one that owes nothing no more than it has borrowed. Who goes has sunk deeper than who comes; or no
less deep, for what is the other queue's own, which owes nothing and has waited for its grace.
Nobody goes for a job of its own queue while that wants no more than its own. Of equals, each alone
on a node, one of the queue that owes the most goes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from libs.contracts.events import JobRequested
from services.scheduler.owings import ROUNDED, asked_by
from services.scheduler.sheets import Attempt, Key, gpus_of, milli_of

if TYPE_CHECKING:
    from services.scheduler.ledger import Ledger

LEVELS_GPU_S = (3_600, 28_800, 230_400)
WAIT_MAX_S = 115_200


def by_words(ledger: "Ledger", head: JobRequested, victim: JobRequested) -> bool:
    """What the queues' words allow, apart from ages and times."""
    mine, other = ledger.specs.get(head.queue), ledger.specs.get(victim.queue)
    if mine is None:
        return False
    if head.queue == victim.queue:
        lower = mine.aging_s > 0 or victim.priority < head.priority
        return mine.order == "attained" or (mine.within_queue == "lower" and lower)
    if other is None or not mine.cohort or mine.cohort != other.cohort:
        return False
    return mine.reclaim != "never"


def is_leveled(ledger: "Ledger", cohort: str) -> bool:
    orders = {spec.order for spec in ledger.specs.values() if spec.cohort == cohort}
    return bool(cohort) and orders == {"attained"}


def level(ledger: "Ledger", key: Key) -> int:
    """How far it sank by the GPU seconds it got; -1 for who waited for 32 h in all."""
    got, attempt = ledger.services[key], ledger.live.get(key)
    until = attempt.placed_at if attempt else ledger.now
    if until - got.asked_at - got.held_s >= WAIT_MAX_S:
        return -1
    gpu_s = got.gpu_s + (ledger.gpu_s(attempt) if attempt else 0)
    return sum(gpu_s >= least for least in LEVELS_GPU_S)


class Rights:
    """Of a head for whom these have gone, in this order, and who is not placed yet."""

    def __init__(
        self,
        ledger: "Ledger",
        head: JobRequested,
        by_model: Mapping[str, int],
        victims: list[Attempt],
    ) -> None:
        self.ledger, self.head, self.by_model, self.victims = ledger, head, by_model, victims
        self.spec = ledger.specs[head.queue]
        self.flavors = any("/" in name for name in self.spec.nominal)
        self.adds = {
            name: more
            for name, more in ledger.adds(head, by_model).items()
            if more and (self.flavors or "/" not in name)
        }
        self.key = head.project, head.job
        self.level = level(ledger, self.key)
        own = [name for name in self.adds if name in self.spec.nominal]
        waited = ledger.now - ledger.services[self.key].waits_since
        self.asks_own = (
            bool(own)
            and self.spec.reclaim != "never"
            and waited >= self.spec.grace_s
            and all(self.had(head.queue, n) + self.adds[n] <= self.spec.nominal[n] for n in own)
        )

    def check(self) -> None:
        for number, victim in enumerate(self.victims):
            if self.of(victim).queue == self.head.queue:
                self.check_own(victim)
            else:
                self.check_other(victim, self.victims[number:])
        if len(self.victims) == 1 and self.of(self.victims[0]).queue != self.head.queue:
            self.check_owes_most(self.victims[0])

    def check_own(self, victim: Attempt) -> None:
        head, other = self.head, self.of(victim)
        lower = self.spec.within_queue == "lower" and other.priority < head.priority
        assert lower or self.is_above(victim), f"{victim.key} is of no deeper level"
        asks = self.asks_own and self.ledger.owings.is_even(head.queue, self.adds)
        assert not (asks and self.is_content()), f"{victim.key}: its queue wants only its own"

    def check_other(self, victim: Attempt, left: list[Attempt]) -> None:
        """These were left when it went."""
        head, other, owings = self.head, self.of(victim), self.ledger.owings
        nominal = self.ledger.specs[other.queue].nominal
        borrows = any(self.had(other.queue, n, left) > nominal.get(n, 1 << 62) for n in self.adds)
        even = owings.is_even(other.queue, self.adds)
        assert borrows or not even, f"{victim.key} was its queue's own, which owes nothing"
        lower = self.spec.reclaim == "any" or other.priority < head.priority
        asks = self.asks_own and lower and not owings.is_owing(head.queue, self.adds)
        asks = asks and level(self.ledger, victim.key) >= self.level
        assert asks or self.is_above(victim), f"{victim.key} has sunk no deeper"

    def check_owes_most(self, gone: Attempt) -> None:
        """Where no node had room."""
        ledger, owings = self.ledger, self.ledger.owings
        owed = owings.most(self.of(gone).queue, self.adds)
        ledger.restore(gone)
        equals = [] if self.has_room() else [a for a in ledger.live.values() if a is not gone]
        for one in equals:
            if self.is_equal(one, gone) and owings.most(self.of(one).queue, self.adds) > owed:
                ledger.remove(one)
                fits = not ledger.beyond_quota(self.head, self.by_model)
                ledger.restore(one)
                more = owings.most(self.of(one).queue, self.adds) - owed
                assert not fits or more <= 2 * ROUNDED, f"{one.key} of who owes more stays"
        ledger.remove(gone)

    def is_equal(self, one: Attempt, gone: Attempt) -> bool:
        """It is alone on a node that has room for the head, and would as well have gone."""
        ledger, request, other = self.ledger, self.of(one), self.of(gone)
        spec = ledger.specs.get(request.queue)
        if spec is None or spec.cohort != self.spec.cohort or request.queue == self.head.queue:
            return False
        (node, *more), sheet = one.shares, ledger.sheets[next(iter(one.shares))]
        if more or ledger.on(node) != [one] or not sheet.suits(self.head):
            return False
        return (
            sheet.room(self.head, empty=True) >= self.head.workers
            and (not self.flavors or sheet.last.gpu_model in self.by_model)
            and request.preemptible
            and one.token <= ledger.token_before
            and not (one.ages or gone.ages)
            and request.priority == other.priority
            and milli(request) == milli(other)
            and level(ledger, one.key) >= level(ledger, gone.key)
            and ledger.owings.is_owing(request.queue, self.adds)
        )

    # --- what that takes

    def of(self, attempt: Attempt) -> JobRequested:
        return self.ledger.requests[attempt.key]

    def is_above(self, victim: Attempt) -> bool:
        same = self.of(victim).priority == self.head.priority
        return same and self.level < level(self.ledger, victim.key)

    def had(self, queue: str, name: str, left: list[Attempt] | None = None) -> int:
        """Before they went; with those only who were left."""
        back = [one for one in left or self.victims if self.of(one).queue == queue]
        return self.ledger.used(queue, name) + sum(self.ledger.held(one, name) for one in back)

    def is_content(self) -> bool:
        """Whether its queue had and asked for no more than its own."""
        gone = [self.of(victim) for victim in self.victims]
        waiting = [one for one in self.ledger.waiting() if one not in gone]
        return all(
            self.had(self.head.queue, name)
            + sum(asked_by(one, name) for one in waiting if one.queue == self.head.queue)
            <= own
            for name, own in self.spec.nominal.items()
        )

    def has_room(self) -> bool:
        """Whatever its quota is."""
        models = self.by_model if self.flavors else [None]
        return any(self.ledger.has_room(self.head, model) for model in models)


def milli(request: JobRequested) -> int:
    """GPU milli of the whole gang."""
    return request.workers * gpus_of(request) * milli_of(request)
