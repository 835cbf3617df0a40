from collections.abc import AsyncIterator

import pytest_asyncio

from libs import database
from libs.objectstore import ObjectStore
from services.preprocess.store import MIGRATIONS
from services.preprocess.tests.desk import Desk


@pytest_asyncio.fixture
async def desk(postgres_dsn: str, objects: ObjectStore) -> AsyncIterator[Desk]:
    async with database.connect(postgres_dsn, "preprocess", MIGRATIONS) as db:
        yield Desk(db, objects)
