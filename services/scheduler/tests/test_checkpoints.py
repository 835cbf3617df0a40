"""A checkpoint loses no job and doubles none, whatever fails beside it or in it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import psycopg
import pytest
from msgspec.structs import replace

from libs.contracts.events import AttemptPlaced, Resources
from libs.database import Database
from services.scheduler.domain import Scheduler
from services.scheduler.executor import BusExecutor
from services.scheduler.stimuli import Heartbeat
from services.scheduler.store import Cut, Overtaken, Store, digest, whole_digest
from services.scheduler.tests.writing import job, led, scheduled
from services.scheduler.writer import Writer


@contextlib.asynccontextmanager
async def leading(db: Database) -> AsyncIterator[Writer]:
    writer = Writer(Store(db), BusExecutor())
    async with led(writer):
        yield writer


async def test_a_checkpoint_on_top_of_another_is_refused(db: Database) -> None:
    async with leading(db) as first, leading(db) as second:
        await first.take(job("a"))
        await first.rest()
        assert await scheduled(second) == [("a", "waiting")]
        await first.take(job("b"))
        await first.rest()
        with pytest.raises(Overtaken, match="not the one of line 1"):
            await second.rest()
    assert [key[1] for key in (await Store(db).load()).jobs] == ["a", "b"]


class Held(Store):
    """Writes a checkpoint for each time that it may."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self.reached, self.may = asyncio.Event(), asyncio.Semaphore(0)

    async def keep(self, cut: Cut) -> None:
        self.reached.set()
        await self.may.acquire()
        await super().keep(cut)


async def test_the_last_checkpoint_is_the_only_one_at_a_time(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(db)
    writer = Writer(held, BusExecutor())
    async with led(writer):
        await writer.take(job("a"))
        resting = asyncio.create_task(writer.rest())
        await held.reached.wait()
        monkeypatch.setattr("services.scheduler.writer.KEEP_EVERY", 1)
        await writer.take(job("b"))
        await writer.take(job("c"))
        held.may.release()
        await resting
        held.may.release()
        if writer.keeping is not None:
            await writer.keeping
    assert [key[1] for key in (await Store(db).load()).jobs] == ["a", "b", "c"]


class Breaking(Store):
    """Its second checkpoint fails: with an error, or after the server committed it."""

    def __init__(self, db: Database, late: bool) -> None:
        super().__init__(db)
        self.late, self.times = late, 0

    async def keep(self, cut: Cut) -> None:
        self.times += 1
        if self.times != 2:
            await super().keep(cut)
        elif self.late:
            base = self.base
            await super().keep(cut)
            self.base = base
            raise psycopg.OperationalError("the server went away")
        else:
            raise psycopg.DataError("a name with a NUL")


@pytest.mark.parametrize("late", [False, True])
async def test_a_checkpoint_that_failed_is_made_up_for(
    db: Database, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    monkeypatch.setattr("services.scheduler.writer.KEEP_EVERY", 1)
    breaking = Breaking(db, late)
    writer = Writer(breaking, BusExecutor())
    names = [f"j{number}" for number in range(6)]
    async with led(writer):
        for name in names:
            await writer.take(job(name))
            if writer.keeping is not None:
                await writer.keeping
    assert (breaking.times, breaking.base) == (6, 6)
    assert [key[1] for key in (await Store(db).load()).jobs] == names


async def test_an_older_checkpoint_replaces_no_newer_one(db: Database) -> None:
    old = Store(db)
    cut = old.cut(await old.load())
    async with leading(db) as writer:
        await writer.take(job("a"))
        await writer.rest()
    with pytest.raises(Overtaken, match="of line 1 already"):
        await old.keep(cut)


async def test_where_an_older_release_came_to_rest_is_read(db: Database) -> None:
    async with leading(db) as writer:
        await writer.take(job("a"))
        await writer.rest()
        await writer.take(job("b"))
        newer = await writer.read(lambda now: (now.sequence, msgspec.json.encode(now.snapshot())))
    await Store(db).rest(*newer)
    async with db.transaction() as tx:
        await tx.execute("delete from log")
    async with leading(db) as writer:
        assert await scheduled(writer) == [("a", "waiting"), ("b", "waiting")]
        await writer.rest()
    async with db.transaction() as tx:
        await tx.execute("delete from snapshot")
    assert [key[1] for key in (await Store(db).load()).jobs] == ["a", "b"]


async def test_many_jobs_are_read_in_the_order_of_submission(db: Database) -> None:
    names = [f"j{number}" for number in range(600, 0, -1)]
    async with leading(db) as writer:
        await writer.ask(lambda _: [job(name) for name in names], lambda _: None)
        await writer.rest()
    assert [key[1] for key in (await Store(db).load()).jobs] == names


async def test_what_a_release_adds_to_an_event_does_not_make_the_log_unreadable(
    db: Database,
) -> None:
    """What was decided is the same; also as the releases before wrote it down."""
    heartbeat = Heartbeat("n", 1, ["train"], Resources(1000, 1000))
    async with leading(db) as writer:
        await writer.take(heartbeat)
        await writer.take(job("a"))
    again = Scheduler()
    again.handle(heartbeat, 0.0)
    (placed,) = again.handle(job("a"), 0.0)
    assert isinstance(placed, AttemptPlaced)
    assert digest([replace(placed, workers=7)]) == digest([placed])
    assert digest([replace(placed, node="m")]) != digest([placed])
    async with db.transaction() as tx:
        row = await tx.one("select decided from log where sequence = 2")
        assert row == {"decided": digest([placed])}
        await tx.execute(
            "update log set decided = %s where sequence = 2", (whole_digest([placed]),)
        )
    assert (await Store(db).load()).sequence == 2
