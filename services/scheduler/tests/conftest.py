from collections.abc import AsyncIterator

import pytest

from libs.database import Database, connect
from services.scheduler import store


@pytest.fixture
async def db(postgres_dsn: str) -> AsyncIterator[Database]:
    async with connect(postgres_dsn, "scheduler", store.MIGRATIONS) as connected:
        yield connected
