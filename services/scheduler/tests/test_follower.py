"""A standby that reads along goes on as one that reads all, and follows nobody it cannot."""

import asyncio
import random

import pytest

from libs.database import Database
from services.scheduler import domain, follower, lease
from services.scheduler.domain import Scheduler
from services.scheduler.executor import BusExecutor
from services.scheduler.follower import Follower, following
from services.scheduler.leader import go_on
from services.scheduler.store import Store
from services.scheduler.tests.test_writer import happening, state_of
from services.scheduler.tests.writing import job, led
from services.scheduler.writer import Writer
from stack.testing import eventually


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "FOLLOW_S", 0.001)


async def walk(writer: Writer, chance: random.Random, steps: int) -> int:
    """Some of what may happen, with checkpoints in between; returns the last line."""
    for _ in range(steps):
        await writer.take(await writer.read(lambda now: happening(now, chance)))
        if writer.keeping is not None and chance.random() < 0.8:
            await writer.keeping
    return await writer.read(lambda now: now.sequence)


async def until(one: Follower, line: int) -> None:
    """It has read that far."""
    await eventually(lambda: one.scheduler is not None and one.scheduler.sequence >= line)


async def test_it_goes_on_as_one_that_reads_all(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also its checkpoints: they hold what changed since the last one of who led before."""
    monkeypatch.setattr(domain, "FINISHED_MIN", 5)
    monkeypatch.setattr(domain, "FINISHED_MAX", 5)
    monkeypatch.setattr("services.scheduler.writer.KEEP_EVERY", 7)
    chance = random.Random(12)
    first, second = (Writer(Store(db), BusExecutor()) for _ in range(2))
    async with following(second.store) as one:
        async with lease.seat(db), led(first):
            await until(one, await walk(first, chance, 20))
            await until(one, await walk(first, chance, 100))
            assert len(one.changed) < 20, "what is in a checkpoint is not kept"
            last = await walk(first, chance, 3)
        await first.stop_keeping()
        followed = await one.ended()
    assert followed is not None
    assert followed.sequence == last
    followed.validate()
    assert state_of(followed) == state_of(await Store(db).load())
    go_on(second, followed)
    async with led(second):
        for _ in range(10):
            await walk(second, chance, 9)
            assert await second.read(state_of) == state_of(await Store(db).load())
        await second.rest()
    assert second.store.base is not None
    assert second.store.base > last + 20, "its checkpoints are on top of the other's"


async def test_it_follows_nobody_who_decides_by_other_code(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(Store(db), BusExecutor())
    with monkeypatch.context() as other:
        other.setattr(lease, "code", lambda: f"{lease.LEADER} of another release")
        async with lease.seat(db), led(writer):
            await writer.take(job("a"))
            other.undo()
            assert not await lease.leads_alike(db)
            one = Follower(Store(db))
            await one.look()
            assert one.scheduler is None
    assert not await lease.leads_alike(db), "nobody leads"


@pytest.mark.parametrize(
    "spoilt",
    [
        "update log set decided = 'something else' where sequence = 3",
        "delete from log where sequence <= 3",
        "insert into snapshot values (3, '')",
    ],
)
async def test_what_does_not_go_on_from_what_it_read_is_read_again(
    db: Database, spoilt: str
) -> None:
    writer = Writer(Store(db), BusExecutor())
    async with following(Store(db)) as one:
        async with lease.seat(db), led(writer):
            await writer.take(job("a"))
            await writer.take(job("b"))
            await until(one, 2)
            one.over.set()
            await one.task
            await writer.take(job("c"))
            await writer.take(job("d"))
            async with db.transaction() as tx:
                await tx.execute(spoilt)
        assert await one.ended() is None


class Held(Store):
    """Reads on when it may."""

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self.reached, self.may = asyncio.Event(), asyncio.Event()

    async def follow(self, scheduler: Scheduler, base: int | None) -> int | None:
        self.reached.set()
        await self.may.wait()
        return await super().follow(scheduler, base)


async def test_who_leads_at_last_gets_no_state_that_is_still_read(db: Database) -> None:
    writer, held = Writer(Store(db), BusExecutor()), Held(db)
    async with following(held) as one, lease.seat(db), led(writer):
        await writer.take(job("a"))
        await held.reached.wait()
        await writer.take(job("b"))
        ending = asyncio.create_task(one.ended())
        await asyncio.wait([ending], timeout=0.05)
        assert not ending.done()
        held.may.set()
        followed = await ending
    assert followed is not None
    assert state_of(followed) == state_of(await Store(db).load())
