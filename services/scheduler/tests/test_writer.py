"""What is in memory is what is committed, and the log gives it back."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from libs.bus.loop import Meta
from libs.contracts.events import (
    AttemptFailed,
    AttemptStarted,
    AttemptSucceeded,
    JobCancelled,
    JobRequested,
    Resources,
)
from libs.database import TRANSIENT, Database, Transaction
from libs.doors import NotFound
from services.scheduler import domain, lease, store
from services.scheduler.domain import Scheduler
from services.scheduler.executor import BusExecutor, Order
from services.scheduler.handlers import HANDLERS, Context
from services.scheduler.lease import LEADER
from services.scheduler.nodes import Liveness
from services.scheduler.stimuli import Heartbeat, Stimulus, Tick
from services.scheduler.store import Diverged, Overtaken, Store
from services.scheduler.tests.writing import job, led, scheduled
from services.scheduler.writer import Defect, Overloaded, Standby, Writer
from stack.testing import eventually


class Broken(BusExecutor):
    """Fails after it has emitted, as often as it is told to."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def carry_out(self, tx: Transaction, orders: Sequence[tuple[Order, str]]) -> None:
        await super().carry_out(tx, orders)
        if self.times:
            self.times -= 1
            raise ConnectionError("the server went away")


@contextlib.asynccontextmanager
async def leading(db: Database, failures: int = 0) -> AsyncIterator[Writer]:
    writer = Writer(Store(db), Broken(failures))
    async with led(writer):
        yield writer


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
    async with leading(db, failures=1) as writer:
        await writer.take(heartbeat())
        with pytest.raises(ConnectionError, match="went away"):
            await writer.take(job("j"), "event")
        assert await scheduled(writer) == []
        assert await count(db, "outbox") == 0
        await writer.take(job("j"), "event")
        await writer.take(job("j"), "event")
        assert await scheduled(writer) == [("j", "placed")]
        assert await writer.read(lambda scheduler: scheduler.sequence) == 2
    assert await count(db, "outbox") == 1


async def test_what_waits_together_is_one_transaction_and_takes_effect_once(db: Database) -> None:
    writer = Writer(Store(db), BusExecutor())
    names = [f"j{number}" for number in range(100)]
    ids = [f"event {name}" for name in (*names, *names)]
    asked = [
        asyncio.create_task(writer.take(job(name), event_id))
        for name, event_id in zip((*names, *names), ids, strict=True)
    ]
    reading = asyncio.create_task(scheduled(writer))
    await asyncio.sleep(0)
    assert len(writer.waiting) == 201
    async with led(writer):
        await asyncio.gather(*asked)
        assert await reading == [(name, "waiting") for name in names]
    assert (await count(db, "log"), await count(db, "inbox")) == (100, 100)
    async with db.transaction() as tx:
        assert await tx.one("select count(distinct xmin::text) as many from log") == {"many": 1}


async def test_nobody_is_answered_before_the_commit(db: Database) -> None:
    class Slow(BusExecutor):
        async def carry_out(self, tx: Transaction, orders: Sequence[tuple[Order, str]]) -> None:
            await super().carry_out(tx, orders)
            reached.set()
            await go.wait()

    reached, go = asyncio.Event(), asyncio.Event()
    writer = Writer(Store(db), Slow())
    async with led(writer):
        await writer.take(heartbeat())
        asked = asyncio.create_task(writer.take(job("j")))
        await reached.wait()
        reading = asyncio.create_task(scheduled(writer))
        await asyncio.sleep(0)
        assert not asked.done()
        assert not reading.done()
        assert await count(db, "log") == 1
        go.set()
        await asked
        assert await reading == [("j", "placed")]


async def test_a_defect_is_whose_it_is(db: Database) -> None:
    """The others of the batch are written; the state is not what the defect left of it."""

    def defect(scheduler: Scheduler) -> list[Tick]:
        scheduler.jobs.clear()
        raise ZeroDivisionError

    def refusal(_: Scheduler) -> list[Tick]:
        raise NotFound("no such thing")

    writer = Writer(Store(db), BusExecutor())
    asked = [
        asyncio.create_task(one)
        for one in (
            writer.take(job("a")),
            writer.ask(defect, lambda _: None),
            writer.ask(refusal, lambda _: None),
            writer.take(job("b")),
        )
    ]
    async with led(writer):
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(answer) for answer in answers] == [
            type(None),
            Defect,
            NotFound,
            type(None),
        ]
        assert isinstance(answers[1], Defect)
        assert isinstance(answers[1].__cause__, ZeroDivisionError)
        assert await scheduled(writer) == [("a", "waiting"), ("b", "waiting")]
    assert await count(db, "log") == 2


async def test_who_goes_away_is_not_waited_for(db: Database) -> None:
    writer = Writer(Store(db), BusExecutor())
    gone = asyncio.create_task(writer.take(job("gone")))
    there = asyncio.create_task(writer.take(job("there")))
    await asyncio.sleep(0)
    gone.cancel()
    async with led(writer):
        await there
        assert await scheduled(writer) == [("there", "waiting")]


async def test_what_waits_is_bounded(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.scheduler.writer.WAITING_MAX", 1)
    writer = Writer(Store(db), BusExecutor())
    first = asyncio.create_task(writer.take(job("a")))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="1 requests wait"):
        await writer.take(job("b"))
    async with led(writer):
        await first


async def test_a_transaction_has_no_more_than_is_handled_at_once(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for more than that is alone; nobody waits while there is enough."""
    monkeypatch.setattr("services.scheduler.writer.BATCH_MAX", 10)
    writer = Writer(Store(db), BusExecutor())
    sizes = [6, 4, 1, 20, 9, 2]
    wishes = [[job(f"j{size}-{number}") for number in range(size)] for size in sizes]

    async def ask(wish: Sequence[Stimulus]) -> None:
        await writer.ask(lambda _: wish, lambda _: None, size=len(wish))

    asked = [asyncio.create_task(ask(wish)) for wish in wishes]
    await asyncio.sleep(0)
    assert writer.weight == sum(sizes)
    async with led(writer):
        await asyncio.gather(*asked)
    assert writer.weight == 0
    async with db.transaction() as tx:
        rows = await tx.all("select count(*) as lines from log group by xmin order by 1")
    assert [row["lines"] for row in rows] == [1, 2, 9, 10, 20]


async def test_heartbeats_without_news_are_not_logged(db: Database) -> None:
    async with leading(db) as writer:
        for _ in range(3):
            await writer.take(heartbeat())
            await writer.take(Tick([]))
    assert await count(db, "log") == 1


async def test_a_restart_reads_snapshot_and_log(db: Database) -> None:
    async with leading(db) as writer:
        await writer.take(heartbeat())
        await writer.take(job("a"))
        await writer.rest()
        await writer.take(Tick(["n"]))
        await writer.take(job("b"))
        before = await writer.read(state_of)
    loaded = await Store(db).load()
    loaded.validate()
    assert state_of(loaded) == before
    assert loaded.sequence == 4


async def test_a_checkpoint_and_the_lines_after_it_are_the_state(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that come, start, end, are forgotten and come again, and checkpoints in between."""
    monkeypatch.setattr(domain, "FINISHED_MIN", 5)
    monkeypatch.setattr(domain, "FINISHED_MAX", 5)
    monkeypatch.setattr("services.scheduler.writer.KEEP_EVERY", 7)
    monkeypatch.setattr(store, "LOG_KEPT", 20)
    chance = random.Random(11)
    bases = set()
    async with leading(db) as writer:
        for step in range(200):
            stimulus = await writer.read(lambda now: happening(now, chance))
            await writer.take(stimulus)
            if writer.keeping is not None and chance.random() < 0.8:
                await writer.keeping
            if step % 10 == 0:
                loaded = await Store(db).load()
                loaded.validate()
                assert state_of(loaded) == await writer.read(state_of)
                bases.add(writer.store.base)
    assert len(bases) > 5
    assert await count(db, "log") < 40


def happening(now: Scheduler, chance: random.Random) -> Stimulus:
    """Something that may happen next."""
    placed = [one for one in now.jobs.values() if one.placement is not None]
    what = chance.randrange(6)
    if what == 0:
        return Heartbeat("n", str(chance.randrange(2)), ["train"], Resources(4000, 4000))
    if what == 1:
        return JobCancelled(project="p", job=f"j{chance.randrange(30)}")
    if what == 2 or not placed:
        return job(f"j{chance.randrange(30)}")
    one = chance.choice(placed)
    about: dict[str, Any] = {"project": "p", "job": one.request.job, "attempt": one.live.attempt}
    about |= {"token": one.live.token, "node": "n"}
    match what:
        case 3:
            return AttemptStarted(**about)
        case 4:
            return AttemptSucceeded(**about, result={"rows": 3})
    return AttemptFailed(**about, reason="x", retryable=chance.random() < 0.5)


async def test_two_leaders_do_not_write_over_each_other(db: Database) -> None:
    async with leading(db) as first, leading(db) as second:
        await scheduled(second)
        await first.take(job("a"))
        with pytest.raises(Overtaken) as raised:
            await second.take(job("b"))
        assert isinstance(raised.value, TRANSIENT), "the bus loop tries again"
        await second.take(job("b"))
        assert await scheduled(second) == [("a", "waiting"), ("b", "waiting")]


async def test_who_lost_the_lock_commits_nothing(db: Database) -> None:
    """Even if it has not noticed: its transactions are on the connection that held the lock."""
    async with leading(db) as writer, db.exclusively(LEADER) as held:
        writer.connection = held
        await writer.take(job("a"))
        async with db.transaction() as tx:
            await tx.execute("select pg_terminate_backend(%s)", (held.info.backend_pid,))
        with pytest.raises(TRANSIENT):
            await writer.take(job("b"))
    assert await count(db, "log") == 1


async def test_one_leads_until_its_lock_is_gone(db: Database) -> None:
    async with db.exclusively(LEADER) as held:
        query = "select pg_try_advisory_lock(hashtext(%s)) as ours"
        async with db.transaction() as tx:
            row = await tx.one(query, (LEADER,))
            assert row == {"ours": False}
    assert held.closed

    async def is_free() -> bool:
        """Once the server has noticed that the connection is gone."""
        async with db.transaction() as tx:
            return await tx.one(query, (LEADER,)) == {"ours": True}

    await eventually(is_free)


async def test_a_leader_that_stands_still_is_unseated(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with contextlib.AsyncExitStack() as standing:
        still = await standing.enter_async_context(lease.seat(db))
        renewing = asyncio.create_task(lease.renew(db, still))
        await eventually(lambda: renewed(db))
        waiting = asyncio.create_task(seated(db))
        renewing.cancel()
        monkeypatch.setattr(lease, "RENEW_S", 0.05)
        monkeypatch.setattr(lease, "LEASE_S", 0.5)
        async with asyncio.timeout(60):
            await waiting
        with pytest.raises(TRANSIENT):
            await still.execute("select 1")


async def renewed(db: Database) -> bool:
    return await count(db, "lease") == 1


async def seated(db: Database) -> None:
    async with lease.seat(db) as connection:
        await connection.execute("select 1")


async def test_a_replay_that_decides_otherwise_is_found_out(db: Database) -> None:
    async with leading(db) as writer:
        await writer.take(job("a"))
    async with db.transaction() as tx:
        await tx.execute("update log set decided = 'something else'")
    with pytest.raises(Diverged, match="at line 1"):
        await Store(db).load()


async def test_a_standby_takes_nothing_until_it_leads(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    standby = Writer(Store(db), BusExecutor())
    asked = asyncio.create_task(standby.take(job("a")))
    async with leading(db) as leader:
        await leader.take(job("b"))
    assert not asked.done()
    async with led(standby):
        await asked
        assert await scheduled(standby) == [("b", "waiting"), ("a", "waiting")]
    monkeypatch.setattr("services.scheduler.writer.LEAD_WAIT_S", 0.01)
    with pytest.raises(Standby, match="does another lead"):
        await Writer(Store(db), BusExecutor()).take(job("c"))
    assert await count(db, "log") == 2


@pytest.mark.parametrize("name", ["", "a\0b", "n" * 201])
async def test_a_name_that_cannot_be_written_down_never_gets_in(db: Database, name: str) -> None:
    context = Context(Writer(Store(db), BusExecutor()), Liveness([], 0.0))
    meta = Meta("an id", "", "", 1)
    for event in (
        JobRequested(project="p", job=name, kind="train"),
        JobCancelled(project="p", job=name),
    ):
        with pytest.raises(ValueError, match="job: 1 to 200"):
            await HANDLERS[type(event)](event, meta, context)
    assert not context.writer.waiting
