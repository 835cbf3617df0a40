"""What is in memory is what is committed, and the log gives it back."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from libs.contracts.events import AttemptPlaced, JobRequested, Resources
from libs.database import TRANSIENT, Database, Transaction, connect
from services.scheduler import store
from services.scheduler.domain import Scheduler
from services.scheduler.executor import BusExecutor
from services.scheduler.stimuli import Heartbeat, JobSubmitted, Tick
from services.scheduler.store import Diverged, Overtaken, Store
from services.scheduler.writer import Standby, Writer
from stack.testing import eventually


class Broken(BusExecutor):
    """Fails after it has emitted, as often as it is told to."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def start(self, tx: Transaction, placement: AttemptPlaced) -> None:
        await super().start(tx, placement)
        if self.times:
            self.times -= 1
            raise ConnectionError("the server went away")


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    async with connect(postgres_dsn, "scheduler", store.MIGRATIONS) as connected:
        yield connected


def leading(db: Database, failures: int = 0) -> Writer:
    writer = Writer(Store(db), Broken(failures))
    writer.leading.set()
    return writer


def job(name: str) -> JobSubmitted:
    return JobSubmitted(JobRequested(project="p", job=name, kind="train"))


def heartbeat() -> Heartbeat:
    return Heartbeat("n", "1", ["train"], Resources(1000, 1000))


def state_of(scheduler: Scheduler) -> bytes:
    return msgspec.json.encode(scheduler.snapshot())


async def count(db: Database, table: str) -> int:
    async with db.transaction() as tx:
        row = await tx.one(f"select count(*) as count from {table}")  # noqa: S608 - our own names
    assert row is not None
    return int(row["count"])


async def test_a_decision_that_did_not_commit_was_not_taken(db: Database) -> None:
    writer = leading(db, failures=1)
    await writer.take(heartbeat())
    with pytest.raises(ConnectionError, match="went away"):
        await writer.take(job("j"), "event")
    async with writer.turn() as scheduler:
        assert scheduler.jobs == {}
    assert await count(db, "outbox") == 0
    await writer.take(job("j"), "event")
    await writer.take(job("j"), "event")
    async with writer.turn() as scheduler:
        assert scheduler.jobs["p", "j"].state == "placed"
        assert scheduler.sequence == 2
    assert await count(db, "outbox") == 1


async def test_heartbeats_without_news_are_not_logged(db: Database) -> None:
    writer = leading(db)
    for _ in range(3):
        await writer.take(heartbeat())
        await writer.take(Tick([]))
    assert await count(db, "log") == 1


async def test_a_restart_reads_snapshot_and_log(db: Database) -> None:
    writer = leading(db)
    await writer.take(heartbeat())
    await writer.take(job("a"))
    await writer.rest()
    await writer.take(Tick(["n"]))
    await writer.take(job("b"))
    async with writer.turn() as scheduler:
        before = state_of(scheduler)
    loaded = await Store(db).load()
    loaded.validate()
    assert state_of(loaded) == before
    assert loaded.sequence == 4


async def test_a_snapshot_replaces_the_lines_before_it(db: Database) -> None:
    writer = leading(db)
    async with writer.turn() as scheduler:
        scheduler.sequence = store.SNAPSHOT_EVERY - 2
        await writer.apply(scheduler, job("a"))
        assert await count(db, "snapshot") == 0
        await writer.apply(scheduler, job("b"))
        assert await count(db, "snapshot") == 1
        scheduler.sequence += store.LOG_KEPT
    await writer.rest()
    assert await count(db, "log") == 0
    assert [key[1] for key in (await Store(db).load()).jobs] == ["a", "b"]


async def test_two_leaders_do_not_write_over_each_other(db: Database) -> None:
    first, second = leading(db), leading(db)
    async with second.turn():
        await first.take(job("a"))
    with pytest.raises(Overtaken) as raised:
        await second.take(job("b"))
    assert isinstance(raised.value, TRANSIENT), "the bus loop tries again"
    await second.take(job("b"))
    async with second.turn() as scheduler:
        assert [key[1] for key in scheduler.jobs] == ["a", "b"]


async def test_one_leads_until_its_lock_is_gone(db: Database) -> None:
    async with db.exclusively(store.LEADER) as held:
        query = "select pg_try_advisory_lock(hashtext(%s)) as ours"
        async with db.transaction() as tx:
            row = await tx.one(query, (store.LEADER,))
            assert row == {"ours": False}
    assert held.closed

    async def is_free() -> bool:
        """Once the server has noticed that the connection is gone."""
        async with db.transaction() as tx:
            return await tx.one(query, (store.LEADER,)) == {"ours": True}

    await eventually(is_free)


async def test_a_replay_that_decides_otherwise_is_found_out(db: Database) -> None:
    await leading(db).take(job("a"))
    async with db.transaction() as tx:
        await tx.execute("update log set decided = 'something else'")
    with pytest.raises(Diverged, match="at line 1"):
        await Store(db).load()


async def test_a_standby_takes_nothing_until_it_leads(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    standby = Writer(Store(db), BusExecutor())
    asked = asyncio.create_task(standby.take(job("a")))
    await leading(db).take(job("b"))
    assert not asked.done()
    standby.leading.set()
    await asked
    async with standby.turn() as scheduler:
        assert [key[1] for key in scheduler.jobs] == ["b", "a"]
    monkeypatch.setattr("services.scheduler.writer.LEAD_WAIT_S", 0.01)
    with pytest.raises(Standby, match="another scheduler has led for"):
        await Writer(Store(db), BusExecutor()).take(job("c"))
    assert await count(db, "log") == 2
