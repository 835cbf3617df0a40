"""Quotas in the ledger's own account: counted anew from what is placed, each time it is asked."""

from collections.abc import Mapping

from libs.contracts.events import JobRequested
from services.scheduler.sheets import Attempt, Key, gpus_of, milli_of
from services.scheduler.stimuli import QueueSpec

NO_LIMIT = 1 << 62


class Allowances:
    def __init__(self) -> None:
        self.requests: dict[Key, JobRequested] = {}
        self.live: dict[Key, Attempt] = {}
        self.specs: dict[str, QueueSpec] = {}

    def beyond_quota(self, request: JobRequested, by_model: Mapping[str, int]) -> list[str]:
        """The resources of which its queue would have too much with it."""
        adds = self.adds(request, by_model)
        return [name for name, more in adds.items() if self.excess(request.queue, name, more) > 0]

    def adds(self, request: JobRequested, by_model: Mapping[str, int]) -> dict[str, int]:
        """What it takes, with so many workers on nodes of each model."""
        workers, each = request.workers, request.resources
        gpu = gpus_of(request) * milli_of(request)
        return {
            "cpu_milli": workers * each.cpu_milli,
            "memory_mib": workers * each.memory_mib,
            "gpu_milli": workers * gpu,
        } | {f"gpu_milli/{model}": count * gpu for model, count in by_model.items()}

    def used(self, queue: str, resource: str) -> int:
        mine = (one for key, one in self.live.items() if self.requests[key].queue == queue)
        return sum(self.held(attempt, resource) for attempt in mine)

    def held(self, attempt: Attempt, resource: str) -> int:
        """By one that may have been taken back."""
        request = self.requests[attempt.key]
        kind, _, model = resource.partition("/")
        gpu = gpus_of(request) * milli_of(request)
        each = gpu if kind == "gpu_milli" else getattr(request.resources, kind)
        shares = attempt.shares.values()
        of_model = [s for s in shares if not model or attempt.models[s.node] == model]
        return int(each * sum(share.workers for share in of_model))

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
