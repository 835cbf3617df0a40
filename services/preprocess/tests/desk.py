"""Preprocess on real servers, with events handed to it as the bus would."""

import asyncio
import uuid
from typing import Any

import msgspec

from libs.bus.loop import Meta
from libs.contracts.envelope import decode
from libs.contracts.events import Event, PartLanded, PipelineApplied
from libs.database import Database
from libs.objectstore import ObjectStore
from services.preprocess import worker
from services.preprocess.domain import Part
from services.preprocess.handlers import HANDLERS, Context
from services.preprocess.store import Store, Version
from services.preprocess.tests.digits import spec


def context_of(db: Database, objects: ObjectStore) -> Context:
    """As one process has it; a second one is a second replica."""
    return Context(Store(db, objects), asyncio.Event(), asyncio.Lock())


def traceparent_of(number: int) -> str:
    return f"00-{number:032x}-{number:016x}-01"


def applied(revision: int = 1, **changes: Any) -> PipelineApplied:
    return PipelineApplied(
        project="default", pipeline="digits", revision=revision, spec=spec(**changes)
    )


def landed(part: Part, size_bytes: int = 1) -> PartLanded:
    return PartLanded(
        project="default",
        dataset="digits",
        digest=part.digest,
        key=part.key,
        rows=part.rows,
        size_bytes=size_bytes,
        first_sequence=part.first_sequence,
        last_sequence=part.first_sequence + part.rows - 1,
    )


class Desk:
    def __init__(self, db: Database, objects: ObjectStore) -> None:
        self.db = db
        self.objects = objects
        self.context = context_of(db, objects)

    async def handle(self, event: Event, id: str = "", traceparent: str = "") -> None:
        meta = Meta(id or str(uuid.uuid4()), traceparent, "2026-11-21T00:00:00Z", 1)
        await HANDLERS[type(event)](event, meta, self.context)

    async def land(self, part: tuple[Part, bytes], traceparent: str = "") -> None:
        one, payload = part
        await self.objects.put(one.key, payload)
        await self.handle(landed(one), traceparent=traceparent)

    async def work(self) -> None:
        await worker.run_once(self.context)

    async def emitted(self, kind: type[Event]) -> list[Any]:
        """What waits in the outbox, in order."""
        async with self.db.transaction() as tx:
            rows = await tx.all("select payload from outbox order by position")
        events = [decode(bytes(row["payload"]))[1] for row in rows]
        return [event for event in events if isinstance(event, kind)]

    async def versions(self) -> list[Version]:
        return await self.context.store.versions("default", "digits")

    async def one(self, query: str) -> dict[str, Any]:
        async with self.db.transaction() as tx:
            row = await tx.one(query)
        assert row is not None
        return msgspec.convert(row, dict[str, Any])
