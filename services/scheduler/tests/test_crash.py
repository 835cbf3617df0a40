"""Killed at any point, the scheduler loses nothing, doubles nothing and gives nothing twice."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from functools import partial

import httpx
import pytest

from libs.bus import EVENTS
from libs.contracts.envelope import decode
from libs.contracts.events import (
    AttemptPlaced,
    AttemptStarted,
    AttemptSucceeded,
    JobSucceeded,
)
from libs.database import Database, connect
from services.scheduler import store
from services.scheduler.stimuli import JobSubmitted
from services.scheduler.tests.crash import World, read
from services.scheduler.tests.test_service import (
    BEAT_S,
    Agent,
    Service,
    about,
    beating,
    is_state,
    service,
)
from stack.testing import eventually

__all__ = ["service"]

POINTS = 40
LONG_POINTS = 1_000


async def crash(db: Database, dsn: str, points: int, seed: int) -> int:
    """How often it was killed."""
    world = World(db, dsn, seed)
    await world.run(points)
    scheduler = await world.check()
    assert {job.state for job in scheduler.jobs.values()} <= {"succeeded", "failed", "waiting"}
    assert len(scheduler.jobs) == points
    return world.crashes


async def test_between_any_two_awaits_of_the_writer(
    db: Database, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.scheduler.writer.KEEP_EVERY", 10)
    await crash(db, postgres_dsn, POINTS, seed=1)


@pytest.mark.long
async def test_at_a_thousand_points(
    db: Database,
    postgres_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """`make bench-scheduler` shows what it records."""
    monkeypatch.setattr("services.scheduler.writer.KEEP_EVERY", 10)
    record_property("kills", await crash(db, postgres_dsn, LONG_POINTS, seed=2))


class Node(Agent):
    """Starts what it is handed and is through with it at once; says both until the bus has them."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.bus, "n")
        self.service = service
        self.seen = 0

    async def work(self) -> None:
        while not self.silenced.is_set():
            subject = "events.*.attempt.placed"
            for one in await self.bus.read(EVENTS, subject, self.seen, 100):
                _, placed = decode(one.payload)
                assert isinstance(placed, AttemptPlaced)
                await self.service.publish(AttemptStarted(**about(placed)), id=f"s{placed.token}")
                done = AttemptSucceeded(**about(placed), result={"token": placed.token})
                await self.service.publish(done, id=f"d{placed.token}")
                self.seen = one.sequence
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self.silenced.wait()


async def submit(service: Service, name: str) -> None:
    """Until it is answered."""

    async def accepted() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return (await service.submit(name)).status_code == httpx.codes.OK
        return False

    await eventually(accepted, 120)


async def kill_again_and_again(service: Service, dsn: str, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    names = [f"j{number}" for number in range(4 * kills)]
    node = Node(service)
    async with beating(node):
        working = asyncio.create_task(node.work())
        submitting = []
        for kill in range(kills):
            mine = names[4 * kill : 4 * kill + 4]
            submitting += [asyncio.create_task(submit(service, name)) for name in mine]
            await asyncio.wait(submitting[-4:], timeout=chance.random())
            await service.server.kill()
            await service.server.start()
        await asyncio.gather(*submitting)
        for name in names:
            await eventually(partial(is_state, service, name, "succeeded"), 120)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
    async with connect(dsn, "scheduler", store.MIGRATIONS) as db:
        await eventually(partial(left_nothing, db), 60)
        await service.server.stop()
        scheduler, lines, decided = await read(db)
        assert sorted(key[1] for key in scheduler.jobs) == sorted(names)
        assert sum(isinstance(line, JobSubmitted) for line in lines) == len(names)
    told = [
        decode(one.payload)[1]
        for kind in (AttemptPlaced, JobSucceeded)
        for one in await service.bus.read(
            EVENTS, f"events.*.{kind.entity}.{kind.verb}", 0, 10 * len(names)
        )
    ]
    assert Counter(map(str, told)) == Counter(map(str, decided))


async def left_nothing(db: Database) -> bool:
    async with db.transaction() as tx:
        return await tx.one("select from outbox") is None


async def test_the_process_itself(service: Service, postgres_dsn: str) -> None:
    await kill_again_and_again(service, postgres_dsn, kills=2, seed=3)


@pytest.mark.long
async def test_the_process_itself_for_long(service: Service, postgres_dsn: str) -> None:
    await kill_again_and_again(service, postgres_dsn, kills=50, seed=4)
