"""Both batchers, a model that marks its answers, and callers that keep what they were told."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from services.inference import fronts
from services.inference.front import Batch, Batcher, Lane, Note, Sampling
from services.inference.python_batcher import PythonBatcher
from services.inference.tensors import Arrays

PATIENCE_S = 60.0
"""Until a thread that hangs is a failure."""
SIGNATURE = Signature(
    [Tensor("x", "INT64", [-1, 2]), Tensor("ok", "BOOL", [-1])],
    [Tensor("y", "INT64", [-1, 2]), Tensor("twice", "FP32", [-1])],
)
QUIET = Sampling(0, 0, 0)
LANE = Lane("digits", "3", SIGNATURE, batched=True, opaque=False)
LOOSE = Lane(
    "loose",
    "1",
    Signature([Tensor("x", "FP32", [-1, -1])], [Tensor("y", "FP32", [-1])]),
    batched=True,
    opaque=False,
)


def python(lane: Lane) -> Batcher:
    return PythonBatcher(lane)


def native(lane: Lane) -> Batcher:
    pytest.importorskip("leptonic_native", reason="the extension is not built here")
    return fronts.make("native", lambda _: None, ()).batcher(lane)


Make = Callable[[Lane], Batcher]
both = pytest.mark.parametrize(
    "make", [pytest.param(python, id="python"), pytest.param(native, id="native")]
)


def configured(make: Make, limits: Batching, sampling: Sampling = QUIET) -> Batcher:
    batcher = make(LANE)
    batcher.configure(limits, sampling)
    return batcher


def asked(mark: int, rows: int = 1) -> Arrays:
    """Rows of which each says who asks and where it lies."""
    x = np.array([[mark, row] for row in range(rows)], np.int64)
    return {"x": x, "ok": np.ones(rows, np.bool_)}


def run(inputs: Arrays) -> Arrays:
    return {"y": inputs["x"] + 1000, "twice": (inputs["x"][:, 0] * 2).astype(np.float32)}


class Told(NamedTuple):
    y: list[list[int]]
    twice: list[float]
    batch_rows: int
    note: Note | None


class Caller:
    """A `front.Waiter` that may be told once."""

    def __init__(self, mark: int = 0, rows: int = 1) -> None:
        self.mark = mark
        self.rows = rows
        self.told: list[Told | tuple[int, str]] = []
        self.done = threading.Event()

    def join(self, batcher: Batcher, **rest: str | int) -> int:
        return batcher.join(asked(self.mark, self.rows), self.rows, self, **rest)  # type: ignore[arg-type]

    def answered(
        self,
        outputs: Arrays,
        start: int,
        stop: int,
        batch_rows: int,
        note: Note | None,
    ) -> None:
        y, twice = outputs["y"][start:stop], outputs["twice"][start:stop]
        self.told.append(Told(y.tolist(), twice.tolist(), batch_rows, note))
        self.done.set()

    def failed(self, code: int, text: str) -> None:
        self.told.append((code, text))
        self.done.set()

    @property
    def answer(self) -> Told:
        """Its own rows, told once."""
        (told,) = self.told
        assert isinstance(told, Told), told
        assert told.y == [[self.mark + 1000, row + 1000] for row in range(self.rows)]
        assert told.twice == [self.mark * 2.0] * self.rows
        return told


def joined(batcher: Batcher, *rows: int) -> list[Caller]:
    """Callers with marks from 1 on."""
    callers = [Caller(index + 1, count) for index, count in enumerate(rows)]
    assert all(caller.join(batcher) > 0 for caller in callers)
    return callers


def spin(us: int) -> None:
    """Until so much has passed on the batcher's clock."""
    until_ns = time.monotonic_ns() + us * 1000
    while time.monotonic_ns() <= until_ns:
        pass


def marks(inputs: Arrays) -> list[int]:
    return [int(mark) for mark in inputs["x"][:, 0]]


def taken(batcher: Batcher) -> Batch:
    batch = batcher.take()
    assert batch is not None
    return batch


@contextmanager
def threads(count: int, work: Callable[[int], None]) -> Iterator[None]:
    """`work(0)`, `work(1)`... beside the block, which they outlive by `PATIENCE_S` at most."""
    failures: list[BaseException] = []

    def noting(index: int) -> None:
        try:
            work(index)
        except AssertionError as error:
            failures.append(error)

    started = [threading.Thread(target=noting, args=(n,), daemon=True) for n in range(count)]
    for thread in started:
        thread.start()
    yield
    for thread in started:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in started)
    assert not failures


@contextmanager
def runners(batcher: Batcher, count: int = 2) -> Iterator[None]:
    """Take and answer beside the block; when it ends the batcher is closed and drained."""

    def serve(_: int) -> None:
        while (batch := batcher.take()) is not None:
            batch.answer(run(batch.inputs()))

    with threads(count, serve):
        try:
            yield
        finally:
            batcher.close()
