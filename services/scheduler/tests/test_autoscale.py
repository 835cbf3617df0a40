"""Replicas follow the traffic, and never to and fro: the bound holds for any traffic at all."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.contracts.autoscaling import Autoscaling
from services.scheduler.autoscale import Autoscaler, Decision
from services.scheduler.stimuli import Load

KEY = ("default", "digits")
UP_S, DOWN_S, IDLE_S = 3, 20, 15
WANTED = Autoscaling(
    min_replicas=0,
    max_replicas=10,
    target_concurrency=10,
    idle_s=IDLE_S,
    up_s=UP_S,
    down_s=DOWN_S,
)
TRAFFIC = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=30)
"""(requests at a time, for so many seconds)."""


class World:
    """A second at a time; replicas are there at once and share the traffic evenly."""

    def __init__(self, wanted: Autoscaling = WANTED, replicas: int = 1) -> None:
        self.wanted = wanted
        self.scaler = Autoscaler()
        self.now = 1000.0
        self.decision = Decision(replicas, 0)
        self.replicas = [replicas]
        """Second by second."""

    def second(self, concurrency: int, p95_ms: int = 1) -> None:
        serving = max(1, self.decision.replicas)
        for node in range(serving):
            milli = concurrency * 1000 // serving
            load = Load(*KEY, milli, p95_ms if milli else 0, milli // 1000)
            if self.decision.replicas or concurrency:
                self.scaler.heard(f"node-{node}", [load], self.now)
        self.decision = self.scaler.decide(KEY, self.wanted, self.decision.replicas, self.now)
        self.replicas.append(self.decision.replicas)
        self.now += 1

    def run(self, *traffic: tuple[int, int], p95_ms: int = 1) -> int:
        for concurrency, seconds in traffic:
            for _ in range(seconds):
                self.second(concurrency, p95_ms)
        return self.decision.replicas


def turns(replicas: Sequence[int]) -> list[tuple[int, bool]]:
    """(second, whether to more) of every change whose direction is another than the last one's."""
    changes = [(at, after > before) for at, (before, after) in enumerate(pairwise(replicas), 1)]
    moved = [(at, up) for at, up in changes if replicas[at] != replicas[at - 1]]
    return [one for i, one in enumerate(moved) if i == 0 or moved[i - 1][1] != one[1]]


@given(TRAFFIC)
def test_more_and_fewer_alternate_at_most_once_in_both_windows(
    traffic: list[tuple[int, int]],
) -> None:
    world = World(Autoscaling(1, 10, 10, up_s=UP_S, down_s=DOWN_S))
    world.run(*traffic)
    for (before, up), (after, _) in pairwise(turns(world.replicas)):
        assert after - before > (DOWN_S if up else UP_S), world.replicas
    seconds = len(world.replicas)
    assert len(turns(world.replicas)) <= 2 + 2 * seconds // (UP_S + DOWN_S)


@given(TRAFFIC)
def test_to_zero_only_after_quiet_and_from_zero_at_once(traffic: list[tuple[int, int]]) -> None:
    world, last = World(), 0
    for concurrency, seconds in traffic:
        for _ in range(seconds):
            before = world.decision.replicas
            world.second(concurrency)
            last = len(world.replicas) if concurrency else last
            after = world.decision.replicas
            assert not concurrency or after, "somebody waits, and nothing is to serve it"
            if before and not after:
                assert len(world.replicas) - last >= IDLE_S


@given(st.integers(1, 9), st.data())
def test_a_load_within_the_band_changes_nothing(replicas: int, data: st.DataObject) -> None:
    """Not so little that one replica fewer would have 80 % of its target, nor above 110 %."""
    low, high = 8 * (replicas - 1) + 1, 11 * replicas
    loads = data.draw(st.lists(st.integers(low, high), min_size=1, max_size=100))
    world = World(replicas=replicas)
    assert world.run(*((load, 1) for load in loads)) == replicas
    assert set(world.replicas) == {replicas}


@given(st.integers(1, 150), st.integers(1, 10))
def test_a_steady_load_is_followed_once(concurrency: int, replicas: int) -> None:
    world = World(replicas=replicas)
    settled = world.run((concurrency, UP_S + DOWN_S + 2))
    assert world.run((concurrency, 200)) == settled
    assert settled * 11 >= min(concurrency, 110)
    assert (settled - 1) * 8 <= concurrency
    assert len(turns(world.replicas)) <= 1


def test_a_peak_shorter_than_the_window_brings_nothing() -> None:
    world = World()
    world.run((5, 30))
    assert world.run((90, UP_S - 1), (5, 2), (90, UP_S - 1), (5, 2)) == 1


def test_who_starts_anew_holds_what_there_is() -> None:
    world = World(replicas=4)
    assert world.run((0, min(DOWN_S, IDLE_S) - 1)) == 4
    assert world.run((0, IDLE_S)) == 0


def test_replicas_that_say_nothing_are_no_idle_ones() -> None:
    """The scheduler was deaf, or they are all loading."""
    world = World(replicas=4)
    for _ in range(10 * DOWN_S):
        world.now += 1
        assert world.scaler.decide(KEY, WANTED, 4, world.now) == Decision(4, 0)
    world.decision = Decision(4, 0)
    assert world.run((1, DOWN_S - 1)) == 4


def test_what_is_slow_gets_more_until_it_is_fast_enough() -> None:
    wanted = Autoscaling(1, 6, target_latency_ms=100, up_s=UP_S, down_s=DOWN_S)
    world = World(wanted)
    assert world.run((1, 100), p95_ms=105) == 1, "within its band"
    assert world.run((1, UP_S + 1), p95_ms=150) == 2
    assert world.run((1, UP_S + 1), p95_ms=150) == 3
    assert world.run((1, 100), p95_ms=90) == 3, "nor fewer while it is nearly too slow"
    assert world.run((1, DOWN_S + 1), p95_ms=20) == 1


def test_a_replica_that_loads_is_waited_for() -> None:
    """Slow answers of the others do not ask for a third before the second has helped."""
    wanted = Autoscaling(1, 6, target_latency_ms=100, up_s=UP_S, down_s=DOWN_S)
    scaler = Autoscaler()
    for second in range(50):
        scaler.heard("node-0", [Load(*KEY, 1000, 150, 10)], 1000.0 + second)
        decision = scaler.decide(KEY, wanted, 2, 1000.0 + second)
        assert decision.replicas == 2


def test_idle_replicas_are_spare_until_traffic_returns() -> None:
    world = World(Autoscaling(1, 10, 10, down_s=3600), replicas=5)
    world.run((45, 30))
    assert world.decision == (5, 0)
    world.run((9, 9))
    assert world.decision == (5, 0), "too short a rest to be one"
    world.run((9, 3))
    assert world.decision == (5, 3), "one more would be at more than 80 % of its target"
    world.second(45)
    assert world.decision == (5, 0)
    world.run((0, 12))
    assert world.decision == (5, 4), "the last one is the user's"


@pytest.mark.parametrize(("replicas", "expected"), [(0, 2), (1, 2), (7, 4)])
def test_other_bounds_hold_at_once(replicas: int, expected: int) -> None:
    wanted = Autoscaling(2, 4)
    assert Autoscaler().decide(KEY, wanted, replicas, 0.0).replicas == expected
