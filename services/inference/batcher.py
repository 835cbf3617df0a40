"""A dynamic batcher: while one batch runs the next one gathers.

`Line` decides and knows no clock; `Batcher` drives it on the event loop. An idle batcher runs a
request at once, so alone it waits for nothing (unless `max_queue_delay_microseconds` says so).
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
import numpy as np

from libs.contracts.pipeline import Batching
from services.inference.tensors import Arrays

MICROSECONDS = 1e6
Run = Callable[[Arrays], Awaitable[Arrays]]
Clock = Callable[[], float]
Shapes = list[tuple[str, tuple[int, ...]]]
"""Per input its shape without the batch dimension: what must be equal in a batch."""


class Full(Exception):
    """`max_queue_size` requests wait already."""


class Late(Exception):
    """The request's deadline passed before its turn came."""


class RunFailed(RuntimeError):
    """The graph raised, or answered with another number of rows."""


class Result(NamedTuple):
    outputs: Arrays
    queue_s: float
    run_s: float
    batch_rows: int
    """Of the whole batch the request was part of."""


class Item(msgspec.Struct, eq=False):
    """One request in line."""

    inputs: Arrays
    rows: int
    shapes: Shapes
    arrived_s: float
    deadline_s: float | None = None
    answer: asyncio.Future[Result] | None = None

    @property
    def abandoned(self) -> bool:
        return self.answer is not None and self.answer.done()

    def is_late(self, now_s: float) -> bool:
        return self.deadline_s is not None and self.deadline_s <= now_s


class Turn(NamedTuple):
    """What to do now: answer `late` with an error, then run the batch or wait."""

    batch: list[Item]
    late: list[Item]
    wait_s: float = 0.0


class Line:
    """Requests in order of arrival."""

    def __init__(self, limits: Batching) -> None:
        self.limits = limits
        self.waiting: list[Item] = []

    def join(self, item: Item) -> None:
        """Raises `Full`."""
        if len(self.waiting) >= self.limits.max_queue_size:
            raise Full(f"{len(self.waiting)} requests wait already")
        self.waiting.append(item)

    def take(self, now_s: float) -> Turn:
        """The head of the line is in every batch, so no request starves behind other shapes."""
        there = [item for item in self.waiting if not item.abandoned]
        late = [item for item in there if item.is_late(now_s)]
        self.waiting = [item for item in there if not item.is_late(now_s)]
        batch = self.gather()
        wait_s = self.wait_s(batch, now_s)
        if wait_s > 0:
            return Turn([], late, wait_s)
        taken = set(map(id, batch))
        self.waiting = [item for item in self.waiting if id(item) not in taken]
        return Turn(batch, late)

    def gather(self) -> list[Item]:
        """Those of the head's shapes, in order, until the next would be too many."""
        batch: list[Item] = []
        rows = 0
        for item in self.waiting:
            if batch and item.shapes != batch[0].shapes:
                continue
            if batch and rows + item.rows > self.limits.max_batch_size:
                break
            batch.append(item)
            rows += item.rows
        return batch

    def wait_s(self, batch: list[Item], now_s: float) -> float:
        if not batch or sum(item.rows for item in batch) >= self.limits.max_batch_size:
            return 0.0
        delay_s = self.limits.max_queue_delay_microseconds / MICROSECONDS
        return max(0.0, batch[0].arrived_s + delay_s - now_s)


class Batcher:
    """Feeds one graph; `run` is awaited for one batch at a time."""

    def __init__(self, run: Run, limits: Batching, clock: Clock) -> None:
        self.run = run
        self.clock = clock
        self.line = Line(limits)
        self.joined = asyncio.Event()
        self.pumping: asyncio.Task[None] | None = None

    async def infer(self, inputs: Arrays, rows: int, deadline_s: float | None = None) -> Result:
        """The request's own rows of the outputs. Raises `Full`, `Late`, `RunFailed`."""
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        shapes = sorted((name, array.shape[1:]) for name, array in inputs.items())
        self.line.join(Item(inputs, rows, shapes, self.clock(), deadline_s, answer))
        self.joined.set()
        if self.pumping is None or self.pumping.done():
            self.pumping = asyncio.create_task(self.pump())
        return await answer

    async def pump(self) -> None:
        while self.line.waiting:
            self.joined.clear()
            now_s = self.clock()
            turn = self.line.take(now_s)
            for item in turn.late:
                settle(item, Late(f"waited {now_s - item.arrived_s:.3f} s for its turn"))
            if turn.wait_s > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.joined.wait(), turn.wait_s)
                continue
            try:
                await self.run_batch(turn.batch)
            finally:
                for item in turn.batch:
                    settle(item, RunFailed("the batch ended without an answer"))

    async def run_batch(self, batch: list[Item]) -> None:
        """A batch that fails is run again one by one, so that a request fails for itself only."""
        if not batch:
            return
        started_s = self.clock()
        try:
            outputs = await self.run(gathered(batch))
            parts = scattered(outputs, batch)
        except RunFailed as error:
            if len(batch) == 1:
                settle(batch[0], error)
                return
            for item in batch:
                await self.run_batch([item])
            return
        rows = sum(item.rows for item in batch)
        run_s = self.clock() - started_s
        for item, part in zip(batch, parts, strict=True):
            settle(item, Result(part, started_s - item.arrived_s, run_s, rows))

    async def close(self) -> None:
        """Returns once everybody in line has an answer."""
        if self.pumping is not None:
            await self.pumping


def settle(item: Item, outcome: Result | Exception) -> None:
    """The first outcome counts; a caller who went away wants none."""
    if item.answer is None or item.answer.done():
        return
    if isinstance(outcome, Result):
        item.answer.set_result(outcome)
    else:
        item.answer.set_exception(outcome)


def gathered(batch: list[Item]) -> Arrays:
    if len(batch) == 1:
        return batch[0].inputs
    return {n: np.concatenate([item.inputs[n] for item in batch]) for n in batch[0].inputs}


def scattered(outputs: Arrays, batch: list[Item]) -> list[Arrays]:
    """Each request's rows, in the order of the batch. Raises `RunFailed`."""
    rows = sum(item.rows for item in batch)
    for name, array in outputs.items():
        if array.ndim == 0 or array.shape[0] != rows:
            raise RunFailed(f"output '{name}' has shape {list(array.shape)} for {rows} rows")
    parts: list[Arrays] = []
    start = 0
    for item in batch:
        end = start + item.rows
        parts.append({name: array[start:end] for name, array in outputs.items()})
        start = end
    return parts
