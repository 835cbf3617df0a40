"""What queues owe their cohorts in the ledger's own account: in floats, from what is placed.

Alone a queue would hold what it asks for, up to its own. What it has above that belongs to others,
what it lacks others have; of a moment half is forgotten in a day. That a replica waits nobody says,
so nothing is known of the queue of replicas.
"""

import math
from collections.abc import Callable, Iterable

from libs.contracts.events import JobRequested
from services.scheduler.allowances import Allowances
from services.scheduler.sheets import gpus_of, milli_of

SAMPLE_S, HALF_LIFE_S = 300, 86_400
PART = 64
"""A queue that owes less than this part of its own owes nothing."""
ROUNDED = 2
"""Units (a milli, a MiB): who counts in integers may be off by so many."""


class Owings:
    def __init__(self, allowances: Allowances, waiting: Callable[[], list[JobRequested]]) -> None:
        self.allowances = allowances
        self.waiting = waiting
        self.sample = 0
        self.owes: dict[tuple[str, str], float] = {}
        """(queue, resource)"""

    def pass_to(self, now: float) -> None:
        """Since the last time nothing changed."""
        sample = math.floor(now / SAMPLE_S)
        if sample <= self.sample:
            return
        kept = 0.5 ** ((sample - self.sample) * SAMPLE_S / HALF_LIFE_S)
        self.sample, before, self.owes = sample, self.owes, {}
        waiting = self.waiting()
        for spec in self.allowances.specs.values():
            for name, own in spec.nominal.items() if spec.cohort else ():
                has = self.allowances.used(spec.queue, name)
                asked = sum(asked_by(one, name) for one in waiting if one.queue == spec.queue)
                above = has - min(own, has + asked)
                owed = before.get((spec.queue, name), 0)
                self.owes[spec.queue, name] = above + (owed - above) * kept

    def forget(self) -> None:
        """Who is in no cohort any more leaves what it owed."""
        specs = self.allowances.specs.values()
        lend = {spec.queue for spec in specs if spec.cohort and spec.nominal}
        self.owes = {key: owed for key, owed in self.owes.items() if key[0] in lend}

    def most(self, queue: str, names: Iterable[str]) -> float:
        """Of what is owed of these."""
        nominal = self.allowances.specs[queue].nominal
        return max((self.owes.get((queue, n), 0) for n in names if n in nominal), default=0)

    def is_even(self, queue: str, names: Iterable[str]) -> bool:
        """Surely, however it is rounded."""
        nominal = self.allowances.specs[queue].nominal
        return all(
            (self.owes.get((queue, name), 0) + ROUNDED) * PART < nominal[name]
            for name in names
            if name in nominal
        )

    def is_owing(self, queue: str, names: Iterable[str]) -> bool:
        """Surely."""
        nominal = self.allowances.specs[queue].nominal
        return any(
            (self.owes.get((queue, name), 0) - ROUNDED) * PART > nominal[name]
            for name in names
            if name in nominal
        )


def asked_by(request: JobRequested, name: str) -> int:
    """Who takes GPUs of several models asks for none of them by name."""
    kind, _, model = name.partition("/")
    if model and set(request.gpu_models) != {model}:
        return 0
    each = getattr(request.resources, kind)
    return request.workers * (gpus_of(request) * milli_of(request) if kind == "gpu_milli" else each)
