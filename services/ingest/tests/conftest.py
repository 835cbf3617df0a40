from collections.abc import AsyncIterator

import pytest_asyncio

from libs import database
from libs.bus import RECORDS, Subscription
from libs.bus.jetstream import JetStreamBus
from libs.bus.loop import ACK_WAIT_S, Meta
from libs.contracts.events import PipelineApplied
from libs.database import Database
from libs.objectstore import ObjectStore
from services.ingest.handlers import Context, on_pipeline_applied
from services.ingest.landing import Landing
from services.ingest.store import MIGRATIONS
from services.ingest.tests.pipelines import applied


@pytest_asyncio.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    """With the datasets `digits` and `flat` of project `default`."""
    async with database.connect(postgres_dsn, "ingest", MIGRATIONS) as connected:
        for number, event in enumerate((applied("digits"), applied("flat"))):
            await apply(connected, event, f"event-{number}")
        yield connected


async def apply(db: Database, event: PipelineApplied, id: str) -> None:
    await on_pipeline_applied(event, Meta(id, "", "", 1), Context(db))


@pytest_asyncio.fixture
async def landing(bus: JetStreamBus, db: Database, objects: ObjectStore) -> Landing:
    return Landing(bus, db, objects)


@pytest_asyncio.fixture
async def subscription(bus: JetStreamBus) -> Subscription:
    return await bus.subscribe(RECORDS, "ingest", ["records.>"], ACK_WAIT_S)
