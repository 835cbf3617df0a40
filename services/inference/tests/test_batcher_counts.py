"""Counts and notes say exactly what happened to every request; Python's and C++'s batcher alike."""

import re
import time

from libs.contracts.pipeline import Batching
from services.inference import router
from services.inference.front import LATENCY_BOUNDS_NS, Sampling
from services.inference.tests.callers import (
    Caller,
    Make,
    both,
    configured,
    joined,
    run,
    runners,
    spin,
    taken,
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


@both
def test_the_counts_are_exact(make: Make) -> None:
    batcher = configured(make, Batching(max_batch_size=4))
    before_ms = time.time_ns() // 1_000_000
    assert batcher.counts().last_inference_ms == 0
    joined(batcher, 1, 3, 2, 2, 4)
    for _ in range(3):
        batch = taken(batcher)
        inputs = batch.inputs()
        spin(300)
        batch.answer(run(inputs))
    counts = batcher.counts()
    assert (counts.success_count, counts.inference_count, counts.waiting) == (5, 12, 0)
    assert counts.batches.keys() == {4}
    runs, input_ns, infer_ns, output_ns = counts.batches[4]
    assert runs == 3
    assert infer_ns >= 3 * 300_000
    assert (input_ns > 0, output_ns > 0) == (True, True)
    assert counts.compute_infer_ns <= 2 * infer_ns
    assert counts.success_ns > counts.queue_ns + counts.compute_infer_ns
    assert len(counts.latency) == len(counts.queue) == len(LATENCY_BOUNDS_NS) + 1
    assert sum(counts.latency) == sum(counts.queue) == 5
    assert counts.latency[0] == counts.latency[1] == 0
    assert before_ms <= counts.last_inference_ms <= time.time_ns() // 1_000_000


@both
def test_each_request_of_a_batch_counts_the_batchs_whole_time(make: Make) -> None:
    batcher = configured(make, Batching())
    joined(batcher, 1, 3, 2)
    batch = taken(batcher)
    batch.answer(run(batch.inputs()))
    counts = batcher.counts()
    _, input_ns, infer_ns, output_ns = counts.batches[6]
    times = (counts.compute_input_ns, counts.compute_infer_ns, counts.compute_output_ns)
    assert times == (3 * input_ns, 3 * infer_ns, 3 * output_ns)


@both
def test_who_was_told_finds_itself_in_the_counts(make: Make) -> None:
    batcher = configured(make, Batching())
    seen: list[int] = []

    class Curious(Caller):
        def answered(self, *told: object) -> None:
            seen.append(batcher.counts().success_count)

        def failed(self, code: int, text: str) -> None:
            seen.append(batcher.counts().failures[code][0])

    Curious().join(batcher)
    batch = taken(batcher)
    batch.answer(run(batch.inputs()))
    Curious().join(batcher)
    taken(batcher).fail(13, "x")
    assert seen == [1, 1]


@both
def test_exactly_the_percentage_is_noted_and_by_arrival(make: Make) -> None:
    batcher = configured(make, Batching(max_batch_size=8), Sampling(0, 23, 1000))
    callers = joined(batcher, *[1] * 200)
    with runners(batcher, 1):
        pass
    logged = [caller.answer.note is not None for caller in callers]
    assert logged == [router.sampled(23, n) for n in range(1, 201)]
    assert all(c.answer.note.logged for c in callers if c.answer.note)


@both
def test_no_more_is_noted_than_the_rates_allow(make: Make) -> None:
    """A burst empties the buckets; more comes only with time."""
    batcher = configured(make, Batching(max_queue_size=1000), Sampling(5, 100, 7))
    began_ns = time.monotonic_ns()
    callers = joined(batcher, *[1] * 500)
    with runners(batcher, 1):
        pass
    notes = [caller.answer.note for caller in callers]
    logged, traced = (
        sum(bool(n and n.logged) for n in notes),
        sum(bool(n and n.place) for n in notes),
    )
    passed_s = (time.monotonic_ns() - began_ns) / 1e9
    assert 7 <= logged <= 7 * (1 + passed_s) + 1
    assert 5 <= traced <= 5 * (1 + passed_s) + 1


@both
def test_a_note_says_which_rows_are_whose_and_where_their_span_is(make: Make) -> None:
    batcher = configured(make, Batching())
    before_ns = time.monotonic_ns()
    traced, plain, named = Caller(1, 2), Caller(2, 3), Caller(3, 1)
    traced.join(batcher, traceparent=PARENT + "01")
    plain.join(batcher, traceparent=PARENT + "00", id="mine")
    named.join(batcher, traceparent=PARENT + "01", id="its own")
    batch = taken(batcher)
    first, last = batch.notes
    assert [(n.start, n.stop, n.parent, n.logged) for n in (first, last)] == [
        (0, 2, PARENT + "01", False),
        (5, 6, PARENT + "01", False),
    ]
    assert re.fullmatch("[0-9a-f]{32}", first.id)
    assert last.id == "its own"
    for note in (first, last):
        assert re.fullmatch(PARENT[:36] + "[0-9a-f]{16}-01", note.place)
        assert before_ns <= note.arrived_ns <= note.taken_ns <= time.monotonic_ns()
    assert first.place != last.place
    batch.answer(run(batch.inputs()))
    assert traced.answer.note == first
    assert named.answer.note == last
    assert plain.answer.note is None


@both
def test_a_sampled_request_without_a_caller_starts_its_own_trace(make: Make) -> None:
    batcher = configured(make, Batching(), Sampling(100, 0, 0))
    joined(batcher, 1, 1)
    places = {note.place for note in taken(batcher).notes}
    assert len({place[3:35] for place in places}) == 2
    assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", place) for place in places)
