"""The agent beside an engine: it runs there what the scheduler places on its node.

It has no database. What runs is what the engine says runs, by what each worker carries; beside it
lies a folder with a mark for each attempt that is over (settled), so that an instruction that
comes late, or again, starts nothing. One task looks at the engine over and over and brings it to
what is wanted; events only say what is wanted. Every event that leaves has an id of its attempt's,
so that to say it again until the bus has it, also after a crash, says it once.
"""

import asyncio
import contextlib
import fcntl
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Protocol

import msgspec

from libs.bus import TRACE_HEADER, Bus, loop
from libs.bus.loop import Handlers, Meta
from libs.contracts.envelope import encode
from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Resources,
    subject_of,
)
from services.scheduler.nodes import DEGRADED, HEALTHY
from services.scheduler.stimuli import Heartbeat, Running
from services.scheduler.workers import (
    Seen,
    Spec,
    Unusable,
    Worker,
    failed_of,
    key_of,
    spec_of,
    started_of,
    verdict_of,
    workers_of,
)

log = logging.getLogger(__name__)
BEAT_S = 0.5
LOOK_S = 0.25
AGAIN_S = 0.1
SETTLED_MAX = 10_000
"""Marks kept when an agent starts. An instruction is redelivered within seconds, not years."""


class Offer(msgspec.Struct, frozen=True):
    """What an engine has in all."""

    capacity: Resources
    gpu_model: str = ""


class Engine(Protocol):
    """What runs workers, a share of an attempt at a time: some engines place it as a whole.

    Every call raises `OSError` while the engine is away.
    """

    kind: str

    async def offer(self) -> Offer: ...

    async def workers(self) -> list[Seen]:
        """Of all this node's workers, running or ended, that were not removed."""
        ...

    async def start(self, share: Sequence[Worker], spec: Spec) -> None:
        """All that an attempt has here; those that were started already stay. Raises `Unusable`."""
        ...

    async def stop(self, share: Sequence[Worker]) -> None:
        """SIGTERM, and SIGKILL after the grace of its spec. Asked for until they have ended."""
        ...

    async def remove(self, share: Sequence[Worker]) -> None:
        """Everything the engine keeps of those that have ended."""
        ...


class Settled:
    """Attempts that are over here: a file each, since only the agent's own crash is survived."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "settled"
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = sorted(self.folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        for file in newest[:-SETTLED_MAX]:
            file.unlink()

    def add(self, key: str) -> None:
        (self.folder / key).touch()

    def __contains__(self, key: str) -> bool:
        return (self.folder / key).exists()


class Agent:
    def __init__(self, bus: Bus, engine: Engine, node: str, folder: Path, agent: str = "") -> None:
        """`agent`: its name, where several are the node together."""
        self.bus = bus
        self.engine = engine
        self.node = node
        self.agent = agent
        self.folder = folder
        self.settled = Settled(folder)
        self.incarnation = uuid.uuid4().hex
        self.offer = Offer(Resources(cpu_milli=0, memory_mib=0))
        self.health = HEALTHY
        self.wanted: dict[str, tuple[AttemptPlaced, str]] = {}
        """To be started, with where each comes from."""
        self.seen: list[Seen] = []
        self.told: set[str] = set()
        """Of which attempts this process has said that they started."""
        self.changed = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; what runs then goes on, and is adopted by the next."""
        async with alone(self.folder):
            await self.first_look()
            async with asyncio.TaskGroup() as group:
                group.create_task(self.beat())
                group.create_task(self.keep_looking())
                group.create_task(loop.run(self.bus, self.agent or self.node, HANDLERS, self))

    async def first_look(self) -> None:
        """Before the first heartbeat: what a new incarnation does not list counts as lost."""
        while True:
            try:
                self.offer = await self.engine.offer()
                self.seen = await self.engine.workers()
            except OSError as error:
                log.warning("%s: %s; again in %s s", self.engine.kind, error, BEAT_S)
                await asyncio.sleep(BEAT_S)
            else:
                log.info("%s: adopts %d workers", self.node, len(self.seen))
                return

    async def beat(self) -> None:
        while True:
            await self.bus.broadcast(f"heartbeats.{self.agent or self.node}", self.heartbeat())
            await asyncio.sleep(BEAT_S)

    def heartbeat(self) -> bytes:
        running = {Running(w.project, w.job, w.attempt, w.token) for w in self.known()}
        heartbeat = Heartbeat(
            node=self.node,
            incarnation=self.incarnation,
            kinds=[self.engine.kind],
            capacity=self.offer.capacity,
            running=sorted(running),
            health=self.health,
            gpu_model=self.offer.gpu_model,
            agent=self.agent,
        )
        return msgspec.json.encode(heartbeat)

    def known(self) -> list[Worker]:
        return [one.worker for one in self.seen]

    # --- what the scheduler wants

    def place(self, placed: AttemptPlaced, traceparent: str) -> None:
        if key_of(placed) not in self.settled:
            self.wanted[key_of(placed)] = placed, traceparent
            self.changed.set()

    def stop(self, stopped: AttemptStopped) -> None:
        """Also one whose beginning has not come yet: events may overtake."""
        self.settle(key_of(stopped))
        self.changed.set()

    def settle(self, key: str) -> None:
        self.settled.add(key)
        self.wanted.pop(key, None)
        self.told.discard(key)

    # --- what is

    async def keep_looking(self) -> None:
        while True:
            self.changed.clear()
            try:
                await self.look()
                self.health = HEALTHY
            except OSError as error:
                # What runs may run on: no new work, and nothing is taken away.
                self.health = DEGRADED
                log.warning("%s: %s; again in %s s", self.engine.kind, error, LOOK_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.changed.wait()

    async def look(self) -> None:
        self.offer = await self.engine.offer()
        self.seen = await self.engine.workers()
        for key, (placed, place) in list(self.wanted.items()):
            if key not in self.settled:  # it may have been stopped while another began
                await self.begin(key, placed, place)
        self.seen = sorted(await self.engine.workers(), key=lambda one: one.worker.name)
        for key, share in groupby(self.seen, key=lambda one: one.worker.key):
            await self.tend(key, list(share))

    async def begin(self, key: str, placed: AttemptPlaced, place: str) -> None:
        """Only when no earlier attempt at the job is left here; a later one has overtaken it."""
        same = {w.key: w.token for w in self.known() if is_same_job(w, placed)}
        if any(token > placed.token for token in same.values()):
            self.settle(key)
            return
        earlier = [other for other, token in same.items() if token < placed.token]
        for other in earlier:
            self.settle(other)
        if earlier:
            return
        workers = workers_of(placed, place)
        try:
            await self.engine.start(workers, spec_of(placed))
        except Unusable as error:
            await self.end(key, workers[0], failed_of(workers[0], str(error), error.retryable))
        self.wanted.pop(key, None)

    async def tend(self, key: str, share: list[Seen]) -> None:
        """One attempt's workers here, one step further."""
        first = share[0].worker
        if key in self.settled:
            await self.clear(share)
            return
        if len(share) < first.here:
            if key not in self.wanted:
                lost = failed_of(first, f"{len(share)} of {first.here} workers are left", True)
                await self.end(key, first, lost)
            return
        if key not in self.told:
            await self.say(first, started_of(first))
            self.told.add(key)
        verdict = verdict_of(share)
        if verdict is not None:
            await self.end(key, first, verdict)

    async def clear(self, share: list[Seen]) -> None:
        running = [one.worker for one in share if one.running]
        ended = [one.worker for one in share if not one.running]
        if running:
            await self.engine.stop(running)
        if ended:
            await self.engine.remove(ended)

    async def end(
        self, key: str, worker: Worker, verdict: AttemptSucceeded | AttemptFailed
    ) -> None:
        """Said first and settled then: a crash between the two says it again, under its id."""
        if isinstance(verdict, AttemptFailed):
            log.warning("%s attempt %s: %s", worker.job, worker.attempt, verdict.reason)
        await self.say(worker, verdict)
        self.settle(key)
        self.changed.set()

    async def say(
        self, worker: Worker, event: AttemptStarted | AttemptSucceeded | AttemptFailed
    ) -> None:
        """Raises `PublishFailed`: then it is said again."""
        event_id = f"{worker.node}-{worker.key}-{event.verb}"
        now = datetime.now(UTC).isoformat()
        place = worker.traceparent
        payload = encode(event, id=event_id, service="agent", time=now, traceparent=place)
        headers = {TRACE_HEADER: place} if place else {}
        await self.bus.publish(subject_of(event), payload, id=event_id, headers=headers)


def is_same_job(worker: Worker, placed: AttemptPlaced) -> bool:
    return (worker.project, worker.job) == (placed.project, placed.job)


@contextlib.asynccontextmanager
async def alone(folder: Path) -> AsyncIterator[None]:
    """Waits until no other agent works in the folder; the lock goes with the process."""
    with (folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(AGAIN_S)
        yield


async def on_placed(event: AttemptPlaced, meta: Meta, agent: Agent) -> None:
    if (event.node, event.kind) == (agent.node, agent.engine.kind):
        agent.place(event, meta.traceparent)


async def on_stopped(event: AttemptStopped, meta: Meta, agent: Agent) -> None:
    if event.node == agent.node:
        agent.stop(event)


HANDLERS: Handlers = {AttemptPlaced: on_placed, AttemptStopped: on_stopped}
