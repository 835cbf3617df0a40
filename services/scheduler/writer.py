"""The one writer: whatever moves the scheduler comes through here, one at a time.

The state in memory is only ever what is committed. While a transaction is open the writer holds
no state; if it fails, for whatever reason and even if the server committed it and could not say
so, the next caller reads the state again from the log.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager

from libs import telemetry
from libs.contracts.events import AttemptPlaced, AttemptStopped, Event, JobFailed, JobSucceeded
from libs.database import Transaction
from services.scheduler import meters
from services.scheduler.book import Impossible
from services.scheduler.domain import Scheduler
from services.scheduler.executor import Executor
from services.scheduler.stimuli import Stimulus
from services.scheduler.store import Store

LEAD_WAIT_S = 15.0
"""Longer than a scheduler that is replaced answers what it was asked."""


class Standby(ConnectionError):
    """Another scheduler leads, and does not end; this one waits."""


class Writer:
    def __init__(self, store: Store, executor: Executor) -> None:
        self.store = store
        self.executor = executor
        self.leading = asyncio.Event()
        self.lock = asyncio.Lock()
        self.committed: Scheduler | None = None

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Scheduler]:
        """The committed state, for one reader or writer at a time.

        Not yet in the lead, it waits: whoever leads is being replaced. Raises `Standby`.
        """
        await self.until_leading()
        async with self.lock:
            if not self.leading.is_set():
                raise Standby("this scheduler leads no more")
            if self.committed is None:
                self.committed = await self.store.load()
            yield self.committed

    async def until_leading(self) -> None:
        try:
            async with asyncio.timeout(LEAD_WAIT_S):
                await self.leading.wait()
        except TimeoutError as error:
            raise Standby(f"another scheduler has led for {LEAD_WAIT_S:.0f} s") from error

    async def take(self, stimulus: Stimulus, event_id: str = "") -> None:
        """Handles one stimulus; one with an event's id takes effect once."""
        async with self.turn() as scheduler:
            await self.apply(scheduler, stimulus, event_id)

    async def apply(self, scheduler: Scheduler, stimulus: Stimulus, event_id: str = "") -> None:
        """In one's turn. The caller's `scheduler` is up to date once this returns."""
        if not scheduler.is_news(stimulus):
            return
        self.committed = None
        decided: list[Event] = []
        async with self.store.db.transaction() as tx:
            if not event_id or await tx.first_time(event_id):
                decided = scheduler.handle(stimulus, time.time())
                await self.store.append(tx, scheduler, stimulus, decided)
                for event in decided:
                    await self.say(tx, scheduler, event)
        self.committed = scheduler
        meters.count(scheduler, decided)

    async def say(self, tx: Transaction, scheduler: Scheduler, event: Event) -> None:
        match event:
            case AttemptPlaced():
                with scheduling(scheduler, event):
                    await self.executor.start(tx, event)
            case AttemptStopped():
                with continuing(scheduler, event):
                    await self.executor.stop(tx, event)
            case JobSucceeded() | JobFailed():
                with continuing(scheduler, event):
                    await tx.emit(event)
            case _:
                raise Impossible(f"nobody says {event}")

    async def rest(self) -> None:
        """Snapshots, so that a newer release has nothing of ours to replay."""
        async with self.turn() as scheduler, self.store.db.transaction() as tx:
            await self.store.keep(tx, scheduler)


def scheduling(scheduler: Scheduler, placed: AttemptPlaced) -> AbstractContextManager[object]:
    """The span from when the job began to wait until it is placed, where it was asked for."""
    job = scheduler.jobs[placed.project, placed.job]
    return telemetry.span(
        f"schedule {placed.job}",
        parent=job.traceparent,
        start_time_ns=int(job.waiting_since * 1e9),
        attributes={
            "leptonic.job": placed.job,
            "leptonic.node": placed.node,
            "leptonic.attempt": placed.attempt,
            "leptonic.token": placed.token,
        },
    )


def continuing(
    scheduler: Scheduler, event: AttemptStopped | JobSucceeded | JobFailed
) -> AbstractContextManager[object]:
    """In the trace of what brought it about; what a heartbeat or a tick did is the job's own."""
    if telemetry.current():
        return contextlib.nullcontext()
    job = scheduler.jobs.get((event.project, event.job))
    name = f"{event.entity}.{event.verb} {event.job}"
    return telemetry.span(name, parent=job.traceparent if job else "")
