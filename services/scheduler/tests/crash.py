"""A scheduler that is killed at any await of its writer, and what must be true of its log then.

The process is this one; what dies is everything it has of Postgres, at once, as it would with
SIGKILL: a transaction that was open is gone, and of one that was being committed nobody knows.
Clients and agents live on: what was not answered they say again, with the same id.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import psycopg

from libs.contracts.envelope import decode
from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    JobRequested,
    Resources,
)
from libs.database import TRANSIENT, Database, connect
from services.scheduler import stimuli
from services.scheduler.domain import Scheduler
from services.scheduler.executor import BusExecutor
from services.scheduler.lease import LEADER
from services.scheduler.ledger import Ledger
from services.scheduler.stimuli import Heartbeat, JobSubmitted, Stimulus, Tick
from services.scheduler.store import MIGRATIONS, Store, digest
from services.scheduler.writer import Writer

NODES = ("a", "b", "c")
KILL = (
    "select pg_terminate_backend(pid) from pg_stat_activity "
    "where datname = current_database() and application_name = 'mortal'"
)
AWAITS_MAX = 60
AT_ONCE_MAX = 6
HOLDS = Resources(cpu_milli=4000, memory_mib=8192, gpu_milli=1000, gpus=4)


class Crash(BaseException):
    """The process is no more."""


class Dying:
    """Awaits, and at one of its suspensions dies."""

    def __init__(self, inner: Awaitable[None], at: int, kill: Callable[[], None]) -> None:
        self.inner = inner
        self.at = at
        self.kill = kill

    def __await__(self) -> Generator[Any, Any, None]:
        inner = self.inner.__await__()
        thrown: BaseException | None = None
        while True:
            try:
                waits_for = inner.throw(thrown) if thrown else next(inner)
            except StopIteration:
                return
            thrown = None
            self.at -= 1
            if self.at == 0:
                self.kill()
                thrown = Crash()
                continue
            try:
                yield waits_for
            except (Exception, asyncio.CancelledError) as error:
                thrown = error


class Clients:
    """Who submits, and the nodes: what they have to say until they were answered."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.number = 0
        self.unanswered: dict[str, Stimulus] = {}
        self.answered: dict[str, Stimulus] = {}
        self.seen = 0
        """Of the outbox."""

    def submit(self) -> None:
        self.number += 1
        gpus = self.chance.choice([0, 0, 1, 2])
        request = JobRequested(
            project="p",
            job=f"j{self.number}",
            kind="train",
            workers=self.chance.choice([1, 1, 2, 3]),
            resources=Resources(1000, 1024, 1000 if gpus else 0, gpus or 1),
            priority=self.chance.randrange(3),
            topology=self.chance.choice(["node", "any"]),
            attempts_max=5,
        )
        self.unanswered[f"submit {request.job}"] = JobSubmitted(request)

    def hear(self, events: list[Event]) -> None:
        """The nodes act on what they are handed: some of it fails, all of it ends."""
        for event in events:
            if isinstance(event, AttemptPlaced):
                about: dict[str, Any] = {"project": event.project, "job": event.job}
                about |= {"attempt": event.attempt, "token": event.token, "node": event.node}
                name = f"{event.token} {event.node}"
                self.unanswered[f"started {name}"] = AttemptStarted(**about)
                fails = self.chance.random() < 0.2
                self.unanswered[f"ended {name}"] = (
                    AttemptFailed(**about, reason="x", retryable=True)
                    if fails
                    else AttemptSucceeded(**about, result={"token": event.token})
                )

    def say(self) -> list[tuple[str, Stimulus]]:
        """Some of it, in any order; now and then what was answered already, and heartbeats."""
        names = list(self.unanswered)
        said = self.chance.sample(names, min(len(names), AT_ONCE_MAX))
        again = self.chance.sample(sorted(self.answered), min(len(self.answered), 1))
        told = {**self.unanswered, **self.answered}
        return [*self.speak(), *((name, told[name]) for name in (*said, *again))]

    def speak(self) -> list[tuple[str, Stimulus]]:
        node = self.chance.choice(NODES)
        if self.chance.random() < 0.1:
            return [("", Tick([node]))]
        return [("", Heartbeat(node, str(self.chance.randrange(2)), ["train"], HOLDS))]

    def note(self, name: str) -> None:
        if name in self.unanswered:
            self.answered[name] = self.unanswered.pop(name)


class World:
    def __init__(self, db: Database, dsn: str, seed: int) -> None:
        self.db = db
        self.dsn = dsn
        self.clients = Clients(seed)
        self.outbox: list[Event] = []
        self.crashes = 0

    async def run(self, crashes: int) -> None:
        """So many deaths; then everything is said that was not answered."""
        with psycopg.connect(self.dsn, autocommit=True) as killer:
            while self.crashes < crashes:
                self.clients.submit()
                await self.live(self.clients.chance.randint(1, AWAITS_MAX), killer)
        while self.clients.unanswered:
            await self.live(0, None)

    async def live(self, dies_at: int, killer: psycopg.Connection[Any] | None) -> None:
        """From taking the lead to the death; 0 for never."""

        def kill() -> None:
            assert killer is not None
            killer.execute(KILL.encode())
            self.crashes += 1

        mortal = f"{self.dsn} application_name=mortal"
        async with connect(mortal, "scheduler", MIGRATIONS) as db:
            writer = Writer(Store(db), BusExecutor())
            with contextlib.suppress(*TRANSIENT):
                async with db.exclusively(LEADER) as writer.connection:
                    dying = Dying(writer.write(), dies_at, kill)
                    living = asyncio.ensure_future(wait_for(dying))
                    while not living.done():
                        await self.speak(writer, living)
                        if killer is None:
                            living.cancel()
                    await asyncio.wait([living])
            if writer.keeping is not None:
                await writer.keeping
        await self.look()

    async def speak(self, writer: Writer, living: asyncio.Future[None]) -> None:
        async def say(name: str, stimulus: Stimulus) -> None:
            with contextlib.suppress(*TRANSIENT):
                await writer.take(stimulus, name)
                self.clients.note(name)

        said = [asyncio.ensure_future(say(*one)) for one in self.clients.say()]
        everything = asyncio.gather(*said)
        both: list[asyncio.Future[Any]] = [everything, living]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        everything.cancel()
        await asyncio.gather(everything, return_exceptions=True)

    async def look(self) -> None:
        """What the nodes hear, from an outbox that nobody empties."""
        async with self.db.transaction() as tx:
            rows = await tx.all(
                "select payload from outbox order by position offset %s", (len(self.outbox),)
            )
        events = [decode(row["payload"])[1] for row in rows]
        self.outbox += events
        self.clients.hear(events)

    async def check(self) -> Scheduler:
        """Nothing lost, nothing doubled, nothing over-committed; returns the state."""
        loaded = await Store(self.db).load()
        loaded.validate()
        scheduler, lines, decided = await read(self.db)
        assert scheduler.snapshot() == loaded.snapshot()
        assert said(decided) == said(self.outbox)
        told = Counter(identity(one) for one in lines if not isinstance(one, Heartbeat | Tick))
        wanted = Counter(identity(one) for one in self.clients.answered.values())
        assert told == wanted, (told - wanted, wanted - told)
        return scheduler


async def wait_for(one: Dying) -> None:
    with contextlib.suppress(Crash):
        await one


async def read(db: Database) -> tuple[Scheduler, list[Stimulus], list[Event]]:
    """The whole log again, with the ledger looking on."""
    scheduler, ledger = Scheduler(), Ledger()
    lines: list[Stimulus] = []
    decided: list[Event] = []
    async with db.transaction() as tx:
        log = await tx.all("select * from log order by sequence")
    for number, line in enumerate(log, start=1):
        assert line["sequence"] == number
        stimulus = stimuli.decode(line["name"], line["stimulus"])
        events = scheduler.handle(stimulus, line["at"])
        assert digest(events) == line["decided"], line
        ledger.enter(stimulus, events, line["at"])
        lines.append(stimulus)
        decided += events
    return scheduler, lines, decided


def said(events: list[Event]) -> tuple[list[Event], list[Event]]:
    """Orders, and the rest; each in order."""
    orders: list[Event]
    orders = [one for one in events if isinstance(one, AttemptPlaced | AttemptStopped)]
    return orders, [one for one in events if not isinstance(one, AttemptPlaced | AttemptStopped)]


def identity(stimulus: Stimulus) -> str:
    return f"{type(stimulus).__name__} {stimulus}"
