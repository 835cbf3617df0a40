"""What a queue owes its cohort: the mean of what it borrowed, less what it was denied of its own.

Alone a queue would hold what it asks for, up to its nominal. What it holds above that it has of the
others; what it lacks, the others have of it. Every `SAMPLE_S` the difference goes into a mean that
forgets half in a day, as Kueue's admission fair sharing counts use:
https://kueue.sigs.k8s.io/docs/concepts/admission_fair_sharing/

Integers, from what the log says alone: the same log gives the same debts.
"""

import math
from collections.abc import Iterable, Mapping

import msgspec

from services.scheduler.lines import Line, Lines, Name
from services.scheduler.quota import Amounts, Quota, amounts_of

SAMPLE_S = 300
"""Shorter work than this is met by chance, in proportion to its length."""
HALF_LIFE_SAMPLES = 86_400 // SAMPLE_S
SCALE = 1 << 20
KEPT = 1_046_055
"""Of a mean from sample to sample, of `SCALE`: 2 ** (-1 / HALF_LIFE_SAMPLES)."""
FINE = 1 << 10
"""Parts of a unit (a milli, a MiB) in which it is kept."""
SLACK_PARTS = 64
"""So small a part of its own may be owed: what was borrowed once is soon forgotten."""
SAMPLES_MAX = 32 * HALF_LIFE_SAMPLES
"""What was before these is forgotten to the last unit."""


class Account(msgspec.Struct):
    """Of one queue."""

    sampled: int = 0
    """Samples since 1970; 0 before the first."""
    owes: dict[str, int] = {}
    """By resource; less than 0 for what it is owed."""


class Debts:
    """Of the queues that have a cohort and something of their own."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.accounts: dict[str, Account] = {}

    def open(self, now: float) -> None:
        """For the queues as they are now; what is known of those that stay is kept."""
        self.accounts = {
            queue: self.accounts.get(queue, Account(sample_of(now)))
            for queue, spec in self.quota.specs.items()
            if spec.cohort and spec.nominal
        }

    def settle(self, queue: str, now: float, lines: Lines) -> None:
        """Before anything changes that it follows from."""
        account = self.accounts.get(queue)
        sample = sample_of(now)
        if account is not None and account.sampled < sample:
            account.owes = dict(self.owed_by(queue, now, lines))
            account.sampled = sample

    def owed_by(self, queue: str, now: float, lines: Lines) -> Amounts:
        """As of now, in parts of a unit."""
        account = self.accounts.get(queue)
        if account is None:
            return {}
        behind = sample_of(now) - account.sampled if account.sampled else 0
        if behind <= 0:
            return account.owes
        above = self.above(queue, lines.by_queue.get(queue, {}))
        return {
            name: mean(account.owes.get(name, 0), amount * FINE, min(behind, SAMPLES_MAX))
            for name, amount in above.items()
        }

    def is_even(self, queue: str, names: Iterable[str], now: float, lines: Lines) -> bool:
        """Whether it owes nothing of these, up to a part of its own that nobody asks for."""
        owes = self.owed_by(queue, now, lines)
        nominal = self.quota.specs[queue].nominal
        return all(owes.get(n, 0) * SLACK_PARTS <= nominal.get(n, 0) * FINE for n in names)

    def above(self, queue: str, lines: Mapping[Name, Line]) -> dict[str, int]:
        """What it holds now, less what it would hold alone."""
        wanted = self.wanted(queue, lines)
        nominal = self.quota.specs[queue].nominal
        return {n: self.quota.has(queue, n) - min(nominal[n], wanted[n]) for n in nominal}

    def is_content(self, queue: str, lines: Lines) -> bool:
        """Whether what it holds and waits for is no more than its own."""
        nominal = self.quota.specs[queue].nominal
        wanted = self.wanted(queue, lines.by_queue.get(queue, {}))
        return all(wanted[name] <= own for name, own in nominal.items())

    def wanted(self, queue: str, lines: Mapping[Name, Line]) -> dict[str, int]:
        """What it holds and waits for, of what it names."""
        found = {n: self.quota.has(queue, n) for n in self.quota.specs[queue].nominal}
        for line in lines.values():
            for name, amount in asked(line).items():
                if name in found:
                    found[name] += amount
        return found


def sample_of(now: float) -> int:
    return math.floor(now / SAMPLE_S)


def next_sample(now: float) -> float:
    return float((sample_of(now) + 1) * SAMPLE_S)


def mean(before: int, amount: int, samples: int) -> int:
    """After so many samples of the same amount."""
    for _ in range(samples):
        before = (before * KEPT + amount * (SCALE - KEPT)) // SCALE
    return before


def asked(line: Line) -> Amounts:
    """By all who stand in it; who takes GPUs of several models asks for none of them by name."""
    ask, jobs = line.ask, len(line.places)
    models = ask.shape.gpu_models
    each = amounts_of(ask, {models[0]: ask.workers} if len(models) == 1 else {})
    return {name: amount * jobs for name, amount in each.items()}
