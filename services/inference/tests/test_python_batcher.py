"""What the Python front needs of its batcher: bytes in, bytes out, told once a batch."""

import re
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from services.inference.front import Lane, Sampling
from services.inference.python_batcher import NEVER, Answered, PythonBatcher, Raw, Reply
from services.inference.tests.callers import (
    LANE,
    LOOSE,
    PATIENCE_S,
    QUIET,
    Caller,
    asked,
    marks,
    run,
    runners,
    spin,
    taken,
    threads,
)
from stack.testing import eventually

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Front:
    """A `Delivery` that keeps what it was given."""

    def __init__(self) -> None:
        self.answers: list[list[Answered]] = []
        self.shapes: list[list[tuple[int, ...]]] = []
        self.failures: list[tuple[list[Reply], int, str]] = []

    def answered(self, answers: Sequence[Answered], shapes: Sequence[tuple[int, ...]]) -> None:
        self.answers.append(list(answers))
        self.shapes.append(list(shapes))

    def failed(self, replies: Sequence[Reply], code: int, text: str) -> None:
        self.failures.append((list(replies), code, text))


def opened(
    limits: Batching, sampling: Sampling = QUIET, lane: Lane = LANE
) -> tuple[PythonBatcher, Front]:
    front = Front()
    batcher = PythonBatcher(lane, front)
    batcher.configure(limits, sampling)
    return batcher, front


def ask(batcher: PythonBatcher, mark: int, rows: int = 1, **rest: str | int) -> int:
    arrays = asked(mark, rows)
    raws = [arrays["x"].tobytes(), arrays["ok"].tobytes()]
    shapes = [list(array.shape) for array in arrays.values()]
    return batcher.join_raw(raws, shapes, rows, f"reply {mark}", **rest)  # type: ignore[arg-type]


def rows_of(answer: Answered) -> tuple[list[list[int]], list[float]]:
    y, twice = answer[-1]
    return np.frombuffer(y, "<i8").reshape(-1, 2).tolist(), np.frombuffer(twice, "<f4").tolist()


def test_a_batch_of_bytes_and_arrays_is_one_and_each_has_its_own_rows() -> None:
    batcher, front = opened(Batching())
    caller = Caller(2, 3)
    ask(batcher, 1, 2)
    caller.join(batcher)
    ask(batcher, 3)
    batch = taken(batcher)
    inputs = batch.inputs()
    assert marks(inputs) == [1, 1, 2, 2, 2, 3]
    batch.answer(run(inputs))
    assert caller.answer.batch_rows == 6
    (answers,) = front.answers
    assert [(reply, rows) for reply, _, _, rows, _ in answers] == [("reply 1", 2), ("reply 3", 1)]
    assert [rows_of(answer) for answer in answers] == [
        ([[1001, 1000], [1001, 1001]], [2.0, 2.0]),
        ([[1003, 1000]], [6.0]),
    ]
    assert front.shapes == [[(2,), ()]]


def test_under_threads_every_reply_comes_back_once_with_its_own_rows() -> None:
    batcher, front = opened(Batching(max_batch_size=8, max_queue_size=4000))
    with (
        runners(batcher),
        threads(8, lambda n: [ask(batcher, m) for m in range(n, 2000, 8)].clear()),
    ):
        pass
    answers = {answer[0]: answer for batch in front.answers for answer in batch}
    assert sum(map(len, front.answers)) == len(answers) == 2000
    for mark in range(2000):
        assert rows_of(answers[f"reply {mark}"]) == ([[mark + 1000, 1000]], [mark * 2.0])
    assert batcher.counts().success_count == 2000


def test_the_front_is_told_once_a_batch_also_of_its_failure() -> None:
    batcher, front = opened(Batching(max_batch_size=3))
    for mark in range(6):
        ask(batcher, mark)
    batch = taken(batcher)
    batch.answer(run(batch.inputs()))
    taken(batcher).fail(13, "broken")
    assert [len(answers) for answers in front.answers] == [3]
    assert front.failures == [(["reply 3", "reply 4", "reply 5"], 13, "broken")]


def test_who_is_late_hears_it_and_who_left_hears_nothing() -> None:
    batcher, front = opened(Batching())
    ask(batcher, 1, deadline_ns=time.monotonic_ns() - 1)
    batcher.leave(ask(batcher, 2))
    ask(batcher, 3, timeout_us=1)
    ask(batcher, 4)
    spin(2)
    assert marks(taken(batcher).inputs()) == [4]
    (_, code, text), timeout = front.failures
    assert code == 4
    assert re.fullmatch(r"model 'digits' version 3: waited \d+ ms for its turn", text)
    assert timeout == (["reply 3"], 14, "Request timeout expired")


def test_an_answer_carries_the_id_and_the_place_that_its_note_has() -> None:
    batcher, front = opened(Batching(), Sampling(0, 100, 1000))
    ask(batcher, 1, id="mine", traceparent=PARENT)
    ask(batcher, 2)
    batch = taken(batcher)
    batch.answer(run(batch.inputs()))
    ((first, second),) = front.answers
    assert first[1] == "mine"
    assert re.fullmatch("[0-9a-f]{32}", second[1])
    assert first[2].startswith(PARENT[:36])
    assert second[2] == ""
    assert [(note.id, note.place) for note in batch.notes] == [first[1:3], second[1:3]]


def test_a_refusal_says_how_many_wait_or_that_the_model_goes() -> None:
    batcher, _ = opened(Batching(max_queue_size=2))
    assert [ask(batcher, mark) > 0 for mark in range(3)] == [True, True, False]
    assert batcher.refusal(0) == (
        8,
        "exceeds maximum queue size of model 'digits' version 3: 2 requests wait already",
    )
    batcher.close()
    assert ask(batcher, 1) == -1
    assert batcher.refusal(-1) == (14, "model 'digits' version 3 is being unloaded")


@pytest.mark.parametrize("raw", [bytes(range(33))[1:], memoryview(bytes(range(33)))[1:]])
def test_a_lone_request_is_read_where_it_lies_unless_that_is_no_place_for_an_array(
    raw: Raw,
) -> None:
    eight = Signature([Tensor("x", "INT64", [-1, 4])], [Tensor("x", "INT64", [-1, 4])])
    batcher, front = opened(Batching(), lane=Lane("m", "1", eight, batched=True, opaque=False))
    batcher.join_raw([raw], [[1, 4]], 1, "only")
    batch = taken(batcher)
    x = batch.inputs()["x"]
    assert x.flags.aligned
    assert np.shares_memory(x, np.frombuffer(raw, np.uint8)) == isinstance(raw, bytes)
    batch.answer({"x": x})
    assert front.answers[0][0][-1] == (bytes(raw),)


def test_bools_are_ones_and_zeros_whatever_the_bytes_were() -> None:
    flags = Signature([Tensor("x", "BOOL", [-1, 3])], [Tensor("x", "BOOL", [-1, 3])])
    batcher, front = opened(Batching(), lane=Lane("m", "1", flags, batched=True, opaque=False))
    for raw in (b"\x00\x01\x02", b"\xff\x00\x00"):
        batcher.join_raw([raw], [[1, 3]], 1, None)
    batch = taken(batcher)
    batch.answer(batch.inputs())
    assert [answer[-1] for answer in front.answers[0]] == [(b"\x00\x01\x01",), (b"\x01\x00\x00",)]


def test_without_rows_the_whole_answer_goes_back_with_its_whole_shape() -> None:
    whole = Signature([Tensor("x", "FP32", [2])], [Tensor("y", "FP32", [-1, 2])])
    batcher, front = opened(Batching(), lane=Lane("m", "1", whole, batched=False, opaque=False))
    for _ in range(2):
        batcher.join_raw([bytes(8)], [[2]], 1, "r")
    batch = taken(batcher)
    assert batch.inputs()["x"].shape == (2,)
    batch.answer({"y": np.ones((3, 2), np.float32)})
    ((_, _, _, rows, raws),) = front.answers[0]
    assert (rows, raws, front.shapes) == (1, (np.ones(6, "<f4").tobytes(),), [[(3, 2)]])


def test_a_batch_is_over_once() -> None:
    batcher, _ = opened(Batching(max_batch_size=1))
    for mark in range(3):
        ask(batcher, mark)
    answered, failed, split = taken(batcher), taken(batcher), taken(batcher)
    answered.answer(run(answered.inputs()))
    failed.fail(13, "x")
    split.split()
    for batch in (answered, failed, split):
        with pytest.raises(AssertionError):
            batch.fail(13, "again")
        with pytest.raises(AssertionError):
            batch.answer(run(batch.inputs()))


async def test_a_batch_that_runs_for_long_keeps_nobody_from_an_idle_runner() -> None:
    """One of two idle runners knows when the first kind is due; the other must be told of the
    second, which is due while the first still runs."""
    batcher, front = opened(Batching(max_queue_delay_microseconds=150_000), lane=LOOSE)
    second = threading.Event()

    def serve(_: int) -> None:
        while (batch := batcher.take()) is not None:
            if batch.inputs()["x"].shape[1] == 1:
                assert second.wait(PATIENCE_S)
            batch.answer({"y": np.zeros(1, np.float32)})
            second.set()

    with threads(2, serve):
        await eventually(lambda: batcher.idle == 2)
        batcher.join_raw([bytes(4)], [[1, 1]], 1, "first")
        await eventually(lambda: batcher.look_ns < NEVER or batcher.line.waiting == 0)
        batcher.join_raw([bytes(8)], [[1, 2]], 1, "second")
        await eventually(lambda: len(front.answers) == 2)
        batcher.close()
    assert [answers[0][0] for answers in front.answers] == ["second", "first"]


def test_shapes_that_never_come_again_are_not_kept() -> None:
    batcher, _ = opened(Batching(), lane=LOOSE)
    for width in range(1, 500):
        ticket = batcher.join_raw([bytes(4 * width)], [[1, width]], 1, None)
        if width % 2:
            batcher.leave(ticket)
        else:
            taken(batcher).answer({"y": np.zeros(1, np.float32)})
    assert [batcher.requests, batcher.line.kinds, batcher.line.rows] == [{}, {}, {}]


async def test_runners_that_have_nothing_to_do_share_what_waits() -> None:
    """Both rest for the batch's delay; then there is none any more."""
    batcher, front = opened(Batching(max_queue_delay_microseconds=60_000_000))
    both, sizes = threading.Barrier(2), []

    def serve(_: int) -> None:
        batch = taken(batcher)
        sizes.append(batch.rows)
        both.wait(PATIENCE_S)
        batch.answer(run(batch.inputs()))

    with threads(2, serve):
        for mark in range(5):
            ask(batcher, mark)
        await eventually(lambda: batcher.idle == 2)
        batcher.configure(Batching(), QUIET)
    assert sorted(sizes) == [2, 3]
    assert sorted(reply for answers in front.answers for reply, *_ in answers) == [
        f"reply {mark}" for mark in range(5)
    ]


def test_however_a_batch_ends_it_runs_no_more() -> None:
    batcher, _ = opened(Batching())
    for end in ("fail", "split", "answer"):
        for mark in range(3):
            ask(batcher, mark)
        batch = batcher.take()
        assert batch is not None
        assert (batcher.line.running, batcher.line.running_requests) == (1, 3)
        parts = batch.split() if end == "split" else [batch]
        assert batcher.line.running == len(parts)
        for part in parts:
            if end == "answer":
                part.answer(run(part.inputs()))
            else:
                part.fail(13, "broken")
        assert (batcher.line.running, batcher.line.running_requests) == (0, 0)
