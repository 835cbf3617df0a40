"""Killed at any point, the scheduler loses nothing, doubles nothing and gives nothing twice."""

from collections.abc import AsyncIterator

import pytest

from libs.database import Database, connect
from services.scheduler import store
from services.scheduler.tests.crash import World

POINTS = 40
LONG_POINTS = 1_000


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    async with connect(postgres_dsn, "scheduler", store.MIGRATIONS) as connected:
        yield connected


async def crash(db: Database, dsn: str, points: int, seed: int) -> None:
    world = World(db, dsn, seed)
    await world.run(points)
    scheduler = await world.check()
    assert {job.state for job in scheduler.jobs.values()} <= {"succeeded", "failed", "waiting"}
    assert len(scheduler.jobs) == points


async def test_between_any_two_awaits_of_the_writer(
    db: Database, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.scheduler.writer.KEEP_EVERY", 10)
    await crash(db, postgres_dsn, POINTS, seed=1)


@pytest.mark.long
async def test_at_a_thousand_points(
    db: Database, postgres_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.scheduler.writer.KEEP_EVERY", 10)
    await crash(db, postgres_dsn, LONG_POINTS, seed=2)
