"""What the trainer does about events: asks for jobs, runs what is placed here, cleans up."""

from dataclasses import dataclass

from libs import telemetry
from libs.bus.loop import Handlers, Meta
from libs.contracts.events import (
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    DatasetVersionCreated,
    JobFailed,
    JobSucceeded,
    PipelineApplied,
)
from libs.database import Database, Transaction
from libs.objectstore import ObjectStore
from services.trainer import store
from services.trainer.agent import Agent
from services.trainer.domain import (
    KIND,
    Version,
    checkpoints_of,
    job_requested,
    pipeline_of,
)


@dataclass(frozen=True)
class Context:
    db: Database
    objects: ObjectStore
    agent: Agent


async def on_pipeline_applied(event: PipelineApplied, meta: Meta, context: Context) -> None:
    async with context.db.transaction() as tx:
        if not await tx.first_time(meta.id):
            return
        await store.put_pipeline(tx, event.project, event.pipeline, event.revision, event.spec)
        await request_jobs(tx, event.project, event.pipeline, event.revision)


async def on_dataset_version_created(
    event: DatasetVersionCreated, meta: Meta, context: Context
) -> None:
    version = Version(
        project=event.project,
        pipeline=event.pipeline,
        revision=event.revision,
        dataset=event.dataset,
        number=event.number,
        digest=event.digest,
        rows=event.rows,
    )
    async with context.db.transaction() as tx:
        if not await tx.first_time(meta.id):
            return
        await store.put_version(tx, version, telemetry.current())
        await request_jobs(tx, event.project, event.pipeline, event.revision)


async def request_jobs(tx: Transaction, project: str, pipeline: str, revision: int) -> None:
    """Whichever comes last, the pipeline or its dataset version, asks for the job."""
    for version, spec, place in await store.take_unrequested(tx, project, pipeline, revision):
        await tx.emit(job_requested(version, pipeline_of(spec), place), place)


async def on_attempt_placed(event: AttemptPlaced, meta: Meta, context: Context) -> None:
    if not context.agent.is_for_us(event):
        return
    async with context.db.transaction() as tx:
        if not await tx.first_time(meta.id) or not await store.place(tx, event):
            return
        await tx.emit(
            AttemptStarted(
                project=event.project,
                job=event.job,
                attempt=event.attempt,
                token=event.token,
                node=event.node,
            )
        )
    context.agent.start(event, meta.traceparent)


async def on_attempt_stopped(event: AttemptStopped, meta: Meta, context: Context) -> None:
    if event.node != context.agent.node:
        return
    async with context.db.transaction() as tx:
        if not await tx.first_time(meta.id):
            return
        await store.stop(tx, event)
    context.agent.stop(event)


async def on_job_ended(event: JobSucceeded | JobFailed, meta: Meta, context: Context) -> None:
    """Nobody resumes it any more."""
    if event.kind == KIND:
        await store.delete_under(context.objects, checkpoints_of(event.project, event.job))


HANDLERS: Handlers = {
    PipelineApplied: on_pipeline_applied,
    DatasetVersionCreated: on_dataset_version_created,
    AttemptPlaced: on_attempt_placed,
    AttemptStopped: on_attempt_stopped,
    JobSucceeded: on_job_ended,
    JobFailed: on_job_ended,
}
