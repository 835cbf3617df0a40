"""The registry's queries and artifacts; the tables are in `migrations.py`."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec

from libs.contracts.artifacts import Blob, Evaluation, ModelManifest, TrainResult
from libs.contracts.events import DeploymentObserved
from libs.contracts.pipeline import Deployment as Settings
from libs.contracts.pipeline import Pipeline
from libs.database import Jsonb, Transaction
from libs.objectstore import Corrupt, ObjectStore
from services.registry.domain import Check, Counts, Deployment, Outcome, Version, validate

Row = dict[str, Any]

VERSIONS = """
    select v.*, e.passed, coalesce(e.checks, '[]') as checks,
        array(select alias from alias a where (a.project, a.model, a.number)
            = (v.project, v.model, v.number) order by alias) as aliases
    from model_version v left join evaluation e using (project, model, number)
"""
DEPLOYMENTS = """
    select d.*, c.digest as champion_digest, c.traceparent as champion_traceparent,
        k.digest as canary_digest, k.traceparent as canary_traceparent
    from deployment d
    join model_version c on (c.project, c.model, c.number) = (d.project, d.model, d.champion)
    left join model_version k on (k.project, k.model, k.number) = (d.project, d.model, d.canary)
"""


async def read_manifest(objects: ObjectStore, result: TrainResult) -> ModelManifest:
    """The manifest, once every byte it names has been read back and verified.

    Raises `Missing`, `Corrupt`, or `msgspec.ValidationError`.
    """
    manifest = msgspec.json.decode(await verified(objects, result.manifest), type=ModelManifest)
    for blob in (manifest.weights, manifest.graph, manifest.transform):
        await verified(objects, blob)
    return manifest


async def verified(objects: ObjectStore, blob: Blob) -> bytes:
    payload = await objects.get_blob(blob.digest)
    if len(payload) != blob.size_bytes:
        raise Corrupt(f"artifact {blob.digest}: {len(payload)} bytes, not {blob.size_bytes}")
    return payload


async def lock_pipeline(tx: Transaction, project: str, pipeline: str) -> int:
    """The latest revision (0: none yet), which nobody else can change until the commit."""
    await tx.execute(
        "insert into pipeline (project, pipeline) values (%s, %s) on conflict do nothing",
        (project, pipeline),
    )
    row = await tx.one(
        "select revision from pipeline where (project, pipeline) = (%s, %s) for update",
        (project, pipeline),
    )
    assert row is not None
    return int(row["revision"])


async def add_revision(
    tx: Transaction, project: str, pipeline: Pipeline, revision: int, spec: Row
) -> None:
    await tx.execute(
        "insert into pipeline_revision (project, pipeline, revision, model, spec) "
        "values (%s, %s, %s, %s, %s)",
        (project, pipeline.pipeline, revision, pipeline.deployment.model, Jsonb(spec)),
    )
    await tx.execute(
        "update pipeline set revision = %s where (project, pipeline) = (%s, %s)",
        (revision, project, pipeline.pipeline),
    )


async def pipeline_row(
    tx: Transaction, project: str, pipeline: str, revision: int | None = None
) -> Row | None:
    """One revision, by default the latest."""
    return await tx.one(
        "select r.* from pipeline_revision r join pipeline p using (project, pipeline) "
        "where project = %s and pipeline = %s and r.revision = coalesce(%s, p.revision)",
        (project, pipeline, revision),
    )


async def pipeline_rows(tx: Transaction, project: str) -> list[Row]:
    """The latest revision of each."""
    return await tx.all(
        "select r.* from pipeline_revision r join pipeline using (project, pipeline, revision) "
        "where project = %s order by pipeline",
        (project,),
    )


async def lock_model(tx: Transaction, project: str, model: str) -> Row | None:
    """The model's row; whatever changes a model, its versions or its deployment holds it."""
    return await tx.one(
        "select * from model where (project, model) = (%s, %s) for update", (project, model)
    )


async def claim_model(tx: Transaction, project: str, model: str, pipeline: str) -> str:
    """Makes the model the pipeline's unless it is taken; returns whose it is. Locks it."""
    await tx.execute(
        "insert into model (project, model, pipeline) values (%s, %s, %s) on conflict do nothing",
        (project, model, pipeline),
    )
    row = await lock_model(tx, project, model)
    assert row is not None
    return str(row["pipeline"])


async def model_rows(tx: Transaction, project: str) -> list[Row]:
    return await tx.all(
        "select m.*, coalesce((select jsonb_object_agg(alias, number) from alias a "
        "where (a.project, a.model) = (m.project, m.model)), '{}') as aliases "
        "from model m where project = %s order by model",
        (project,),
    )


async def version_of_job(tx: Transaction, project: str, job: str) -> Row | None:
    return await tx.one(f"{VERSIONS} where (v.project, v.job) = (%s, %s)", (project, job))


async def version_rows(tx: Transaction, project: str, model: str) -> list[Row]:
    return await tx.all(
        f"{VERSIONS} where (v.project, v.model) = (%s, %s) order by v.number", (project, model)
    )


async def version_row(tx: Transaction, project: str, model: str, number: int) -> Row | None:
    return await tx.one(
        f"{VERSIONS} where (v.project, v.model, v.number) = (%s, %s, %s)", (project, model, number)
    )


async def number_of_alias(tx: Transaction, project: str, model: str, alias: str) -> int | None:
    row = await tx.one(
        "select number from alias where (project, model, alias) = (%s, %s, %s)",
        (project, model, alias),
    )
    return int(row["number"]) if row else None


async def set_alias(tx: Transaction, project: str, model: str, alias: str, number: int) -> None:
    await tx.execute(
        "insert into alias (project, model, alias, number) values (%s, %s, %s, %s) "
        "on conflict (project, model, alias) do update set number = excluded.number",
        (project, model, alias, number),
    )


async def add_version(
    tx: Transaction, project: str, job: str, digest: str, manifest: ModelManifest, traceparent: str
) -> Version:
    """Takes the model's next number."""
    row = await tx.one(
        "update model set versions = versions + 1 where (project, model) = (%s, %s) "
        "returning versions as number",
        (project, manifest.model),
    )
    assert row is not None
    await tx.execute(
        "insert into model_version (project, model, number, digest, job, manifest, traceparent, "
        "state) values (%s, %s, %s, %s, %s, %s, %s, 'registered')",
        (
            project,
            manifest.model,
            row["number"],
            digest,
            job,
            Jsonb(msgspec.to_builtins(manifest)),
            traceparent,
        ),
    )
    return Version(row["number"], digest, traceparent)


async def add_evaluation(
    tx: Transaction,
    project: str,
    model: str,
    number: int,
    evaluation: Evaluation,
    checks: list[Check],
) -> None:
    await tx.execute(
        "insert into evaluation (project, model, number, evaluation, passed, checks) "
        "values (%s, %s, %s, %s, %s, %s)",
        (
            project,
            model,
            number,
            Jsonb(msgspec.to_builtins(evaluation)),
            all(one.passed for one in checks),
            Jsonb([asdict(one) for one in checks]),
        ),
    )


async def set_state(tx: Transaction, project: str, model: str, number: int, state: str) -> None:
    await tx.execute(
        "update model_version set state = %s where (project, model, number) = (%s, %s, %s)",
        (state, project, model, number),
    )


async def deployment_row(tx: Transaction, project: str, model: str) -> Row | None:
    return await tx.one(f"{DEPLOYMENTS} where (d.project, d.model) = (%s, %s)", (project, model))


async def deployment_rows(tx: Transaction, project: str) -> list[Row]:
    return await tx.all(f"{DEPLOYMENTS} where d.project = %s order by d.model", (project,))


def deployment_of(row: Row) -> Deployment:
    deployment = Deployment(
        project=row["project"],
        model=row["model"],
        settings=msgspec.convert(row["settings"], Settings),
        state=row["state"],
        generation=row["generation"],
        champion=Version(row["champion"], row["champion_digest"], row["champion_traceparent"]),
        canary=Version(row["canary"], row["canary_digest"], row["canary_traceparent"])
        if row["canary"] is not None
        else None,
    )
    validate(deployment)
    return deployment


async def load_deployment(tx: Transaction, project: str, model: str) -> Deployment:
    """As it is, or not deployed yet, with the settings its pipeline asks for."""
    row = await deployment_row(tx, project, model)
    if row is not None:
        return deployment_of(row)
    latest = await tx.one(
        "select r.spec from pipeline_revision r "
        "join model m on (m.project, m.pipeline, m.model) = (r.project, r.pipeline, r.model) "
        "where (r.project, r.model) = (%s, %s) order by r.revision desc limit 1",
        (project, model),
    )
    assert latest is not None, f"model {model} exists without a pipeline"
    return Deployment(project, model, msgspec.convert(latest["spec"]["deployment"], Settings))


async def save_outcome(tx: Transaction, before: Deployment, outcome: Outcome) -> None:
    """Writes the new desired state with its aliases and version states, and tells of it."""
    after = outcome.deployment
    if after == before:
        assert not outcome.events
        return
    validate(after)
    assert after.generation == before.generation + 1
    assert after.champion is not None
    await tx.execute(
        "insert into deployment (project, model, state, generation, champion, canary, settings) "
        "values (%s, %s, %s, %s, %s, %s, %s) on conflict (project, model) do update set "
        "state = excluded.state, generation = excluded.generation, champion = excluded.champion, "
        "canary = excluded.canary, settings = excluded.settings",
        (
            after.project,
            after.model,
            after.state,
            after.generation,
            after.champion.number,
            after.canary.number if after.canary else None,
            Jsonb(msgspec.to_builtins(after.settings)),
        ),
    )
    for number, state in outcome.states.items():
        await set_state(tx, after.project, after.model, number, state)
    await move_aliases(tx, after, before.aliases)
    for event in outcome.events:
        await tx.emit(event)


async def move_aliases(tx: Transaction, after: Deployment, old: Mapping[str, int]) -> None:
    for alias, number in after.aliases.items():
        await set_alias(tx, after.project, after.model, alias, number)
    for alias in old.keys() - after.aliases.keys():
        await tx.execute(
            "delete from alias where (project, model, alias) = (%s, %s, %s)",
            (after.project, after.model, alias),
        )


async def set_ready(tx: Transaction, project: str, model: str, generation: int) -> None:
    await tx.execute(
        "update deployment set ready_generation = greatest(ready_generation, %s) "
        "where (project, model) = (%s, %s) and generation >= %s",
        (generation, project, model, generation),
    )


async def add_observations(tx: Transaction, event: DeploymentObserved) -> None:
    """Counts only grow, so whatever order they come in, the largest is the newest."""
    for one in event.observations:
        await tx.execute(
            "insert into observation as o (project, model, generation, replica, number, requests, "
            "errors, labelled, correct) values (%s, %s, %s, %s, %s, %s, %s, %s, %s) "
            "on conflict (project, model, generation, replica, number) do update set "
            "requests = greatest(o.requests, excluded.requests), "
            "errors = greatest(o.errors, excluded.errors), "
            "labelled = greatest(o.labelled, excluded.labelled), "
            "correct = greatest(o.correct, excluded.correct)",
            (
                event.project,
                event.model,
                event.generation,
                event.replica,
                one.number,
                one.requests,
                one.errors,
                one.labelled,
                one.correct,
            ),
        )


async def counts(tx: Transaction, project: str, model: str, generation: int) -> dict[int, Counts]:
    """By version, all replicas together."""
    rows = await tx.all(
        "select number, sum(requests)::bigint as requests, sum(errors)::bigint as errors, "
        "sum(labelled)::bigint as labelled, sum(correct)::bigint as correct from observation "
        "where (project, model, generation) = (%s, %s, %s) group by number",
        (project, model, generation),
    )
    return {row.pop("number"): Counts(**row) for row in rows}


async def add_failed_job(
    tx: Transaction, project: str, job: str, reason: str, attempt: int
) -> None:
    await tx.execute(
        "insert into failed_job (project, job, reason, attempt) values (%s, %s, %s, %s) "
        "on conflict do nothing",
        (project, job, reason, attempt),
    )
