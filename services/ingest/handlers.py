"""Which events change what may land."""

from dataclasses import dataclass

from libs.bus.loop import Handlers, Meta
from libs.contracts import pipeline
from libs.contracts.events import PipelineApplied
from libs.database import Database
from services.ingest import store


@dataclass(frozen=True)
class Context:
    db: Database


async def on_pipeline_applied(event: PipelineApplied, meta: Meta, context: Context) -> None:
    async with context.db.transaction() as tx:
        if not await tx.first_time(meta.id):
            return
        applied = pipeline.convert(event.spec)
        await store.apply_pipeline(tx, event.project, applied, event.revision)


HANDLERS: Handlers = {PipelineApplied: on_pipeline_applied}
