"""Whatever the threads do: every request is answered once, with its own rows, or told why not,
by Python's and C++'s batcher alike."""

import gc
import queue
import random
import re
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from libs.contracts.pipeline import Batching
from services.inference.front import Batcher, Sampling
from services.inference.line import BACK_SHARE
from services.inference.tests.callers import (
    LOOSE,
    PATIENCE_S,
    QUIET,
    Caller,
    Make,
    both,
    configured,
    joined,
    marks,
    run,
    runners,
    spin,
    taken,
    threads,
)

TEN_MINUTES = 600_000_000
"""In us: longer than any test."""
PATIENCE_US = 2000
"""With those whom a batch of 64 ms has answered."""
ROUNDS = 50
"""Chances for a thread to be where it is awaited."""


@both
@pytest.mark.parametrize(
    "limits",
    [
        Batching(max_batch_size=8, max_queue_size=4000),
        Batching(max_batch_size=8, max_queue_size=4000, max_queue_delay_microseconds=300),
        Batching(
            max_batch_size=8,
            max_queue_size=4000,
            preferred_batch_size=(3, 5),
            max_queue_delay_microseconds=300,
            priority_levels=2,
        ),
    ],
    ids=["at-once", "delayed", "preferred"],
)
def test_eight_threads_join_and_two_serve_and_each_has_its_own_rows_once(
    make: Make, limits: Batching
) -> None:
    batcher = configured(make, limits)
    callers = [Caller(mark, 1 + mark % 4) for mark in range(2000)]
    with runners(batcher), threads(8, lambda n: [c.join(batcher) for c in callers[n::8]].clear()):
        pass
    for caller in callers:
        assert caller.answer.batch_rows <= 8
    counts = batcher.counts()
    assert counts.success_count == 2000
    assert counts.inference_count == sum(caller.rows for caller in callers)
    assert sum(rows * runs for rows, (runs, *_) in counts.batches.items()) == counts.inference_count


@both
@pytest.mark.parametrize("delay_us", [0, 100])
def test_a_lone_caller_is_always_noticed_by_one_of_the_idle(make: Make, delay_us: int) -> None:
    batcher = configured(make, Batching(max_queue_delay_microseconds=delay_us))
    with runners(batcher, 3):
        for mark in range(300):
            caller = Caller(mark)
            caller.join(batcher)
            assert caller.done.wait(PATIENCE_S)
            assert caller.answer.batch_rows == 1


@both
def test_after_a_slow_batch_the_next_waits_for_who_was_answered(make: Make) -> None:
    """Long enough for them to ask again, as nothing says that they will not."""
    batcher = configured(make, Batching())
    joined(batcher, 1, 1)
    slow = taken(batcher)
    spin(BACK_SHARE * PATIENCE_US)
    answered_ns = time.monotonic_ns()
    slow.answer(run(slow.inputs()))
    Caller(3).join(batcher)
    assert taken(batcher).rows == 1
    assert time.monotonic_ns() - answered_ns >= PATIENCE_US * 1000


@both
def test_who_leaves_among_many_threads_is_told_nothing_wrong_and_nobody_else_loses(
    make: Make,
) -> None:
    batcher = configured(make, Batching(max_batch_size=4, max_queue_size=4000))
    callers = [Caller(mark) for mark in range(1600)]

    def come_and_go(n: int) -> None:
        chance = random.Random(n)
        for caller in callers[n::8]:
            ticket = caller.join(batcher)
            if chance.random() < 0.5:
                batcher.leave(ticket)
                caller.rows = 0

    with runners(batcher), threads(8, come_and_go):
        pass
    stayed = [caller for caller in callers if caller.rows]
    assert [caller.answer for caller in stayed]
    assert all(len(caller.told) <= 1 for caller in callers)
    told = [caller for caller in callers if caller.told]
    assert batcher.counts().success_count == len(told)
    assert batcher.counts().waiting == 0


@both
def test_who_left_is_not_called_and_not_computed(make: Make) -> None:
    batcher = configured(make, Batching())
    one, gone, other = Caller(1), Caller(2), Caller(3)
    one.join(batcher)
    ticket = gone.join(batcher)
    other.join(batcher)
    batcher.leave(ticket)
    batcher.leave(ticket)
    assert batcher.counts().waiting == 2
    batch = taken(batcher)
    assert marks(batch.inputs()) == [1, 3]
    batcher.leave(ticket)
    batch.answer(run(batch.inputs()))
    assert one.answer.batch_rows == other.answer.batch_rows == 2
    assert not gone.told


@both
def test_over_the_bound_nobody_joins_and_that_is_counted(make: Make) -> None:
    batcher = configured(make, Batching(max_queue_size=3))
    tickets = [Caller(mark).join(batcher) for mark in range(5)]
    assert [ticket > 0 for ticket in tickets] == [True, True, True, False, False]
    assert tickets[3:] == [0, 0]
    assert len(set(tickets[:3])) == 3
    counts = batcher.counts()
    assert (counts.waiting, counts.failures) == (3, {8: (2, 0)})
    batcher.leave(tickets[1])
    assert Caller().join(batcher) > 0
    assert Caller().join(batcher) == 0


@both
def test_the_bound_holds_against_eight_threads(make: Make) -> None:
    batcher = configured(make, Batching(max_batch_size=2, max_queue_size=5))
    refused = [0] * 8

    def press(n: int) -> None:
        for mark in range(200):
            refused[n] += Caller(mark).join(batcher) == 0
            assert batcher.counts().waiting <= 5

    with runners(batcher), threads(8, press):
        pass
    counts = batcher.counts()
    assert counts.failures.get(8, (0, 0)) == (sum(refused), 0)
    assert counts.success_count == 1600 - sum(refused)


@both
@pytest.mark.parametrize("delay_us", [0, 1000])
def test_closing_serves_who_waits_and_then_lets_the_runners_go(make: Make, delay_us: int) -> None:
    batcher = configured(make, Batching(max_batch_size=2, max_queue_delay_microseconds=delay_us))
    callers = joined(batcher, 1, 2, 1)
    batcher.close()
    assert Caller().join(batcher) == -1
    for _ in range(3):
        batch = taken(batcher)
        batch.answer(run(batch.inputs()))
    assert batcher.take() is None
    assert [caller.answer.batch_rows for caller in callers] == [1, 2, 1]
    assert batcher.counts().failures == {}


@both
def test_closing_wakes_every_runner_that_waits(make: Make) -> None:
    batcher = configured(make, Batching(max_queue_delay_microseconds=TEN_MINUTES))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(batcher.take) for _ in range(4)]
        batcher.close()
        assert [one.result(PATIENCE_S) for one in waiting] == [None] * 4


@both
def test_a_deadline_or_timeout_that_passed_is_told_and_not_computed(make: Make) -> None:
    batcher = configured(make, Batching())
    late, slow, fine = Caller(1), Caller(2), Caller(3)
    late.join(batcher, deadline_ns=time.monotonic_ns() - 1)
    slow.join(batcher, timeout_us=1)
    fine.join(batcher, deadline_ns=time.monotonic_ns() + 10**12, timeout_us=10**9)
    spin(2)
    batch = taken(batcher)
    assert marks(batch.inputs()) == [3]
    (told,) = late.told
    assert told[0] == 4
    assert re.fullmatch(r"model 'digits' version 3: waited \d+ ms for its turn", str(told[1]))
    assert slow.told == [(14, "Request timeout expired")]
    failures = batcher.counts().failures
    assert {code: requests for code, (requests, _) in failures.items()} == {4: 1, 14: 1}
    assert all(ns > 0 for _, ns in failures.values())


def until_it_waits(batcher: Batcher) -> None:
    """A runner has told somebody who was late, and looks again, then waits for a batch."""
    late = Caller()
    late.join(batcher, deadline_ns=time.monotonic_ns() - 1)
    assert late.done.wait(PATIENCE_S)
    assert len(late.told) == 1


@both
def test_a_runner_that_waits_for_a_batch_wakes_for_who_is_late_and_for_the_last_of_it(
    make: Make,
) -> None:
    batcher = configured(make, Batching(max_batch_size=2, max_queue_delay_microseconds=TEN_MINUTES))
    with runners(batcher, 1):
        for _ in range(ROUNDS):
            first, last = Caller(1), Caller(2)
            first.join(batcher)
            until_it_waits(batcher)
            last.join(batcher)
            assert last.done.wait(PATIENCE_S)
            assert first.answer.batch_rows == last.answer.batch_rows == 2


@both
def test_new_limits_count_at_once_for_who_waits(make: Make) -> None:
    batcher = configured(make, Batching())
    with runners(batcher, 1):
        for _ in range(ROUNDS):
            batcher.configure(Batching(max_queue_delay_microseconds=TEN_MINUTES), QUIET)
            caller = Caller(1)
            caller.join(batcher)
            until_it_waits(batcher)
            batcher.configure(Batching(), QUIET)
            assert caller.done.wait(PATIENCE_S)


@both
def test_who_leaves_lets_those_behind_it_have_their_turn(make: Make) -> None:
    """The head waits for more of its kind; the batch behind it is full."""
    batcher = make(LOOSE)
    batcher.configure(Batching(max_batch_size=2, max_queue_delay_microseconds=TEN_MINUTES), QUIET)
    batches: queue.Queue[tuple[int, ...]] = queue.Queue()

    def serve(_: int) -> None:
        while (batch := batcher.take()) is not None:
            batches.put(batch.inputs()["x"].shape)

    def join(width: int) -> int:
        return batcher.join({"x": np.zeros((1, width), np.float32)}, 1, Caller())

    with threads(1, serve):
        for _ in range(ROUNDS):
            ticket = join(1)
            join(2)
            join(2)
            late = Caller()
            batcher.join({"x": np.zeros((1, 1), np.float32)}, 1, late, deadline_ns=1)
            assert late.done.wait(PATIENCE_S)
            batcher.leave(ticket)
            assert batches.get(timeout=PATIENCE_S) == (2, 2)
        batcher.close()


@both
def test_a_failed_batch_fails_all_of_it_once(make: Make) -> None:
    batcher = configured(make, Batching(max_batch_size=2))
    callers = joined(batcher, 1, 1, 1)
    taken(batcher).fail(13, "no such thing")
    assert [caller.told for caller in callers] == [[(13, "no such thing")]] * 2 + [[]]
    counts = batcher.counts()
    assert counts.failures.keys() == {13}
    assert counts.failures[13][0] == 2
    assert (counts.success_count, counts.waiting, sum(counts.latency)) == (0, 1, 0)


@both
def test_a_batch_is_split_into_its_requests_and_only_the_bad_one_fails(make: Make) -> None:
    batcher = configured(make, Batching(), Sampling(0, 100, 1000))
    good, bad, other = joined(batcher, 2, 1, 3)
    parts = taken(batcher).split()
    assert [part.rows for part in parts] == [2, 1, 3]
    assert [[(note.start, note.stop) for note in part.notes] for part in parts] == [
        [(0, 2)],
        [(0, 1)],
        [(0, 3)],
    ]
    for part, caller in zip(parts, (good, bad, other), strict=True):
        inputs = part.inputs()
        assert marks(inputs) == [caller.mark] * caller.rows
        if caller is bad:
            part.fail(13, "bad")
        else:
            part.answer(run(inputs))
    assert bad.told == [(13, "bad")]
    assert [good.answer.batch_rows, other.answer.batch_rows] == [2, 3]
    assert batcher.counts().batches.keys() == {2, 3}


@both
def test_nobody_is_held_once_it_is_answered_has_left_or_failed(make: Make) -> None:
    batcher = configured(make, Batching(max_batch_size=1, max_queue_size=3))
    held: list[weakref.ref[Caller]] = []

    def come_and_go() -> None:
        callers = [Caller(mark) for mark in range(4)]
        held.extend(weakref.ref(caller) for caller in callers)
        tickets = [caller.join(batcher) for caller in callers]
        batcher.leave(tickets[1])
        batch = taken(batcher)
        batch.answer(run(batch.inputs()))
        taken(batcher).fail(13, "x")

    for _ in range(20):
        come_and_go()
    gc.collect()
    assert len(held) == 80
    assert [ref() for ref in held if ref() is not None] == []
