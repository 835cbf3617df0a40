"""What only the scheduler that leads does: take events, hear heartbeats, watch the clock.

A second scheduler waits here as standby (`lease.py`) and reads along (`follower.py`). Who loses the
lock, because Postgres restarted, stops and stands in line again.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec
import psycopg
from psycopg.rows import DictRow

from libs.bus import Bus, loop
from libs.database import TRANSIENT
from services.scheduler import garbage, lease, meters, planning
from services.scheduler.domain import Scheduler
from services.scheduler.follower import Follower, following
from services.scheduler.handlers import HANDLERS, Context
from services.scheduler.nodes import Liveness, problem_of
from services.scheduler.scaler import Scaler
from services.scheduler.stimuli import Heartbeat, Tick
from services.scheduler.voices import Voices
from services.scheduler.writer import Defect, Writer

log = logging.getLogger(__name__)
HEARTBEATS = "heartbeats.>"
EAR = "heartbeats._scheduler"
"""What the scheduler says to hear whether it hears."""
TICK_S = 0.25
TELL_S = 2.0
TELL_SHARE = 50
"""Metrics take a fiftieth of the time at most."""
HEARD_MAX = 250
"""Heartbeats looked at without anything else between them: some 2 ms."""
AGAIN_S = 2.0
"""A heartbeat that says again what was said is looked at this often: what it tells can have become
news by what the scheduler did meanwhile. One of a node that was lost is looked at at once."""
AGAIN_LEADS_S = 0.2
HOLD_S = 0.5
"""Between two looks at whether the lock is still ours."""


async def lead(context: Context, bus: Bus) -> None:
    """Leads for as long as the lock is ours, again and again until cancelled."""
    writer = context.writer
    while True:
        try:
            async with (
                following(writer.store) as follower,
                lease.seat(writer.store.db) as connection,
            ):
                log.info("leads")
                try:
                    writer.committed, writer.connection = None, connection
                    writer.leading.set()
                    with garbage.spared():
                        await work(context, bus, connection, follower)
                finally:
                    await writer.stop_keeping()
                    writer.connection = None
                    writer.leading.clear()
                    meters.forget()
        except* TRANSIENT as group:
            log.warning("leads no more: %s", [str(error) for error in group.exceptions])
        await asyncio.sleep(AGAIN_LEADS_S)


async def work(
    context: Context, bus: Bus, lock: psycopg.AsyncConnection[DictRow], follower: Follower
) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(lease.renew(context.writer.store.db, lock))
        with garbage.paused():
            followed = await follower.ended()
            if followed is not None:
                go_on(context.writer, followed)
            nodes = (await context.writer.state()).nodes
        pulse = Pulse(context, bus, Liveness(nodes, time.monotonic()))
        group.create_task(context.writer.write())
        group.create_task(hold(context.writer, lock))
        group.create_task(loop.run(bus, "scheduler", HANDLERS, context, TRANSIENT, together=True))
        group.create_task(pulse.hear())
        group.create_task(pulse.attend())
        group.create_task(pulse.tick())
        group.create_task(pulse.scaler.run())
        group.create_task(tell(context.writer))
        group.create_task(planning.plan(context.writer))


def go_on(writer: Writer, followed: Scheduler) -> None:
    """From what was read along, instead of reading all."""
    writer.committed, writer.kept = followed, writer.store.base or 0
    writer.due_at = followed.due_at


async def tell(writer: Writer) -> None:
    """Metrics, now and then: most changes come in bursts, and 100,000 jobs take 60 ms."""
    while True:
        began = time.monotonic()
        try:
            await writer.read(lambda scheduler: meters.show(scheduler, time.time()))
        except TRANSIENT as error:
            log.warning("metrics: %s", error)
        await asyncio.sleep(max(TELL_S, TELL_SHARE * (time.monotonic() - began)))


async def hold(writer: Writer, lock: psycopg.AsyncConnection[DictRow]) -> None:
    """Raises `psycopg.OperationalError` once the lock's connection is gone."""
    while True:
        async with writer.committing:
            await lock.execute("select 1")
        await asyncio.sleep(HOLD_S)


@dataclass
class Known:
    """What a node, or an agent of one, said last."""

    payload: bytes
    heartbeat: Heartbeat
    again: float = 0.0
    """When the same is worth a look again."""


class Pulse:
    """Heartbeats and ticks on their way to the writer.

    Hearing never waits for Postgres: only the last heartbeat of each node is kept until the
    writer has time for it.
    """

    def __init__(self, context: Context, bus: Bus, liveness: Liveness) -> None:
        self.writer = context.writer
        self.bus = bus
        self.liveness = context.liveness = liveness
        self.scaler = Scaler(context.writer)
        self.voices = Voices(time.monotonic())
        self.last: dict[str, Heartbeat] = {}
        self.known: dict[str, Known] = {}
        """By subject: most say again what they said."""
        self.arrived = asyncio.Event()

    async def hear(self) -> None:
        async for subject, payload in self.bus.listen(HEARTBEATS):
            if subject == EAR:
                now = time.monotonic()
                self.liveness.heard_itself(now)
                self.voices.heard_itself(now)
            else:
                self.note(subject, payload)

    def note(self, subject: str, payload: bytes) -> None:
        now, known = time.monotonic(), self.known.get(subject)
        if known is None or known.payload != payload:
            heartbeat = read(subject, payload)
            if heartbeat is None:
                return
            known = self.known[subject] = Known(payload, heartbeat)
        self.liveness.heard(known.heartbeat.node, now)
        self.voices.heard(known.heartbeat, now)
        if known.heartbeat.loads:
            self.scaler.heard(known.heartbeat)
        if now >= known.again and (whole := self.voices.whole(known.heartbeat, now)):
            known.again = now + AGAIN_S
            self.look_at(whole)

    def look_at(self, whole: Heartbeat) -> None:
        self.last[whole.node] = msgspec.structs.replace(whole, loads=[])
        self.arrived.set()

    async def attend(self) -> None:
        """A heartbeat that could not be taken comes again."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            heard, self.last = list(self.last.values()), {}
            for at in range(0, len(heard), HEARD_MAX):
                await self.take(*heard[at : at + HEARD_MAX])

    async def tick(self) -> None:
        while True:
            await self.bus.broadcast(EAR, b"")
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            for whole in self.voices.bereft(now):
                self.look_at(whole)
            silent = self.liveness.silent(now)
            look = self.writer.due_at <= time.time()
            if silent:
                lost = set(silent)
                self.known = {s: k for s, k in self.known.items() if k.heartbeat.node not in lost}
            if (silent or look) and await self.take(Tick(silent, look)):
                self.liveness.known(silent, now)

    async def take(self, *stimuli: Heartbeat | Tick) -> bool:
        """Whether that is committed. A defect is of one of them: the others are taken alone, and
        who says it again is no reason to end the process again and again."""
        try:
            await self.writer.ask(lambda _: filter(self.is_fresh, stimuli), lambda _: None)
        except TRANSIENT as error:
            log.warning("%s: %s", type(stimuli[0]).__name__, error)
            return False
        except Defect:
            if len(stimuli) == 1:
                log.exception("dropped: %s", stimuli[0])
                return False
            return all([await self.take(one) for one in stimuli])
        return True

    def is_fresh(self, one: Heartbeat | Tick) -> bool:
        """A heartbeat that waited until its node was lost would bring it back for ever."""
        return isinstance(one, Tick) or not self.liveness.is_silent(one.node, time.monotonic())


def read(subject: str, payload: bytes) -> Heartbeat | None:
    """None for what is none, or unusable."""
    try:
        heartbeat = msgspec.json.decode(payload, type=Heartbeat)
    except msgspec.DecodeError as error:
        log.warning("%s: not a heartbeat: %s", subject, error)
        return None
    if problem := problem_of(heartbeat):
        log.warning("%s: unusable heartbeat: %s", subject, problem)
        return None
    return heartbeat
