"""The train agent: runs the attempts placed on this node and tells the scheduler it lives."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Any, Protocol

import msgspec

from libs import telemetry
from libs.bus import Bus
from libs.bus.loop import backoff_s
from libs.contracts.artifacts import TrainResult
from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    JobProgressed,
    Resources,
)
from libs.database import TRANSIENT, Database, Transaction
from services.trainer import meters, store
from services.trainer.champion import Away, Registry
from services.trainer.domain import (
    KIND,
    Assignment,
    Champion,
    Lost,
    Outcome,
    Progress,
    Unusable,
    assignment_of,
)

log = logging.getLogger(__name__)
BEAT_S = 0.5
"""A node that misses five in a row is lost."""
CHAMPION_TRIES_MAX = 12
"""About a minute and a half with `backoff_s`; then the attempt is tried again as a whole."""


class Run(Protocol):
    """One attempt on its workers; both raise `Unusable` or `Lost`."""

    def fit(self) -> AsyncGenerator[Progress]: ...
    async def finish(self, outcome: Outcome) -> TrainResult: ...


class Engine(Protocol):
    """What trains: `engine.Engine`, once Ray is warm."""

    def run(self, assignment: Assignment) -> AbstractAsyncContextManager[Run]: ...
    def joined(self) -> Resources:
        """What other machines lend it now."""
        ...


Key = tuple[str, str, int]
"""Project, job, attempt."""


class Agent:
    def __init__(
        self,
        db: Database,
        bus: Bus,
        registry: Registry,
        node: str,
        incarnation: str,
        capacity: Resources,
        agent: str = "",
    ) -> None:
        """`agent`: its own name, where others are the node with it."""
        self.db = db
        self.bus = bus
        self.registry = registry
        self.node = node
        self.incarnation = incarnation
        self.capacity = capacity
        self.agent = agent
        self.engine: asyncio.Future[Engine] = asyncio.get_running_loop().create_future()
        self.placed: dict[Key, AttemptPlaced] = {}
        self.tasks: dict[Key, asyncio.Task[None]] = {}
        self.group = asyncio.TaskGroup()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Beats and runs attempts until the block ends; what runs then is left to be resumed."""
        async with self.db.transaction() as tx:
            await store.lose_all(tx, self.node)
        async with self.group:
            beating = self.group.create_task(self.beat())
            try:
                yield
            finally:
                beating.cancel()
                for task in self.tasks.values():
                    task.cancel()

    async def beat(self) -> None:
        while True:
            meters.RAY_UP.set(self.engine.done())
            await self.bus.broadcast(f"heartbeats.{self.agent or self.node}", self.heartbeat())
            await asyncio.sleep(BEAT_S)

    def heartbeat(self) -> bytes:
        running = [
            {"project": p.project, "job": p.job, "attempt": p.attempt, "token": p.token}
            for p in self.placed.values()
        ]
        return msgspec.json.encode(
            {
                "node": self.node,
                "incarnation": self.incarnation,
                "kinds": [KIND],
                "capacity": self.offered(),
                "running": running,
                "health": "Healthy" if self.engine.done() else "Initializing",
                "agent": self.agent,
            }
        )

    def offered(self) -> Resources:
        """This machine, and those that have joined its Ray."""
        if not self.engine.done():
            return self.capacity
        joined = self.engine.result().joined()
        return Resources(
            self.capacity.cpu_milli + joined.cpu_milli,
            self.capacity.memory_mib + joined.memory_mib,
            self.capacity.gpu_milli,
        )

    async def is_warm(self) -> bool:
        return self.engine.done()

    def is_for_us(self, placed: AttemptPlaced) -> bool:
        return placed.node == self.node and placed.kind == KIND

    def start(self, placed: AttemptPlaced, place: str) -> None:
        """In the background. An older attempt at the same job has been overtaken: it ends."""
        for key in [k for k in self.tasks if k[:2] == (placed.project, placed.job)]:
            self.tasks[key].cancel()
        key = (placed.project, placed.job, placed.attempt)
        self.placed[key] = placed
        self.tasks[key] = self.group.create_task(self.attempt(placed, place))
        self.tasks[key].add_done_callback(lambda _: self.forget(key))
        meters.RUNNING.set(len(self.placed))

    def stop(self, stopped: AttemptStopped) -> None:
        task = self.tasks.get((stopped.project, stopped.job, stopped.attempt))
        if task is not None:
            task.cancel()

    def forget(self, key: Key) -> None:
        del self.tasks[key]
        del self.placed[key]
        meters.RUNNING.set(len(self.placed))

    async def attempt(self, placed: AttemptPlaced, place: str) -> None:
        with telemetry.span("train", parent=place) as span:
            span.set_attributes({"leptonic.job": placed.job, "leptonic.attempt": placed.attempt})
            try:
                assignment = assignment_of(placed)
                async with (await asyncio.shield(self.engine)).run(assignment) as run:
                    result = await self.train(placed, assignment, run)
            except (Unusable, Lost) as error:
                telemetry.mark_failed(span, str(error))
                log.warning("%s attempt %s: %s", placed.job, placed.attempt, error)
                await self.fail(placed, str(error), retryable=isinstance(error, Lost))
            else:
                await self.succeed(placed, result)

    async def train(self, placed: AttemptPlaced, assignment: Assignment, run: Run) -> TrainResult:
        began, resumed = monotonic(), 0
        training = meters.Training(assignment)
        async for progress in run.fit():
            training.note(progress)
            if not progress.metrics:
                resumed = progress.epoch
                continue
            await self.progress(placed, progress)
        champion = await self.champion(assignment)
        seconds = round(monotonic() - began, 3)
        return await run.finish(Outcome(champion, seconds, resumed))

    async def champion(self, assignment: Assignment) -> Champion | None:
        for tries in range(1, CHAMPION_TRIES_MAX + 1):
            try:
                return await self.registry.champion(assignment.project, assignment.spec.model)
            except Away as error:
                log.warning("%s; again in %s s", error, backoff_s(tries))
                await asyncio.sleep(backoff_s(tries))
        raise Lost(f"the registry did not answer {CHAMPION_TRIES_MAX} times")

    async def progress(self, placed: AttemptPlaced, progress: Progress) -> None:
        event = JobProgressed(
            project=placed.project,
            job=placed.job,
            attempt=placed.attempt,
            epoch=progress.epoch,
            epochs=progress.epochs,
            metrics=progress.metrics,
        )

        async def note(tx: Transaction) -> None:
            if await store.put_epoch(tx, placed, progress):
                await tx.emit(event)

        await self.change(note)

    async def succeed(self, placed: AttemptPlaced, result: TrainResult) -> None:
        builtins = msgspec.to_builtins(result)
        event = AttemptSucceeded(
            project=placed.project,
            job=placed.job,
            attempt=placed.attempt,
            token=placed.token,
            node=placed.node,
            result=builtins,
        )
        await self.settle(placed, "succeeded", "", builtins, event)

    async def fail(self, placed: AttemptPlaced, reason: str, retryable: bool) -> None:
        event = AttemptFailed(
            project=placed.project,
            job=placed.job,
            attempt=placed.attempt,
            token=placed.token,
            node=placed.node,
            reason=reason,
            retryable=retryable,
        )
        await self.settle(placed, "failed", reason, {}, event)

    async def settle(
        self, placed: AttemptPlaced, state: str, reason: str, result: dict[str, Any], event: Event
    ) -> None:
        """Ends the attempt and says so, once: not if it has been stopped meanwhile."""

        async def end(tx: Transaction) -> None:
            if await store.settle(tx, placed, state, reason, result):
                await tx.emit(event)

        await self.change(end)
        meters.ATTEMPTS.labels(state).inc()

    async def change(self, work: Callable[[Transaction], Awaitable[None]]) -> None:
        """In one transaction, as soon as Postgres answers."""
        tries = 0
        while True:
            try:
                async with self.db.transaction() as tx:
                    await work(tx)
            except TRANSIENT as error:
                tries += 1
                log.warning("postgres: %s; again in %s s", error, backoff_s(tries))
                await asyncio.sleep(backoff_s(tries))
            else:
                return
