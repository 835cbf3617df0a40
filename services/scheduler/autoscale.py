"""How many replicas a deployment should have, from what they say of themselves. Pure.

An observation of the traffic becomes a `Need`: the fewest replicas that are not overloaded, the
number to aim at, and the most worth keeping. There is one more replica only where the fewest was
above what there is for the whole of `up_s`, and one less only where what is worth keeping was below
for the whole of `down_s`. A need that brought replicas is itself worth keeping them for `down_s`,
and one that took some away lets none back for `up_s`: so however the traffic jumps, more and fewer
alternate at most once in `up_s + down_s`.

What was observed is not in the log, decisions are: who starts anew holds what there is for a
window.
"""

from collections import deque
from typing import NamedTuple

from libs.contracts.autoscaling import Autoscaling
from services.scheduler.stimuli import Load

Key = tuple[str, str]
"""(project, model)"""
OVER_PERCENT = 110
"""Of its target: above that a replica is overloaded. HorizontalPodAutoscaler's tolerance."""
WORTH_PERCENT = 80
"""Of its target: where fewer replicas would have less than that each, there may be fewer."""
FRESH_S = 3.0
"""A replica that said nothing for longer has nothing to say."""
SPARE_S = 10.0
"""Replicas nobody needed for so long may be taken for others' work."""


class Need(NamedTuple):
    """fewest <= aim <= worth."""

    at: float
    fewest: int
    aim: int
    worth: int


class Decision(NamedTuple):
    replicas: int
    spare: int
    """So many of them are idle."""


class Track:
    """What is known of one deployment's traffic."""

    def __init__(self, now: float) -> None:
        self.since = now
        """It was watched without a gap."""
        self.busy_at = now
        self.loads: dict[str, tuple[float, Load]] = {}
        """Of each node: when it was said, and what."""
        self.needs: deque[Need] = deque()

    def heard(self, node: str, load: Load, now: float) -> None:
        self.loads[node] = now, load
        if load.requests or load.concurrency_milli:
            self.busy_at = now

    def look(self, wanted: Autoscaling, now: float) -> None:
        """Once for every decision. What was not heard of leaves a gap, and says nothing."""
        fresh = {node: one for node, one in self.loads.items() if now - one[0] <= FRESH_S}
        self.loads = fresh
        if not fresh:
            self.since = now
            self.needs.clear()
            return
        self.needs.append(need_of(wanted, [load for _, load in fresh.values()], now))
        longest_s = max(wanted.up_s, wanted.down_s, SPARE_S)
        while self.needs[0].at < now - longest_s:
            self.needs.popleft()

    def within(self, window_s: float, now: float) -> list[Need]:
        """Needs of the whole window; [] while it was not watched for so long."""
        if now - self.since < window_s:
            return []
        return [need for need in self.needs if need.at >= now - window_s]


def need_of(wanted: Autoscaling, loads: list[Load], now: float) -> Need:
    """Of what the replicas say that serve it."""
    total = sum(load.concurrency_milli for load in loads)
    target = wanted.target_concurrency * 1000
    fewest = ceiling(total * 100, target * OVER_PERCENT)
    aim = ceiling(total, target)
    worth = ceiling(total * 100, target * WORTH_PERCENT)
    if wanted.target_latency_ms:
        slow, some, most = needed_for_latency(wanted.target_latency_ms, loads)
        fewest, aim, worth = max(fewest, slow), max(aim, some), max(worth, most)
    return Need(now, fewest, max(fewest, aim), max(fewest, aim, worth))


def needed_for_latency(target_ms: int, loads: list[Load]) -> tuple[int, int, int]:
    """In proportion, and at most twice as many: what is still loading has not helped yet."""
    ready = sum(load.ready for load in loads)
    p95_ms = max(load.p95_ms for load in loads)
    if p95_ms * 100 > target_ms * OVER_PERCENT:
        aim = min(ceiling(ready * p95_ms, target_ms), 2 * ready)
        return ready + 1, max(aim, ready + 1), aim
    return 0, 0, ready if p95_ms * 100 >= target_ms * WORTH_PERCENT else 0


def ceiling(amount: int, each: int) -> int:
    return -(-amount // each)


class Autoscaler:
    """Every deployment's traffic, for as long as one scheduler leads."""

    def __init__(self) -> None:
        self.tracks: dict[Key, Track] = {}

    def heard(self, node: str, loads: list[Load], now: float) -> None:
        for load in loads:
            self.track((load.project, load.model), now).heard(node, load, now)

    def track(self, key: Key, now: float) -> Track:
        if key not in self.tracks:
            self.tracks[key] = Track(now)
        return self.tracks[key]

    def decide(self, key: Key, wanted: Autoscaling, replicas: int, now: float) -> Decision:
        """`replicas`: what was decided last."""
        track = self.track(key, now)
        track.look(wanted, now)
        least, most = wanted.min_replicas, wanted.max_replicas
        after = min(max(scaled(track, wanted, replicas, now), least), most)
        quiet = track.within(SPARE_S, now)
        needed = max(least, *(need.worth for need in quiet)) if quiet else after
        return Decision(after, max(0, after - needed))


def scaled(track: Track, wanted: Autoscaling, replicas: int, now: float) -> int:
    if replicas == 0:
        return max(1, track.needs[-1].aim) if track.needs and track.needs[-1].aim else 0
    if wanted.min_replicas == 0 and now - max(track.busy_at, track.since) >= wanted.idle_s:
        return 0
    more = track.within(wanted.up_s, now)
    if more and min(need.fewest for need in more) > replicas:
        return min(need.aim for need in more)
    fewer = track.within(wanted.down_s, now)
    if fewer and max(need.worth for need in fewer) < replicas:
        return max(1, *(need.worth for need in fewer))
    return replicas
