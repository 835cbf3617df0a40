"""What there was to do for each model since the last time, as a heartbeat tells it.

Requests there at a time, on average, are the seconds that all of them spent here over the seconds
that passed (Little's law): no request is looked at, and none is missed between two looks.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import msgspec

from services.inference.endpoint import Endpoint
from services.inference.endpoints import Endpoints, Key
from services.inference.front import LATENCY_BOUNDS_NS, Counts
from services.inference.served import Served

MS = 1_000_000
"""In ns."""
MILLI = 1000
P95 = 0.95
WINDOW_NS = 200 * MS
"""At least: of a shorter one, in which a batch ends or none does, nothing follows."""


class Load(msgspec.Struct, frozen=True):
    """`services/scheduler/stimuli.py` reads it, and so do the other replicas."""

    project: str
    model: str
    concurrency_milli: int
    p95_ms: int = 0
    requests: int = 0
    ready: bool = True
    """It is served here; else somebody here waits for it."""


class Sums(NamedTuple):
    """Of one version since it is served."""

    requests: int
    spent_ns: int
    latency: Sequence[int]


class Loads:
    def __init__(self, endpoints: Endpoints, now_ns: int) -> None:
        self.endpoints = endpoints
        self.known: dict[Served, Sums] = {}
        self.looked_ns = now_ns
        self.last: dict[Key, Load] = {}

    def look(self, waiting: Mapping[Key, int], now_ns: int) -> list[Load]:
        """Since the last look. `waiting`: requests for models that nobody serves."""
        routed = {k: one for k, one in self.endpoints.by_key.items() if any(one.route.values())}
        passed_ns = now_ns - self.looked_ns
        if passed_ns >= WINDOW_NS:
            known, self.known, self.looked_ns = self.known, {}, now_ns
            self.last = {k: self.load_of(one, known, passed_ns) for k, one in routed.items()}
        loads = [self.last.get(key, Load(*key, 0)) for key in routed]
        return loads + waiting_for(waiting)

    def load_of(self, endpoint: Endpoint, known: Mapping[Served, Sums], passed_ns: int) -> Load:
        requests = spent_ns = present = 0
        latency = [0] * (len(LATENCY_BOUNDS_NS) + 1)
        for served in endpoint.served.values():
            counts = served.counts()
            sums = self.known[served] = sums_of(counts)
            before = known.get(served, Sums(0, 0, [0] * len(latency)))
            requests += sums.requests - before.requests
            spent_ns += sums.spent_ns - before.spent_ns
            pairs = zip(latency, sums.latency, before.latency, strict=True)
            latency = [total + now - then for total, now, then in pairs]
            present += counts.waiting + sum(served.running) + served.streams
        milli = max(spent_ns * MILLI // passed_ns, present * MILLI)
        return Load(endpoint.project, endpoint.model, milli, p95_ms(latency), requests)


def together(each: Iterable[Sequence[Load]]) -> list[Load]:
    """Of several processes that are one node. It is served there if any serves it."""
    found: dict[Key, Load] = {}
    for load in chain.from_iterable(each):
        key = load.project, load.model
        so_far = found.get(key, Load(*key, 0, ready=False))
        found[key] = Load(
            *key,
            so_far.concurrency_milli + load.concurrency_milli,
            max(so_far.p95_ms, load.p95_ms),
            so_far.requests + load.requests,
            so_far.ready or load.ready,
        )
    return list(found.values())


def waiting_for(waiting: Mapping[Key, int]) -> list[Load]:
    return [Load(*key, count * MILLI, ready=False) for key, count in sorted(waiting.items())]


def sums_of(counts: Counts) -> Sums:
    failed = counts.failures.values()
    requests = counts.success_count + sum(n for n, _ in failed)
    return Sums(requests, counts.success_ns + sum(ns for _, ns in failed), counts.latency)


def p95_ms(latency: Sequence[int]) -> int:
    """Of a histogram over `LATENCY_BOUNDS_NS`, evenly within its bucket; 0 of an empty one."""
    if not any(latency):
        return 0
    below = list(accumulate(latency))
    rank = P95 * below[-1]
    at = bisect_left(below, rank)
    bounds = (0, *LATENCY_BOUNDS_NS, 2 * LATENCY_BOUNDS_NS[-1])
    share = (rank - (below[at] - latency[at])) / latency[at]
    return max(1, round((bounds[at] + share * (bounds[at + 1] - bounds[at])) / MS))
