"""Whether what a service needs answers, as Prometheus reads it at `/metrics`."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from prometheus_client import Gauge

from libs.bus import Bus
from libs.database import Database

if TYPE_CHECKING:  # who has no object store need not wait 0.1 s for its client
    from libs.objectstore import ObjectStore

POLL_S = 5.0
PATIENCE_S = 5.0
UP = Gauge("leptonic_dependency_up", "1 when it answers this service, else 0", ["dependency"])


async def watch(db: Database, bus: Bus, objects: "ObjectStore | None" = None) -> None:
    """Until cancelled."""

    async def connected() -> bool:
        return bus.connected

    async with asyncio.TaskGroup() as group:
        group.create_task(ask("postgres", db.ready))
        group.create_task(ask("nats", connected))
        if objects is not None:
            group.create_task(ask("s3", objects.ready))


async def ask(dependency: str, answers: Callable[[], Awaitable[bool]]) -> None:
    """Never twice at once: a call to a store that hangs holds a thread."""
    up = UP.labels(dependency)
    while True:
        asked = asyncio.ensure_future(answers())
        done, _ = await asyncio.wait([asked], timeout=PATIENCE_S)
        if not done:
            up.set(0)
        up.set(await asked)
        await asyncio.sleep(POLL_S)
