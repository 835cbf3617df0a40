"""The one writer: whatever moves the scheduler waits here, and is committed together.

All that waits is handled in memory, in order, and becomes durable in one transaction: the lines
of the log, the ids of the events that took effect, and what is to be said. Only then is anybody
answered, whoever asked and whoever only read. If the transaction fails, for whatever reason and
even if the server committed it and could not say so, nobody is told otherwise than that it
failed, and the state is read again from the log.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import psycopg
from psycopg.rows import DictRow

from libs import telemetry
from libs.contracts.events import AttemptPlaced, AttemptStopped, Event, JobFailed, JobSucceeded
from libs.database import TRANSIENT, Transaction
from libs.doors import Refused
from services.scheduler import meters
from services.scheduler.book import Impossible
from services.scheduler.domain import Scheduler
from services.scheduler.executor import Executor, Order
from services.scheduler.stimuli import Stimulus
from services.scheduler.store import KEEP_EVERY, Line, Overtaken, Store

log = logging.getLogger(__name__)
LEAD_WAIT_S = 15.0
"""Longer than a scheduler that is replaced answers what it was asked."""
WAITING_MAX = 20_000
BATCH_MAX = 512
"""Stimuli handled between two looks at the sockets: some 40 ms of decisions."""
BUSY, GATHER_S = 4, 0.005
"""After a batch of so many, more is waited for: a transaction costs 2.5 ms of ours, however much
is in it."""
SPANS_MAX = 16
"""A span costs 13 to 41 us. The placements of a batch beyond these continue their jobs' traces
without one of their own."""

T = TypeVar("T")


class Standby(ConnectionError):
    """Another scheduler leads, and does not end; this one waits."""


class Overloaded(ConnectionError):
    """More waits to be written than ever will be in time."""


class Defect(RuntimeError):
    """A mistake of ours, met by what was asked, which changed nothing."""


@dataclass
class Asked:
    """One caller: what it wants to happen, and what it wants to know then."""

    wish: Callable[[Scheduler], Iterable[Stimulus]]
    """May raise `Refused`, which changes nothing."""
    answer: Callable[[Scheduler], Any]
    event_id: str
    place: str
    """Where in a trace it was asked."""
    future: asyncio.Future[Any]
    size: int = 1
    """Stimuli it wants at most."""

    def give(self, answer: Any) -> None:
        """To whoever has not gone away."""
        if self.future.done():
            return
        if isinstance(answer, BaseException):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


@dataclass
class Work:
    """What a batch makes, on its way into a transaction."""

    answers: list[Any] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    orders: list[tuple[Order, str]] = field(default_factory=list)
    news: list[tuple[Event, str]] = field(default_factory=list)
    waits: list[tuple[str, float]] = field(default_factory=list)
    """(kind, seconds) of what was placed."""


class Writer:
    def __init__(self, store: Store, executor: Executor) -> None:
        self.store = store
        self.executor = executor
        self.leading = asyncio.Event()
        self.waiting: deque[Asked] = deque()
        self.weight = 0
        """Stimuli that wait."""
        self.arrived = asyncio.Event()
        self.committed: Scheduler | None = None
        self.kept = 0
        """The line of the last checkpoint."""
        self.keeping: asyncio.Task[None] | None = None
        """A checkpoint that is being written."""
        self.resting = False
        """The last checkpoint is made; another on the same base would be of what changed since."""
        self.due_at = math.inf
        """When the scheduler, as far as it is committed, wants to look again."""
        self.committing = asyncio.Lock()
        """Of the connection, which can do one thing at a time."""
        self.connection: psycopg.AsyncConnection[DictRow] | None = None
        """The one that holds the leader's lock: who has lost the lock can commit nothing."""

    async def take(self, stimulus: Stimulus, event_id: str = "") -> None:
        """Handles one stimulus; one with an event's id takes effect once."""
        await self.ask(lambda _: (stimulus,), lambda _: None, event_id)

    async def read(self, answer: Callable[[Scheduler], T]) -> T:
        return await self.ask(lambda _: (), answer)

    async def ask(
        self,
        wish: Callable[[Scheduler], Iterable[Stimulus]],
        answer: Callable[[Scheduler], T],
        event_id: str = "",
        size: int = 1,
    ) -> T:
        """The answer as of right after the wish was handled, once that is durable.

        Not in the lead, it waits: whoever leads is being replaced. Raises `Standby`,
        `Overloaded`, what the wish refuses, `Defect`, and what keeps the batch from a commit.
        """
        if len(self.waiting) >= WAITING_MAX:
            raise Overloaded(f"{WAITING_MAX} requests wait to be written; try again")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.waiting.append(Asked(wish, answer, event_id, telemetry.current(), future, size))
        self.weight += size
        self.arrived.set()
        try:
            async with asyncio.timeout(LEAD_WAIT_S):
                return await future
        except TimeoutError as error:
            raise Standby(f"not written in {LEAD_WAIT_S:.0f} s; does another lead?") from error

    async def write(self) -> None:
        """Settles what waits, until cancelled. Raises `Diverged`."""
        busy = False
        while True:
            await self.arrived.wait()
            if busy and self.weight < BATCH_MAX:
                await asyncio.sleep(GATHER_S)
            batch = self.next()
            busy = len(batch) >= BUSY
            try:
                await self.settle(batch)
            finally:
                for asked in batch:
                    asked.give(Standby("this scheduler leads no more"))

    def next(self) -> list[Asked]:
        """As many as are handled together: one that wants more alone."""
        batch: list[Asked] = []
        size = 0
        while self.waiting and (not batch or size + self.waiting[0].size <= BATCH_MAX):
            batch.append(self.waiting.popleft())
            size += batch[-1].size
        self.weight -= size
        if not self.waiting:
            self.arrived.clear()
        return batch

    async def settle(self, batch: list[Asked]) -> None:
        batch = [asked for asked in batch if not asked.future.done()]
        try:
            scheduler = await self.state()
        except TRANSIENT as error:
            fail(batch, error)
            return
        self.committed = None
        try:
            await self.commit(scheduler, batch)
        except TRANSIENT as error:
            fail(batch, error)
        except Exception as error:
            # A defect goes to whoever met it, as its handler's; the others know nothing of it.
            if len(batch) == 1:
                defect = Defect(f"{type(error).__name__}: {error}")
                defect.__cause__ = error
                fail(batch, defect)
            else:
                for asked in batch:
                    await self.settle([asked])
        else:
            self.committed = scheduler
            self.due_at = scheduler.due_at
            is_due = scheduler.sequence - self.kept >= KEEP_EVERY
            if is_due and self.keeping is None and not self.resting:
                self.keep(scheduler)

    async def state(self) -> Scheduler:
        if self.committed is None:
            if self.keeping is not None:
                await self.keeping
            self.committed = await self.store.load()
            self.kept = self.store.base or 0
            self.due_at = self.committed.due_at
        return self.committed

    def keep(self, scheduler: Scheduler) -> None:
        """A checkpoint of what is committed, written while others decide."""
        cut = self.store.cut(scheduler)
        self.kept = cut.sequence

        async def write() -> None:
            try:
                await self.store.keep(cut)
            except Exception as error:
                # The log has it all; what is not written down now is with the next one.
                log.warning("checkpoint: %s", error, exc_info=not isinstance(error, TRANSIENT))
                scheduler.touched |= cut.touched
                if isinstance(error, Overtaken):
                    self.store.base = None
                    scheduler.touched.update(scheduler.jobs)
            finally:
                self.keeping = None

        self.keeping = asyncio.create_task(write())

    async def stop_keeping(self) -> None:
        """Before somebody else leads, or a checkpoint of ours would come on top of theirs."""
        if self.keeping is not None:
            self.keeping.cancel()
            await asyncio.gather(self.keeping, return_exceptions=True)
            self.keeping = None

    async def commit(self, scheduler: Scheduler, batch: list[Asked]) -> None:
        ids = [asked.event_id for asked in batch if asked.event_id]
        if ids:
            async with self.transaction() as tx:
                work = handle(scheduler, batch, await tx.first_times(ids))
                await self.put(tx, work)
        else:
            work = handle(scheduler, batch, set())
            if work.lines:
                async with self.transaction() as tx:
                    await self.put(tx, work)
        for asked, answer in zip(batch, work.answers, strict=True):
            asked.give(answer)
        meters.count(work.waits)

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with self.committing, self.store.db.transaction(self.connection) as tx:
            yield tx

    async def put(self, tx: Transaction, work: Work) -> None:
        if not work.lines:
            return
        await self.store.append(tx, work.lines)
        if work.orders:
            await self.executor.carry_out(tx, work.orders)
        if work.news:
            await tx.emit_all(work.news)

    async def rest(self) -> None:
        """A checkpoint, so that a newer release has nothing of ours to replay. The last one."""
        self.resting = True
        if self.keeping is not None:
            await self.keeping
        cut, state = await self.read(
            lambda now: (self.store.cut(now), msgspec.json.encode(now.snapshot()))
        )
        await self.store.keep(cut)
        await self.store.rest(cut.sequence, state)


def fail(batch: Sequence[Asked], error: Exception) -> None:
    for asked in batch:
        asked.give(error)


def handle(scheduler: Scheduler, batch: Sequence[Asked], fresh: set[str]) -> Work:
    """Moves the state; `fresh` are the ids of events that had no effect yet."""
    work = Work()
    for asked in batch:
        if asked.event_id and asked.event_id not in fresh:
            work.answers.append(asked.answer(scheduler))
            continue
        fresh.discard(asked.event_id)
        try:
            for stimulus in asked.wish(scheduler):
                move(scheduler, stimulus, asked.place, work)
            work.answers.append(asked.answer(scheduler))
        except Refused as refused:
            work.answers.append(refused)
    return work


def move(scheduler: Scheduler, stimulus: Stimulus, place: str, work: Work) -> None:
    if not scheduler.is_news(stimulus):
        return
    decided = scheduler.handle(stimulus, time.time())
    work.lines.append(Line.of(scheduler, stimulus, decided))
    for event in decided:
        match event:
            case AttemptPlaced():
                job = scheduler.jobs[event.project, event.job]
                work.waits.append((event.kind, max(0.0, scheduler.now - job.waiting_since)))
                work.orders.append((event, placing(scheduler, event, len(work.waits))))
            case AttemptStopped():
                work.orders.append((event, place or place_of(scheduler, event)))
            case JobSucceeded() | JobFailed():
                work.news.append((event, place or place_of(scheduler, event)))
            case _:
                raise Impossible(f"nobody says {event}")


def placing(scheduler: Scheduler, placed: AttemptPlaced, number: int) -> str:
    """The span from when the job began to wait until it is placed, where it was asked for."""
    job = scheduler.jobs[placed.project, placed.job]
    if number > SPANS_MAX:
        return job.traceparent
    with telemetry.span(
        f"schedule {placed.job}",
        parent=job.traceparent,
        start_time_ns=int(job.waiting_since * 1e9),
        attributes={
            "leptonic.job": placed.job,
            "leptonic.node": placed.node,
            "leptonic.attempt": placed.attempt,
            "leptonic.token": placed.token,
        },
    ):
        return telemetry.current()


def place_of(scheduler: Scheduler, event: AttemptStopped | JobSucceeded | JobFailed) -> str:
    """What a heartbeat or a tick brought about is in the job's own trace."""
    job = scheduler.jobs.get((event.project, event.job))
    return job.traceparent if job else ""
