"""Quotas, in Kueue's words: what a queue holds, may hold, and has borrowed of its cohort.

Of a resource that queues of a cohort name, each keeps `nominal - lending_limit` to itself and puts
the rest into one pot. What a queue takes above what it keeps comes out of the pot, its own first;
a queue that takes more than its nominal borrows.
https://kueue.sigs.k8s.io/docs/concepts/cluster_queue/#cohort
"""

from collections.abc import Iterable, Mapping

from libs.contracts.events import Resources
from services.scheduler.jobs import Ask, Placement
from services.scheduler.shapes import GPU_MILLI
from services.scheduler.stimuli import QueueSpec

Amounts = Mapping[str, int]
"""By resource: `cpu_milli`, `memory_mib`, `gpu_milli`, `gpu_milli/<MODEL>`."""
FLAVOR = "gpu_milli/"
SHARE_SCALE = 1_000_000
NO_LIMIT = 1 << 62


def amounts_of(ask: Ask, workers_by_model: Mapping[str, int]) -> dict[str, int]:
    """What a gang takes whose workers are on nodes of these models."""
    shape = ask.shape
    each = shape.gpus * shape.gpu_milli
    amounts = {
        "cpu_milli": ask.workers * shape.cpu_milli,
        "memory_mib": ask.workers * shape.memory_mib,
        "gpu_milli": ask.workers * each,
    }
    if each:
        amounts |= {FLAVOR + model: n * each for model, n in workers_by_model.items() if model}
    return {name: amount for name, amount in amounts.items() if amount}


def amounts_placed(ask: Ask, placement: Placement) -> dict[str, int]:
    by_model: dict[str, int] = {}
    for part in placement.parts:
        by_model[part.model] = by_model.get(part.model, 0) + len(part.gpus)
    return amounts_of(ask, by_model)


class Quota:
    """Who holds how much, by queue."""

    def __init__(self) -> None:
        self.specs: dict[str, QueueSpec] = {}
        self.cohorts: dict[str, list[QueueSpec]] = {}
        self.used: dict[str, dict[str, int]] = {}
        self.leveled: set[str] = set()
        """Cohorts all of whose queues go by attained service: so do they among each other."""

    def apply(self, specs: Iterable[QueueSpec]) -> None:
        """These are the queues from now on."""
        self.specs = {spec.queue: spec for spec in specs}
        self.cohorts = {}
        for _, spec in sorted(self.specs.items()):
            if spec.cohort:
                self.cohorts.setdefault(spec.cohort, []).append(spec)
        self.leveled = {
            cohort
            for cohort, specs in self.cohorts.items()
            if all(spec.order == "attained" for spec in specs)
        }

    def take(self, queue: str, amounts: Amounts, sign: int = 1) -> None:
        used = self.used.setdefault(queue, {})
        for name, amount in amounts.items():
            used[name] = used.get(name, 0) + sign * amount
            assert used[name] >= 0, (queue, used)

    def has(self, queue: str, name: str) -> int:
        return self.used.get(queue, {}).get(name, 0)

    def members(self, spec: QueueSpec, name: str) -> list[QueueSpec]:
        """Of its cohort, those that name the resource."""
        return [one for one in self.cohorts.get(spec.cohort, ()) if name in one.nominal]

    def room(self, queue: str, name: str) -> int:
        """How much more it may take of a resource."""
        spec = self.specs.get(queue)
        if spec is None or name not in spec.nominal:
            return NO_LIMIT
        used = self.has(queue, name)
        if not spec.cohort:
            return spec.nominal[name] - used
        members = self.members(spec, name)
        pot = sum(one.nominal[name] - kept(one, name) for one in members)
        drawn = sum(max(0, self.has(one.queue, name) - kept(one, name)) for one in members)
        mine = max(0, kept(spec, name) - used)
        limit = NO_LIMIT
        if name in spec.borrowing_limit:
            limit = spec.nominal[name] + spec.borrowing_limit[name] - used
        return min(limit, mine + pot - drawn)

    def allows(self, queue: str, amounts: Amounts) -> bool:
        if queue not in self.specs:
            return True
        return all(amount <= self.room(queue, name) for name, amount in amounts.items())

    def owns(self, queue: str, amounts: Amounts) -> bool:
        """Whether with these it is still within what is its own, in all that it names."""
        spec = self.specs.get(queue)
        if spec is None:
            return False
        named = [name for name in amounts if name in spec.nominal]
        return bool(named) and all(
            self.has(queue, name) + amounts[name] <= spec.nominal[name] for name in named
        )

    def borrows(self, queue: str, names: Iterable[str]) -> bool:
        """Whether it has more than its own of any of these."""
        spec = self.specs.get(queue)
        if spec is None or not spec.cohort:
            return False
        return any(self.has(queue, n) > spec.nominal.get(n, NO_LIMIT) for n in names)

    def share(self, queue: str, amounts: Amounts) -> int:
        """Its dominant share of its cohort with these, over its weight: 0 within its own.

        The largest of borrowed / what the cohort has, in millionths; the next to get something is
        the one with the least (weighted dominant resource fairness, as Kueue's fair sharing).
        """
        spec = self.specs.get(queue)
        if spec is None or not spec.cohort:
            return 0
        most = 0
        for name, nominal in spec.nominal.items():
            borrowed = self.has(queue, name) + amounts.get(name, 0) - nominal
            if borrowed > 0:
                whole = sum(one.nominal[name] for one in self.members(spec, name))
                most = max(most, SHARE_SCALE * borrowed // max(1, whole))
        return most * GPU_MILLI // max(1, spec.weight)

    def flavors(self, queue: str) -> bool:
        """Whether it counts GPUs by model."""
        spec = self.specs.get(queue)
        return spec is not None and any(name.startswith(FLAVOR) for name in spec.nominal)


def kept(spec: QueueSpec, name: str) -> int:
    """What nobody else may borrow of it."""
    nominal = spec.nominal[name]
    return max(0, nominal - spec.lending_limit.get(name, nominal))


def problem_of(spec: QueueSpec) -> str:
    """What makes a queue unusable; "" for a good one."""
    if not 1 <= spec.weight <= NO_LIMIT:
        return f"weight: at least 1, got {spec.weight}"
    for field in ("grace_s", "aging_s"):
        if getattr(spec, field) < 0:
            return f"{field}: at least 0, got {getattr(spec, field)}"
    for field in ("nominal", "borrowing_limit", "lending_limit"):
        for name, amount in getattr(spec, field).items():
            if name not in Resources.__struct_fields__[:3] and not name.startswith(FLAVOR):
                return f"{field}: no resource {name!r}"
            if not 0 <= amount <= NO_LIMIT:
                return f"{field}.{name}: at least 0, got {amount}"
    return ""
