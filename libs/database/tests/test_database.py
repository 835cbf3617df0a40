"""Effect and news commit together, take effect once, and leave in order, on a real Postgres."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio
from psycopg_pool.base import AttemptWithBackoff

from libs import database
from libs.bus import EVENTS, Outgoing, PublishFailed
from libs.bus.jetstream import JetStreamBus
from libs.bus.memory import MemoryBus, Misbehaviour
from libs.contracts.envelope import decode
from libs.contracts.events import JobCancelled
from libs.database import TRANSIENT, Database, SchemaTooNew, Transaction, connect
from stack import ports, servers
from stack.testing import Server, eventually

TABLE = "create table note (text text primary key)"


@pytest_asyncio.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    async with connect(postgres_dsn, "notes", [TABLE]) as opened:
        yield opened


def cancelled(number: int) -> JobCancelled:
    return JobCancelled(project="default", job=f"job-{number}")


async def note(tx: Transaction, text: str) -> None:
    await tx.execute("insert into note (text) values (%s)", (text,))


async def notes(db: Database) -> list[str]:
    async with db.transaction() as tx:
        return [row["text"] for row in await tx.all("select text from note order by text")]


async def outbox(db: Database) -> int:
    async with db.transaction() as tx:
        row = await tx.one("select count(*) as rows from outbox")
    assert row is not None
    return int(row["rows"])


async def emit(db: Database, *numbers: int) -> None:
    for number in numbers:
        async with db.transaction() as tx:
            await tx.emit(cancelled(number))


async def jobs(bus: JetStreamBus | MemoryBus) -> list[str]:
    found = await bus.read(EVENTS, "events.>", 0, 2000)
    events = [decode(one.payload)[1] for one in found]
    return [event.job for event in events if isinstance(event, JobCancelled)]


async def test_concurrent_starts_migrate_once(postgres_dsn: str) -> None:
    migrations = [TABLE, "insert into note (text) values ('from the second migration')"]

    async def start() -> list[str]:
        async with connect(postgres_dsn, "notes", migrations) as db:
            return await notes(db)

    found = await asyncio.gather(*(start() for _ in range(5)))
    assert found == [["from the second migration"]] * 5


async def test_a_later_start_runs_only_what_is_new(postgres_dsn: str) -> None:
    first = "insert into note (text) values ('first')"
    async with connect(postgres_dsn, "notes", [TABLE, first]) as db:
        assert await notes(db) == ["first"]
    second = "insert into note (text) values ('second')"
    async with connect(postgres_dsn, "notes", [TABLE, first, second]) as db:
        assert await notes(db) == ["first", "second"]


async def test_the_release_before_runs_on_the_next_schema_and_no_older_one(
    postgres_dsn: str,
) -> None:
    added = "alter table note add column at timestamptz not null default now()"
    async with connect(postgres_dsn, "notes", [TABLE, added, "create table other (id int)"]):
        pass
    async with connect(postgres_dsn, "notes", [TABLE, added]) as db:
        async with db.transaction() as tx:
            await note(tx, "by the release before")
        assert await notes(db) == ["by the release before"]
    with pytest.raises(SchemaTooNew, match="at migration 3, this release knows 1:"):
        async with connect(postgres_dsn, "notes", [TABLE]):
            pass


async def test_two_hold_a_name_one_after_the_other(db: Database) -> None:
    held = asyncio.Event()

    async def hold() -> None:
        async with db.exclusively("name"):
            held.set()

    async with db.exclusively("name"), db.exclusively("another name"):
        waiting = asyncio.create_task(hold())
        await emit(db, 1)
        assert not held.is_set()
    async with asyncio.timeout(10):
        await waiting


async def test_a_migration_that_fails_leaves_nothing(postgres_dsn: str) -> None:
    with pytest.raises(psycopg.errors.SyntaxError):
        async with connect(postgres_dsn, "notes", [TABLE, "creat table x ()"]):
            pass
    async with connect(postgres_dsn, "notes", [TABLE]) as db:
        assert await notes(db) == []


async def test_services_do_not_see_each_others_tables(postgres_dsn: str) -> None:
    async with (
        connect(postgres_dsn, "notes", [TABLE]) as one,
        connect(postgres_dsn, "others", [TABLE]) as other,
    ):
        async with one.transaction() as tx:
            await note(tx, "mine")
            assert await tx.first_time("event")
        assert await notes(other) == []
        async with other.transaction() as tx:
            assert await tx.first_time("event")


async def test_an_event_takes_effect_once(db: Database) -> None:
    async def take() -> bool:
        async with db.transaction() as tx:
            first = await tx.first_time("e1")
            if first:
                await note(tx, "effect")
            return first

    assert sorted(await asyncio.gather(*(take() for _ in range(6)))) == [False] * 5 + [True]
    assert await notes(db) == ["effect"]


async def test_what_fails_leaves_neither_effect_nor_news_nor_memory(db: Database) -> None:
    async def fail() -> None:
        async with db.transaction() as tx:
            assert await tx.first_time("e1")
            await note(tx, "effect")
            await tx.emit(cancelled(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert (await notes(db), await outbox(db)) == ([], 0)
    async with db.transaction() as tx:
        assert await tx.first_time("e1")


async def test_news_leaves_in_order_with_its_trace(db: Database, bus: JetStreamBus) -> None:
    place = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    async with db.transaction() as tx:
        await tx.emit(cancelled(1), traceparent=place)
        await tx.emit(cancelled(2))
    assert await db.relay_once(bus) == 2
    assert await db.relay_once(bus) == 0
    first, _ = await bus.read(EVENTS, "events.>", 0, 10)
    assert await jobs(bus) == ["job-1", "job-2"]
    envelope, _ = decode(first.payload)
    assert (first.headers["traceparent"], envelope.traceparent) == (place, place)
    assert (envelope.source, first.headers["Nats-Msg-Id"]) == ("/leptonic/notes", envelope.id)


async def test_a_batch_takes_effect_once_and_its_news_leaves_in_order(
    db: Database, bus: JetStreamBus
) -> None:
    place = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    async with db.transaction() as tx:
        assert await tx.first_times(["a", "b", "a"]) == {"a", "b"}
        await tx.emit(cancelled(0))
        await tx.emit_all([(cancelled(number), place) for number in range(1, 600)])
    async with db.transaction() as tx:
        assert await tx.first_times(["b", "c"]) == {"c"}
        assert not await tx.first_time("a")
    assert [await db.relay_once(bus) for _ in range(3)] == [512, 88, 0]
    assert await jobs(bus) == [f"job-{number}" for number in range(600)]
    *_, last = await bus.read(EVENTS, "events.>", 0, 2000)
    assert last.headers["traceparent"] == place


async def test_two_relays_publish_once_and_in_order(
    postgres_dsn: str, db: Database, bus: JetStreamBus
) -> None:
    numbers = range(1200)
    async with db.transaction() as tx:
        for number in numbers:
            await tx.emit(cancelled(number))
    async with connect(postgres_dsn, "notes", [TABLE]) as second:
        relays = [asyncio.create_task(one.relay(bus)) for one in (db, second)]

        async def empty() -> bool:
            return await outbox(db) == 0

        await eventually(empty, timeout_s=30)
        for relay in relays:
            relay.cancel()
        await asyncio.gather(*relays, return_exceptions=True)
    assert await jobs(bus) == [f"job-{number}" for number in numbers]


async def test_a_publish_whose_ack_is_lost_is_stored_once(db: Database) -> None:
    bus = MemoryBus(Misbehaviour(seed=3, publish_failure=0.5))
    await emit(db, *range(3))
    for _ in range(1000):
        with contextlib.suppress(PublishFailed):
            if await db.relay_once(bus) == 0:
                break
    assert await outbox(db) == 0
    assert await jobs(bus) == ["job-0", "job-1", "job-2"]


class Dies(MemoryBus):
    """Takes everything, and that is the last its publisher hears."""

    async def publish_all(self, messages: Sequence[Outgoing]) -> None:
        await super().publish_all(messages)
        raise asyncio.CancelledError


async def test_a_relay_that_dies_before_it_clears_publishes_again_under_the_same_ids(
    db: Database,
) -> None:
    bus = Dies()
    async with db.transaction() as tx:
        await tx.emit_all([(cancelled(number), "") for number in range(3)])
    with pytest.raises(asyncio.CancelledError):
        await db.relay_once(bus)
    assert await outbox(db) == 3
    again = MemoryBus()
    again.streams, again.seen = bus.streams, bus.seen
    assert await db.relay_once(again) == 3
    assert await jobs(again) == ["job-0", "job-1", "job-2"]


class Meanwhile(MemoryBus):
    """Something commits between the relay's look at the outbox and its clearing."""

    def __init__(self, slower: asyncio.Event, done: asyncio.Event) -> None:
        super().__init__()
        self.slower = slower
        self.done = done

    async def publish_all(self, messages: Sequence[Outgoing]) -> None:
        self.slower.set()
        await self.done.wait()
        await super().publish_all(messages)


async def test_what_was_emitted_first_and_committed_last_is_not_lost(db: Database) -> None:
    may_commit, committed = asyncio.Event(), asyncio.Event()
    emitted = asyncio.Event()

    async def slow() -> None:
        async with db.transaction() as tx:
            await tx.emit(cancelled(1))
            emitted.set()
            await may_commit.wait()
        committed.set()

    bus = Meanwhile(may_commit, committed)
    async with asyncio.TaskGroup() as group:
        group.create_task(slow())
        await emitted.wait()
        await emit(db, 2)
        assert await db.relay_once(bus) == 1
    assert await db.relay_once(bus) == 1
    assert await jobs(bus) == ["job-2", "job-1"]


async def test_a_running_relay_is_woken_by_a_commit(db: Database) -> None:
    bus = MemoryBus()
    relay = asyncio.create_task(db.relay(bus))
    for number in range(5):
        await emit(db, number)
    await eventually(lambda: outbox_is_empty(db))
    relay.cancel()
    assert await jobs(bus) == [f"job-{number}" for number in range(5)]


async def outbox_is_empty(db: Database) -> bool:
    return await outbox(db) == 0


async def test_a_lost_connection_is_transient_and_the_next_one_works(db: Database) -> None:
    async def lose() -> None:
        async with db.transaction() as tx:
            await note(tx, "lost")
            async with db.transaction() as other:
                await other.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where pid <> pg_backend_pid() and datname = current_database()"
                )
            await note(tx, "never")

    with pytest.raises(TRANSIENT):
        await lose()
    assert await notes(db) == []
    assert await db.ready()


async def test_a_server_that_is_not_there_is_transient() -> None:
    with pytest.raises(TRANSIENT):
        async with connect("host=127.0.0.1 port=1 user=x dbname=x", "notes", []):
            pass


async def test_however_long_the_server_was_away_the_next_caller_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's own next try would be a minute away."""
    monkeypatch.setattr(AttemptWithBackoff, "INITIAL_DELAY", 60.0)
    monkeypatch.setattr(database, "WAIT_S", 0.5)
    (port,) = ports.free(1)
    server = Server(servers.postgres(tmp_path / "data", port, "secret"), tmp_path / "log")
    await server.start()
    try:
        async with connect(servers.postgres_dsn(port, "secret"), "notes", [TABLE]) as db:
            await server.kill()
            assert not await db.ready()
            await server.start()
            await eventually(db.ready)
    finally:
        await server.stop()
