"""The scheduler's log in Postgres: stimuli, and checkpoints.

The log is the state; a checkpoint saves reading it from the beginning: the jobs that changed
since the last one, a row each, and all else in one piece. It is written beside the decisions, on
a connection of its own, and only on top of the one it was made on. A line of the log holds the
digest of what was decided on it, so that a replay that decides otherwise is found out instead of
being believed.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import msgspec
import psycopg
from psycopg.rows import DictRow, tuple_row

from libs.contracts.events import Event
from libs.database import Database, Transaction
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.jobs import Job, Key
from services.scheduler.stimuli import Stimulus, decode

KEEP_EVERY = 2_000
"""Lines between two checkpoints: a restart reads so many again, in 0.2 s."""
FOLLOWED_MAX = 1_000
"""Lines that a standby reads at a time."""
LOG_KEPT = 100_000
"""Lines kept behind the last checkpoint, for whoever wants to know what happened."""
DIGESTED = ("project", "job", "attempt", "token", "node", "rank", "gpus")
APPEND = b"copy log (sequence, at, name, stimulus, decided) from stdin (format binary)"
APPENDED = ("int8", "float8", "text", "bytea", "text")
REMEMBER = """
    insert into job (project, job, number, state)
    select * from unnest(%b::text[], %b::text[], %b::bigint[], %b::bytea[])
    on conflict (project, job) do update set number = excluded.number, state = excluded.state
"""
FORGET = """
    delete from job using unnest(%b::text[], %b::text[]) as gone (project, job)
    where (job.project, job.job) = (gone.project, gone.job)
"""
JOBS = """
    select string_agg(state, ','::bytea order by number) from job
    group by number / 256 order by number / 256
"""
SORTED_IN_MEMORY = "set local work_mem = '256MB'"
BASE = """
    select (select sequence from checkpoint) as base, (select max(sequence) from snapshot) as rested
"""
NEXT = "select * from log where sequence > %s order by sequence limit %s"
CHECKPOINT = """
    insert into checkpoint (sequence, state) values (%s, %s)
    on conflict (single) do update set sequence = excluded.sequence, state = excluded.state
"""

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
    """
    create table checkpoint (
        single boolean primary key default true check (single),
        sequence bigint not null,
        state bytea not null
    );
    alter table checkpoint alter column state set storage external;
    create table job (
        project text not null,
        job text not null,
        number bigint not null,
        state bytea not null,
        primary key (project, job)
    );
    """,
    """
    create table lease (
        single boolean primary key default true check (single),
        pid int not null,
        at timestamptz not null
    );
    """,
)


class Overtaken(ConnectionError):
    """Another scheduler wrote the next line of the log; ours has to be read again."""


class Unknown(RuntimeError):
    """What was read before is not what the log goes on from."""


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


@dataclass(frozen=True)
class Cut:
    """What changed between two checkpoints, taken at once and written while others decide."""

    base: int | None
    sequence: int
    state: bytes
    """Without jobs."""
    jobs: list[tuple[str, str, int, bytes]]
    """(project, job, number, state) of those that changed."""
    touched: set[Key]


class Store:
    def __init__(self, db: Database) -> None:
        self.db = db
        self.base: int | None = None
        """Where the checkpoint is that the next one changes; None where it replaces whatever is
        there."""

    async def load(self) -> Scheduler:
        """The last checkpoint and what was logged since. Raises `Diverged`.

        At 100,000 jobs only without the garbage collector (`garbage.paused`): it looks at them
        again and again while they are read, 2.0 s instead of 0.4.
        """
        async with self.db.transaction() as tx:
            await tx.execute("set transaction isolation level repeatable read")
            state, after = await self.last(tx)
            lines = await tx.all(
                "select * from log where sequence > %s order by sequence", (after,)
            )
        # In a thread: who reads for a second renews no lease and answers no question.
        scheduler = await asyncio.to_thread(rebuilt, state, lines)
        if self.base is None:
            scheduler.touched.update(scheduler.jobs)
        return scheduler

    async def follow(self, scheduler: Scheduler, base: int | None) -> int | None:
        """Reads on from where `scheduler` is; the last checkpoint was at `base`. Returns where it
        is now. Raises `Diverged`, and `Unknown` where more is new than the log's next lines."""
        while True:
            async with self.db.transaction() as tx:
                await tx.execute("set transaction isolation level repeatable read")
                row = await tx.one(BASE)
                lines = await tx.all(NEXT, (scheduler.sequence, FOLLOWED_MAX))
            assert row is not None
            now: int | None = row["base"]
            rested: int = row["rested"] or 0
            if (now is None and base is not None) or rested > (now or 0):
                raise Unknown(f"an earlier release came to rest at line {rested}")
            if lines and lines[0]["sequence"] != scheduler.sequence + 1:
                raise Unknown(f"the log goes on at line {lines[0]['sequence']}")
            await asyncio.to_thread(replay_all, scheduler, lines)
            if len(lines) < FOLLOWED_MAX:
                return now

    async def last(self, tx: Transaction) -> tuple[State | None, int]:
        """The last checkpoint, or where an older release came to rest: its state and its line."""
        row = await tx.one("select sequence, state from checkpoint")
        whole = await tx.one(
            "select sequence, state from snapshot where sequence > %s order by sequence limit 1",
            (row["sequence"] if row else -1,),
        )
        self.base = row["sequence"] if row and not whole else None
        if whole:
            return msgspec.json.decode(whole["state"], type=State), whole["sequence"]
        if row:
            state = msgspec.json.decode(row["state"], type=State)
            state.jobs = await self.jobs(tx)
            return state, row["sequence"]
        return None, 0

    async def jobs(self, tx: Transaction) -> list[Job]:
        """In the order of submission. 256 make a row, and each is read while the next is on its
        way; all in one would end at 1 GB, and a job may have 1 MiB."""
        await tx.execute(SORTED_IN_MEMORY)
        decoder, found = msgspec.json.Decoder(list[Job]), list[Job]()
        cursor = tx.connection.cursor(row_factory=tuple_row)
        async for (jobs,) in cursor.stream(JOBS, binary=True):
            found += decoder.decode(b"[" + jobs + b"]")
        return found

    async def append(self, tx: Transaction, lines: Sequence[Line]) -> None:
        """What was handled. Raises `Overtaken`."""
        try:
            async with tx.connection.cursor() as cursor, cursor.copy(APPEND) as copy:
                copy.set_types(APPENDED)
                for line in lines:
                    await copy.write_row(line)
        except psycopg.errors.UniqueViolation as error:
            raise Overtaken(f"line {lines[0].sequence} is there already") from error

    def cut(self, scheduler: Scheduler) -> Cut:
        """Of a state that is committed. Costs 3 us a job that changed, and 1 us a node."""
        touched, scheduler.touched = scheduler.touched, set()
        changed = [scheduler.jobs[key] for key in touched if key in scheduler.jobs]
        rows = [(*job.key, job.number, msgspec.json.encode(job)) for job in changed]
        state = scheduler.snapshot()
        state.jobs = []
        whole = msgspec.json.encode(state)
        return Cut(self.base, scheduler.sequence, whole, rows, touched)

    async def keep(self, cut: Cut) -> None:
        """Raises `Overtaken` when somebody else has kept what this one is no change of."""
        async with self.db.transaction() as tx:
            row = await tx.one("select sequence from checkpoint for update")
            if cut.base is None:
                if row is not None and row["sequence"] > cut.sequence:
                    raise Overtaken(f"there is a checkpoint of line {row['sequence']} already")
                await tx.execute("delete from job")
            elif row is None or row["sequence"] != cut.base:
                raise Overtaken(f"the checkpoint is not the one of line {cut.base}: {row}")
            gone = cut.touched - {(project, job) for project, job, _, _ in cut.jobs}
            await tx.execute(FORGET, columns(sorted(gone), 2))
            await tx.execute(REMEMBER, columns(cut.jobs, 4))
            await tx.execute(CHECKPOINT, (cut.sequence, cut.state))
            await tx.execute("delete from log where sequence <= %s", (cut.sequence - LOG_KEPT,))
        self.base = cut.sequence

    async def rest(self, sequence: int, state: bytes) -> None:
        """The whole state in one piece, for a release that knows of no checkpoints."""
        async with self.db.transaction() as tx:
            await tx.execute("delete from snapshot")
            await tx.execute("insert into snapshot values (%s, %s)", (sequence, state))


def columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[list[Any]]:
    """Rows turned, for `unnest`."""
    return [[row[column] for row in rows] for column in range(width)]


def rebuilt(state: State | None, lines: list[DictRow]) -> Scheduler:
    scheduler = restore(state) if state is not None else Scheduler()
    replay_all(scheduler, lines)
    return scheduler


def replay_all(scheduler: Scheduler, lines: list[DictRow]) -> None:
    for line in lines:
        replay(scheduler, line)


def replay(scheduler: Scheduler, line: DictRow) -> None:
    decided = scheduler.handle(decode(line["name"], line["stimulus"]), line["at"])
    is_same = line["decided"] == digest(decided) or line["decided"] == whole_digest(decided)
    if scheduler.sequence != line["sequence"] or not is_same:
        problem = f"at line {line['sequence']} ({line['name']}) it decides {decided}"
        raise Diverged(f"the replay differs from the log: {problem}")


def digest(decided: list[Event]) -> str:
    """sha256 of what was decided, in order: who is where, under which token. A field that a newer
    release adds to an event is none of it, or that release could not read what this one wrote."""
    lines = [
        (type(event).__name__, [getattr(event, field, None) for field in DIGESTED])
        for event in decided
    ]
    return sha256(lines)


def whole_digest(decided: list[Event]) -> str:
    """As the releases before this one wrote it: of events with all their fields."""
    return sha256([(type(event).__name__, event) for event in decided])


def sha256(lines: list[tuple[str, Any]]) -> str:
    return hashlib.sha256(msgspec.json.encode(lines)).hexdigest()
