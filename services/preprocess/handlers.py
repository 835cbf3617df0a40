"""Events are written down; the worker (`worker.py`) does what follows from them."""

import asyncio

import msgspec

from libs.bus.loop import Handlers, Meta
from libs.contracts.events import PartLanded, PipelineApplied
from services.preprocess.store import Store, record_part, record_pipeline


class Context(msgspec.Struct, frozen=True):
    store: Store
    wake: asyncio.Event
    """Set when there may be something to measure or to build."""
    building: asyncio.Lock
    """One build at a time in this process; Postgres' lock keeps other replicas out."""


async def on_part_landed(event: PartLanded, meta: Meta, context: Context) -> None:
    async with context.store.db.transaction() as tx:
        if not await tx.first_time(meta.id):
            return
        await record_part(tx, event, meta.traceparent)
    context.wake.set()


async def on_pipeline_applied(event: PipelineApplied, meta: Meta, context: Context) -> None:
    async with context.store.db.transaction() as tx:
        if not await tx.first_time(meta.id):
            return
        await record_pipeline(tx, event)
    context.wake.set()


HANDLERS: Handlers = {PartLanded: on_part_landed, PipelineApplied: on_pipeline_applied}
