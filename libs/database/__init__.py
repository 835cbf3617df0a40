"""Postgres for one service: its own schema, migrations under a lock, an inbox and an outbox.

A handler opens one `transaction`, asks `first_time(event id)`, changes its tables and `emit`s
events; all of it commits or none of it. The relay then publishes what was emitted, in order
(unless one has to be tried again), with the event's id, so that an effect and its news can
neither be lost nor doubled.
"""

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from time import monotonic
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import DictRow, dict_row, tuple_row
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from libs import telemetry
from libs.bus import TRACE_HEADER, Bus, Outgoing
from libs.bus.metrics import type_of
from libs.contracts.envelope import encode
from libs.contracts.events import Event, subject_of
from libs.database.metrics import OUTBOX, PUBLISHED

__all__ = ["TRANSIENT", "Contract", "Database", "Jsonb", "Transaction", "connect"]

log = logging.getLogger(__name__)
TRANSIENT: tuple[type[Exception], ...] = (OSError, psycopg.OperationalError, PoolTimeout)
"""What passes by itself: a dependency that is away. Handlers let these fly."""
CONNECTIONS_MAX = 8
WAIT_S = 5.0
RECONNECT_S = 2.0
LOST: dict[str, Any] = {
    "connect_timeout": 5,
    "tcp_user_timeout": 5_000,  # ms
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
}
"""When a server that is silent counts as lost. TCP alone waits for 15 minutes, and after a cut of
15 s sends again 10 s late."""
RELAY_BATCH_MAX = 512
RELAY_POLL_S = 1.0
COUNT_S = 1.0
"""Between two counts of an outbox that is longer than a batch: 100,000 rows take 10 ms."""
HELD_POLL_S = 0.1
INBOX_KEPT_DAYS = 31
EMIT = "insert into outbox (event_id, subject, payload, traceparent) values (%s, %s, %s, %s)"
EMIT_ALL = b"copy outbox (event_id, subject, payload, traceparent) from stdin (format binary)"
EMITTED = ("text", "text", "bytea", "text")
OLDEST = b"""
    select position, event_id, subject, payload, traceparent from outbox
    order by position limit %s for update
"""

FOUNDATION = """
create table if not exists migration (
    number int primary key,
    at timestamptz not null default now()
);
create table if not exists inbox (
    event_id text primary key,
    at timestamptz not null default now()
);
create table if not exists outbox (
    position bigint generated always as identity primary key,
    event_id text not null unique,
    subject text not null,
    payload bytea not null,
    traceparent text not null default ''
);
"""


class Contract(str):
    """A migration that takes away what the release before did not use any more.

    Every other one only adds, so that the release before runs on the schema of this one: while a
    service is replaced both do, and after a rollback the older does. `tests/test_migrations.py`
    reads them all.
    """

    __slots__ = ()


class SchemaTooNew(RuntimeError):
    """The schema was migrated by a release that is more than one ahead of this one."""


class Transaction:
    """One open transaction."""

    def __init__(self, connection: psycopg.AsyncConnection[DictRow], service: str) -> None:
        self.connection = connection
        self.service = service
        self.emitted = 0

    async def execute(
        self, query: str, parameters: Sequence[Any] | dict[str, Any] = ()
    ) -> psycopg.AsyncCursor[DictRow]:
        """Rows come back as dicts."""
        return await self.connection.execute(query.encode(), parameters)

    async def one(
        self, query: str, parameters: Sequence[Any] | dict[str, Any] = ()
    ) -> DictRow | None:
        """The first row, or None."""
        return await (await self.execute(query, parameters)).fetchone()

    async def all(
        self, query: str, parameters: Sequence[Any] | dict[str, Any] = ()
    ) -> list[DictRow]:
        return await (await self.execute(query, parameters)).fetchall()

    async def first_time(self, event_id: str) -> bool:
        """Notes that the event took effect here; False if it already had."""
        cursor = await self.execute(
            "insert into inbox (event_id) values (%s) on conflict do nothing", (event_id,)
        )
        return cursor.rowcount == 1

    async def first_times(self, event_ids: Sequence[str]) -> set[str]:
        """Notes them all; returns those that had not taken effect here."""
        rows = await self.all(
            "insert into inbox (event_id) select unnest(%s::text[]) on conflict do nothing"
            " returning event_id",
            (list(event_ids),),
        )
        return {row["event_id"] for row in rows}

    async def emit(self, event: Event, traceparent: str | None = None) -> None:
        """The event leaves if and only if this transaction commits."""
        place = telemetry.current() if traceparent is None else traceparent
        row = self.outgoing(event, place, datetime.now(UTC).isoformat(), str(uuid.uuid4()))
        await self.execute(EMIT, row)
        self.emitted += 1

    async def emit_all(self, events: Sequence[tuple[Event, str]]) -> None:
        """Events with their traceparents, in order.

        Their ids begin alike, so that they are beside each other in the index.
        """
        time, batch = datetime.now(UTC).isoformat(), str(uuid.uuid4())
        async with self.connection.cursor() as cursor, cursor.copy(EMIT_ALL) as copy:
            copy.set_types(EMITTED)
            for number, (event, place) in enumerate(events):
                await copy.write_row(self.outgoing(event, place, time, f"{batch}-{number}"))
        self.emitted += len(events)

    def outgoing(
        self, event: Event, place: str, time: str, event_id: str
    ) -> tuple[str, str, bytes, str]:
        payload = encode(event, id=event_id, service=self.service, time=time, traceparent=place)
        return event_id, subject_of(event), payload, place


class Database:
    """A service's schema in the shared database."""

    def __init__(self, pool: AsyncConnectionPool[psycopg.AsyncConnection[DictRow]], service: str):
        self.pool = pool
        self.service = service
        self.outgoing = asyncio.Event()
        self.counted_at = -COUNT_S

    @contextlib.asynccontextmanager
    async def transaction(
        self, held: psycopg.AsyncConnection[DictRow] | None = None
    ) -> AsyncIterator[Transaction]:
        """On a connection of the pool, or on one that is `held`: then it commits only for who
        still holds what that connection locks."""
        connecting = contextlib.nullcontext(held) if held else self.pool.connection()
        async with connecting as connection, connection.transaction():
            opened = Transaction(connection, self.service)
            yield opened
        if opened.emitted:
            self.outgoing.set()

    async def ready(self) -> bool:
        """Whether a query is answered now."""
        try:
            async with self.transaction() as tx:
                return await tx.one("select 1 as one") is not None
        except TRANSIENT:
            return False

    @contextlib.asynccontextmanager
    async def exclusively(self, name: str) -> AsyncIterator[psycopg.AsyncConnection[DictRow]]:
        """Waits until nobody holds `name`; it is ours for as long as the connection lasts."""
        query = "select pg_try_advisory_lock(hashtext(%s)) as ours"
        async with self.pool.connection() as connection:
            try:
                while True:
                    row = await (await connection.execute(query, (name,))).fetchone()
                    assert row is not None
                    if row["ours"]:
                        break
                    await asyncio.sleep(HELD_POLL_S)
                yield connection
            finally:
                await connection.close()  # back in the pool it would keep the lock

    async def relay(self, bus: Bus) -> None:
        """Publishes what was emitted, in order, until cancelled."""
        while True:
            try:
                sent = await self.relay_once(bus)
            except TRANSIENT as error:
                log.warning("outbox: %s; again in %s s", error, RELAY_POLL_S)
                await asyncio.sleep(RELAY_POLL_S)
                continue
            if sent < RELAY_BATCH_MAX:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RELAY_POLL_S):
                        await self.outgoing.wait()
                self.outgoing.clear()

    async def relay_once(self, bus: Bus) -> int:
        """One batch; the row locks keep a second replica from overtaking.

        One that has to be tried again is overtaken by those after it.
        """
        async with self.transaction() as tx:
            cursor = tx.connection.cursor(row_factory=tuple_row, binary=True)
            rows = await (await cursor.execute(OLDEST, (RELAY_BATCH_MAX,))).fetchall()
            waiting = await self.waiting(tx, len(rows))
            if waiting is not None:
                OUTBOX.set(waiting)
            await bus.publish_all([outgoing(*row) for row in rows])
            # By name, not `<=`: a smaller position may have been committed since the select.
            sent = [row[0] for row in rows]
            await tx.execute("delete from outbox where position = any(%s)", (sent,))
        if waiting is not None:
            OUTBOX.set(waiting - len(rows))
        for kind, count in Counter(type_of(row[2]) for row in rows).items():
            PUBLISHED.labels(kind).inc(count)
        return len(rows)

    async def waiting(self, tx: Transaction, found: int) -> int | None:
        """How many there are, where that is known or time to count."""
        if found < RELAY_BATCH_MAX:
            return found
        if monotonic() < self.counted_at + COUNT_S:
            return None
        self.counted_at = monotonic()
        row = await tx.one("select count(*) as waiting from outbox")
        assert row is not None
        return int(row["waiting"])


def outgoing(_: int, event_id: str, subject: str, payload: bytes, place: str) -> Outgoing:
    return Outgoing(subject, payload, event_id, {TRACE_HEADER: place} if place else {})


async def migrate(
    connection: psycopg.AsyncConnection[DictRow], service: str, migrations: Sequence[str]
) -> None:
    """Brings the service's schema up to date; concurrent starts wait for one another.

    A schema that is one ahead is as good: the next release is taking over. Raises `SchemaTooNew`.
    """
    name = sql.Identifier(service)
    async with connection.transaction():
        await connection.execute("select pg_advisory_xact_lock(hashtext(%s))", (service,))
        await connection.execute(sql.SQL("create schema if not exists {}").format(name))
        await connection.execute(FOUNDATION.encode())
        cursor = await connection.execute(
            "select coalesce(max(number), 0) as number from migration"
        )
        row = await cursor.fetchone()
        assert row is not None
        if row["number"] > len(migrations) + 1:
            raise SchemaTooNew(
                f"the schema {service} is at migration {row['number']}, this release knows "
                f"{len(migrations)}: at most one ahead is safe; start a newer release"
            )
        for number, statements in enumerate(migrations, start=1):
            if number > row["number"]:
                await connection.execute(statements.encode())
                await connection.execute("insert into migration (number) values (%s)", (number,))
        await connection.execute(
            "delete from inbox where at < now() - make_interval(days => %s)", (INBOX_KEPT_DAYS,)
        )


@contextlib.asynccontextmanager
async def connect(dsn: str, service: str, migrations: Sequence[str]) -> AsyncIterator[Database]:
    """Migrates, then pools connections for as long as the block lasts.

    Raises `psycopg.OperationalError` when the server cannot be reached.
    """
    options = f"-c search_path={service}"
    async with await psycopg.AsyncConnection.connect(
        dsn, autocommit=True, row_factory=dict_row, options=options, **LOST
    ) as connection:
        await migrate(connection, service, migrations)
    pool: AsyncConnectionPool[psycopg.AsyncConnection[DictRow]] = AsyncConnectionPool(
        dsn,
        min_size=1,
        max_size=CONNECTIONS_MAX,
        timeout=WAIT_S,
        check=AsyncConnectionPool.check_connection,
        # After that the next caller tries at once. The default of 300 s doubles its pauses: a
        # server that was away for a minute was looked for a minute later.
        reconnect_timeout=RECONNECT_S,
        kwargs={"autocommit": True, "row_factory": dict_row, "options": options, **LOST},
        open=False,
    )
    async with pool:
        yield Database(pool, service)
