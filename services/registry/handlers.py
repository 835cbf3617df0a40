"""What the registry does: on events, and when somebody applies a pipeline or moves an alias."""

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import msgspec

from libs import telemetry
from libs.bus.loop import Handlers, Meta
from libs.contracts.artifacts import ModelManifest, TrainResult
from libs.contracts.events import (
    DeploymentObserved,
    DeploymentReady,
    JobFailed,
    JobSucceeded,
    ModelVersionGated,
    ModelVersionRegistered,
    PipelineApplied,
)
from libs.contracts.pipeline import Pipeline, convert
from libs.database import Database, Transaction
from libs.objectstore import ObjectStore
from services.registry import store
from services.registry.domain import (
    CHALLENGER,
    CHAMPION,
    Chosen,
    Configured,
    Deployment,
    Observed,
    Passed,
    Stimulus,
    Version,
    gate,
    handle,
)

log = logging.getLogger(__name__)
TRAIN = "train"


@dataclass(frozen=True)
class Context:
    db: Database
    objects: ObjectStore


class Refused(Exception):
    """A result that cannot become a version, or a command that cannot be done."""

    def __init__(self, problem: str, field: str = "") -> None:
        super().__init__(problem)
        self.field = field
        self.problem = problem


class Unknown(Refused):
    """What it names does not exist."""


async def on_job_succeeded(event: JobSucceeded, meta: Meta, context: Context) -> None:
    """Verifies what was trained, then registers, gates and deploys it in one transaction."""
    if event.kind != TRAIN:
        return
    result = msgspec.convert(event.result, TrainResult)
    with telemetry.span("register model version", attributes={"leptonic.job": event.job}) as span:
        manifest = await store.read_manifest(context.objects, result)
        async with context.db.transaction() as tx:
            if not await tx.first_time(meta.id):
                return
            version = await register(tx, event, result, manifest)
        if version is not None:
            span.set_attribute("leptonic.model", manifest.model)
            span.set_attribute("leptonic.version", version.number)


async def register(
    tx: Transaction, event: JobSucceeded, result: TrainResult, manifest: ModelManifest
) -> Version | None:
    """None if the job's version is registered already."""
    pipeline = await pipeline_of(tx, event.project, manifest)
    await store.lock_model(tx, event.project, manifest.model)
    if await store.version_of_job(tx, event.project, event.job):
        return None
    digest = result.manifest.digest
    version = await store.add_version(
        tx, event.project, event.job, digest, manifest, telemetry.current()
    )
    await tx.emit(
        ModelVersionRegistered(
            project=event.project,
            model=manifest.model,
            number=version.number,
            digest=digest,
            job=event.job,
            metrics=manifest.metrics,
        )
    )
    deployment = await store.load_deployment(tx, event.project, manifest.model)
    if await passes(tx, pipeline, deployment, version, result):
        await decide(tx, deployment, Passed(version))
    else:
        await store.set_state(tx, event.project, manifest.model, version.number, "rejected")
    return version


async def pipeline_of(tx: Transaction, project: str, manifest: ModelManifest) -> Pipeline:
    """The pipeline revision the version came from."""
    lineage = manifest.lineage
    row = await store.pipeline_row(tx, project, lineage.pipeline, lineage.revision)
    if row is None:
        raise Unknown(f"pipeline {lineage.pipeline} has no revision {lineage.revision}")
    pipeline = convert(row["spec"])
    if manifest.model != pipeline.deployment.model:
        raise Refused(
            f"pipeline {lineage.pipeline} trains {pipeline.deployment.model!r}, "
            f"not {manifest.model!r}"
        )
    return pipeline


async def passes(
    tx: Transaction,
    pipeline: Pipeline,
    deployment: Deployment,
    version: Version,
    result: TrainResult,
) -> bool:
    """Runs the gates and keeps what they said."""
    champion = deployment.champion.number if deployment.champion else None
    checks = gate(pipeline.gates, result.evaluation, champion)
    passed = all(one.passed for one in checks)
    await store.add_evaluation(
        tx, deployment.project, deployment.model, version.number, result.evaluation, checks
    )
    await tx.emit(
        ModelVersionGated(
            project=deployment.project,
            model=deployment.model,
            number=version.number,
            passed=passed,
            checks=[asdict(one) for one in checks],
        )
    )
    return passed


async def decide(tx: Transaction, deployment: Deployment, stimulus: Stimulus) -> Deployment:
    outcome = handle(deployment, stimulus)
    await store.save_outcome(tx, deployment, outcome)
    return outcome.deployment


async def on_job_failed(event: JobFailed, meta: Meta, context: Context) -> None:
    if event.kind != TRAIN:
        return
    async with context.db.transaction() as tx:
        if await tx.first_time(meta.id):
            log.warning("job %s failed: %s", event.job, event.reason)
            await store.add_failed_job(tx, event.project, event.job, event.reason, event.attempt)


async def on_deployment_ready(event: DeploymentReady, meta: Meta, context: Context) -> None:
    async with context.db.transaction() as tx:
        if await tx.first_time(meta.id):
            await store.set_ready(tx, event.project, event.model, event.generation)


async def on_deployment_observed(event: DeploymentObserved, meta: Meta, context: Context) -> None:
    """Counts of an older generation say nothing about what is deployed now."""
    async with context.db.transaction() as tx:
        if not await tx.first_time(meta.id):
            return
        if await store.lock_model(tx, event.project, event.model) is None:
            return
        deployment = await store.load_deployment(tx, event.project, event.model)
        if deployment.champion is None or event.generation != deployment.generation:
            return
        await store.add_observations(tx, event)
        counts = await store.counts(tx, event.project, event.model, event.generation)
        for one in event.observations:
            if one.quarantined is True:
                counts[one.number] = replace(counts[one.number], quarantined=True)
        await decide(tx, deployment, Observed(counts))


async def apply_pipeline(context: Context, project: str, pipeline: Pipeline) -> store.Row:
    """The revision that says this; a new one only where something changed."""
    spec = msgspec.json.decode(msgspec.json.encode(pipeline))
    async with context.db.transaction() as tx:
        revision = await store.lock_pipeline(tx, project, pipeline.pipeline)
        row = await store.pipeline_row(tx, project, pipeline.pipeline)
        if row is not None and row["spec"] == spec:
            return row
        await claim(tx, project, pipeline)
        await store.add_revision(tx, project, pipeline, revision + 1, spec)
        await tx.emit(
            PipelineApplied(
                project=project, pipeline=pipeline.pipeline, revision=revision + 1, spec=spec
            )
        )
        row = await store.pipeline_row(tx, project, pipeline.pipeline)
        assert row is not None
        return row


async def claim(tx: Transaction, project: str, pipeline: Pipeline) -> None:
    """A model belongs to one pipeline; its deployment follows the pipeline's settings."""
    model = pipeline.deployment.model
    owner = await store.claim_model(tx, project, model, pipeline.pipeline)
    if owner != pipeline.pipeline:
        raise Refused(
            f"model {model!r} belongs to pipeline {owner!r}: choose another name",
            "$.deployment.model",
        )
    row = await store.deployment_row(tx, project, model)
    if row is not None:
        await decide(tx, store.deployment_of(row), Configured(pipeline.deployment))


async def set_alias(context: Context, project: str, model: str, alias: str, number: int) -> Any:
    """Moves an alias by hand; `champion` deploys the version to all traffic."""
    if alias == CHALLENGER:
        raise Refused("a version becomes challenger by passing its gate", "alias")
    async with context.db.transaction() as tx:
        if await store.lock_model(tx, project, model) is None:
            raise Unknown(f"no model {model!r}", "model")
        row = await store.version_row(tx, project, model, number)
        if row is None:
            raise Unknown(f"model {model!r} has no version {number}", "number")
        if alias == CHAMPION:
            await choose(tx, row)
        else:
            await store.set_alias(tx, project, model, alias, number)
        return await store.version_row(tx, project, model, number)


async def choose(tx: Transaction, row: store.Row) -> None:
    if not row["passed"]:
        failed = [check["sentence"] for check in row["checks"] if not check["passed"]]
        problem = f"version {row['number']} did not pass its gate: {'; '.join(failed)}"
        raise Refused(problem, "number")
    deployment = await store.load_deployment(tx, row["project"], row["model"])
    version = Version(row["number"], row["digest"], row["traceparent"])
    await decide(tx, deployment, Chosen(version))


HANDLERS: Handlers = {
    JobSucceeded: on_job_succeeded,
    JobFailed: on_job_failed,
    DeploymentReady: on_deployment_ready,
    DeploymentObserved: on_deployment_observed,
}
