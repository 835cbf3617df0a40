"""The scheduler's log in Postgres: stimuli and snapshots.

The log is the state. A line holds the digest of what was decided on it, so that a replay
that decides otherwise is found out instead of being believed.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import msgspec
import psycopg

from libs.contracts.events import Event
from libs.database import Database, Transaction
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.stimuli import Stimulus, decode

SNAPSHOT_EVERY = 1000
LOG_KEPT = 100_000
"""Lines kept behind the last snapshot, for whoever wants to know what happened."""
APPEND = b"copy log (sequence, at, name, stimulus, decided) from stdin"
LEADER = "leptonic.scheduler"
"""Name of the lock of the one who leads."""

MIGRATIONS = (
    """
    create table log (
        sequence bigint primary key,
        at double precision not null,
        name text not null,
        stimulus bytea not null,
        decided text not null
    );
    create table snapshot (
        sequence bigint primary key,
        state bytea not null
    );
    """,
)


class Overtaken(ConnectionError):
    """Another scheduler wrote the next line of the log; ours has to be read again."""


class Diverged(RuntimeError):
    """A replay decided otherwise than the log says was decided."""


class Line(NamedTuple):
    """Of the log: one stimulus, and the digest of what was decided on it."""

    sequence: int
    at: float
    name: str
    stimulus: bytes
    decided: str

    @classmethod
    def of(cls, scheduler: Scheduler, stimulus: Stimulus, decided: list[Event]) -> Self:
        """What `scheduler` has just handled."""
        name, payload = type(stimulus).__name__, msgspec.json.encode(stimulus)
        return cls(scheduler.sequence, scheduler.now, name, payload, digest(decided))


class Store:
    def __init__(self, db: Database) -> None:
        self.db = db

    async def load(self) -> Scheduler:
        """The last snapshot and what was logged since. Raises `Diverged`."""
        async with self.db.transaction() as tx:
            row = await tx.one("select state from snapshot order by sequence desc limit 1")
            state = msgspec.json.decode(row["state"], type=State) if row else None
            scheduler = restore(state) if state else Scheduler()
            lines = await tx.all(
                "select * from log where sequence > %s order by sequence", (scheduler.sequence,)
            )
        for line in lines:
            decided = scheduler.handle(decode(line["name"], line["stimulus"]), line["at"])
            if scheduler.sequence != line["sequence"] or digest(decided) != line["decided"]:
                problem = f"at line {line['sequence']} ({line['name']}) it decides {decided}"
                raise Diverged(f"the replay differs from the log: {problem}")
        return scheduler

    async def append(self, tx: Transaction, scheduler: Scheduler, lines: Sequence[Line]) -> None:
        """The lines of what `scheduler` has just handled. Raises `Overtaken`."""
        try:
            async with tx.connection.cursor() as cursor, cursor.copy(APPEND) as copy:
                for line in lines:
                    await copy.write_row(line)
        except psycopg.errors.UniqueViolation as error:
            raise Overtaken(f"line {lines[0].sequence} is there already") from error
        if lines[-1].sequence // SNAPSHOT_EVERY > (lines[0].sequence - 1) // SNAPSHOT_EVERY:
            await self.keep(tx, scheduler)

    async def keep(self, tx: Transaction, scheduler: Scheduler) -> None:
        """A snapshot, in place of the last one."""
        state = msgspec.json.encode(scheduler.snapshot())
        await tx.execute("delete from snapshot")
        await tx.execute("insert into snapshot values (%s, %s)", (scheduler.sequence, state))
        await tx.execute("delete from log where sequence <= %s", (scheduler.sequence - LOG_KEPT,))


def digest(decided: list[Event]) -> str:
    """sha256 of events in order, with their types."""
    lines = [(type(event).__name__, event) for event in decided]
    return hashlib.sha256(msgspec.json.encode(lines)).hexdigest()
