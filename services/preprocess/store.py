"""What preprocess keeps in Postgres, and the parts and artifacts it has in S3."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from libs.contracts import pipeline as pipelines
from libs.contracts.artifacts import DatasetManifest, digest_of
from libs.contracts.events import PartLanded, PipelineApplied
from libs.database import Database, Jsonb, Transaction
from libs.objectstore import Corrupt, ObjectStore
from services.preprocess.builder import Built
from services.preprocess.domain import Part, State, landing_order
from services.preprocess.drift import Window

READS_MAX = 8
"""Parts fetched at once."""

MIGRATIONS = (
    """
    create table dataset (
        project text not null, name text not null,
        last_position bigint not null default 0,
        primary key (project, name)
    );
    create table part (
        project text not null, dataset text not null, digest text not null,
        key text not null, rows bigint not null, first_sequence bigint not null,
        position bigint not null,
        traceparent text not null,
        primary key (project, dataset, digest),
        unique (project, dataset, position)
    );
    create table pipeline (
        project text not null, name text not null, revision int not null,
        dataset text not null, model text not null, spec jsonb not null,
        applied_at timestamptz not null default now(),
        checked_position bigint not null default -1,
        checked_revision int not null default 0,
        through_position bigint not null default 0,
        measured_position bigint not null default 0,
        fresh_position bigint not null default 0,
        version_digest text not null default '',
        version_revision int not null default 0,
        learned jsonb not null default '{}',
        wanted text not null default '',
        wanted_position bigint not null default 0,
        wanted_traceparent text not null default '',
        failure text not null default '',
        primary key (project, name)
    );
    create index pipeline_of_dataset on pipeline (project, dataset);
    create index pipeline_of_model on pipeline (project, model);
    create table version (
        project text not null, dataset text not null, number bigint not null,
        digest text not null, rows bigint not null, reason text not null,
        pipeline text not null, revision int not null, traceparent text not null,
        created_at timestamptz not null default now(),
        manifest jsonb not null,
        primary key (project, dataset, number),
        unique (project, dataset, digest)
    );
    create table drift_window (
        project text not null, pipeline text not null, source text not null,
        reference_digest text not null,
        content jsonb not null,
        primary key (project, pipeline, source)
    );
    """,
)


class Version(msgspec.Struct, frozen=True, kw_only=True):
    project: str
    dataset: str
    number: int
    digest: str
    rows: int
    reason: str
    created_at: str
    traceparent: str
    manifest: dict[str, Any]


def state_of(row: dict[str, Any]) -> State:
    fields = {name: row[name] for name in State.__struct_fields__ if name in row}
    spec = msgspec.convert(row["spec"], pipelines.Pipeline)
    return State(**{**fields, "pipeline": row["name"], "spec": spec})


def part_of(row: dict[str, Any]) -> Part:
    return Part(**{name: row[name] for name in Part.__struct_fields__})


def version_of(row: dict[str, Any]) -> Version:
    fields = {name: row[name] for name in Version.__struct_fields__}
    return Version(**{**fields, "created_at": row["created_at"].isoformat()})


async def record_part(tx: Transaction, event: PartLanded, traceparent: str) -> None:
    """Gives the part its position; the row lock makes positions grow with commits."""
    row = await tx.one(
        "insert into dataset (project, name, last_position) values (%s, %s, 0)"
        " on conflict (project, name) do update set last_position = dataset.last_position"
        " returning last_position",
        (event.project, event.dataset),
    )
    assert row is not None
    position = row["last_position"] + 1
    added = await tx.execute(
        "insert into part (project, dataset, digest, key, rows, first_sequence, position,"
        " traceparent) values (%s, %s, %s, %s, %s, %s, %s, %s) on conflict do nothing",
        (
            event.project,
            event.dataset,
            event.digest,
            event.key,
            event.rows,
            event.first_sequence,
            position,
            traceparent,
        ),
    )
    if added.rowcount:
        await tx.execute(
            "update dataset set last_position = %s where project = %s and name = %s",
            (position, event.project, event.dataset),
        )


async def record_pipeline(tx: Transaction, event: PipelineApplied) -> None:
    """The newest revision wins, in whatever order they come."""
    spec = pipelines.convert(event.spec)
    await tx.execute(
        "insert into dataset (project, name) values (%s, %s) on conflict do nothing",
        (event.project, spec.dataset.name),
    )
    await tx.execute(
        "insert into pipeline (project, name, revision, dataset, model, spec)"
        " values (%s, %s, %s, %s, %s, %s) on conflict (project, name) do update set"
        " revision = excluded.revision, dataset = excluded.dataset, model = excluded.model,"
        " spec = excluded.spec, applied_at = now()"
        " where pipeline.revision < excluded.revision",
        (
            event.project,
            event.pipeline,
            event.revision,
            spec.dataset.name,
            spec.deployment.model,
            Jsonb(event.spec),
        ),
    )


class Store:
    """Reads that need no transaction of the caller's, and S3."""

    def __init__(self, db: Database, objects: ObjectStore) -> None:
        self.db = db
        self.objects = objects

    async def unchecked(self) -> list[tuple[str, str, int]]:
        """(project, pipeline, last position) where something came since it was last checked."""
        async with self.db.transaction() as tx:
            rows = await tx.all(
                "select p.project, p.name, d.last_position from pipeline p"
                " join dataset d on d.project = p.project and d.name = p.dataset"
                " where d.last_position > p.checked_position or p.revision > p.checked_revision"
            )
        return [(row["project"], row["name"], row["last_position"]) for row in rows]

    async def mark_checked(self, state: State, position: int, failure: str = "") -> None:
        async with self.db.transaction() as tx:
            await tx.execute(
                "update pipeline set checked_position = %s, checked_revision = %s, failure = %s"
                " where project = %s and name = %s",
                (position, state.revision, failure, state.project, state.pipeline),
            )

    async def state(self, project: str, pipeline: str) -> State:
        async with self.db.transaction() as tx:
            return await locked(tx, project, pipeline)

    async def pipeline_of(
        self, project: str, *, dataset: str = "", model: str = ""
    ) -> State | None:
        """The pipeline applied last for this dataset or this model."""
        async with self.db.transaction() as tx:
            row = await tx.one(
                "select * from pipeline where project = %s and (dataset = %s or model = %s)"
                " order by applied_at desc, name limit 1",
                (project, dataset, model),
            )
        return state_of(row) if row else None

    async def parts(self, state: State, after: int = 0) -> list[Part]:
        """By position."""
        async with self.db.transaction() as tx:
            rows = await tx.all(
                "select * from part where project = %s and dataset = %s and position > %s"
                " order by position",
                (state.project, state.dataset, after),
            )
        return [part_of(row) for row in rows]

    async def payload(self, part: Part) -> bytes:
        """Raises `Corrupt` when the bytes are not those that landed."""
        payload = await self.objects.get(part.key)
        actual = digest_of(payload)
        if actual != part.digest:
            raise Corrupt(f"part {part.key}: {len(payload)} bytes with sha256 {actual}")
        return payload

    async def payloads(self, parts: list[Part]) -> list[tuple[Part, bytes]]:
        """In landing order."""
        ordered = landing_order(parts)
        found: list[tuple[Part, bytes]] = []
        for start in range(0, len(ordered), READS_MAX):
            some = ordered[start : start + READS_MAX]
            found += zip(some, await asyncio.gather(*map(self.payload, some)), strict=True)
        return found

    async def put(self, built: Built) -> None:
        for payload in built.payloads:
            await self.objects.put_blob(payload)

    async def version(self, project: str, dataset: str, number: int) -> Version | None:
        async with self.db.transaction() as tx:
            row = await tx.one(
                "select * from version where project = %s and dataset = %s and number = %s",
                (project, dataset, number),
            )
        return version_of(row) if row else None

    async def versions(self, project: str, dataset: str) -> list[Version]:
        async with self.db.transaction() as tx:
            rows = await tx.all(
                "select * from version where project = %s and dataset = %s order by number",
                (project, dataset),
            )
        return [version_of(row) for row in rows]

    async def manifest(self, state: State) -> DatasetManifest | None:
        """Of the pipeline's newest version."""
        async with self.db.transaction() as tx:
            row = await tx.one(
                "select manifest from version where project = %s and dataset = %s and digest = %s",
                (state.project, state.dataset, state.version_digest),
            )
        return msgspec.convert(row["manifest"], DatasetManifest) if row else None

    @contextlib.asynccontextmanager
    async def exclusive(self, project: str, dataset: str) -> AsyncIterator[None]:
        """One build a dataset, among all replicas; no transaction stays open meanwhile."""
        name = f"preprocess build {project}/{dataset}"
        async with self.db.pool.connection() as connection:
            await connection.execute("select pg_advisory_lock(hashtextextended(%s, 0))", (name,))
            try:
                yield
            finally:
                await connection.execute(
                    "select pg_advisory_unlock(hashtextextended(%s, 0))", (name,)
                )


async def locked(tx: Transaction, project: str, pipeline: str) -> State:
    """The pipeline, which stays as it is until the transaction ends."""
    row = await tx.one(
        "select * from pipeline where project = %s and name = %s for update", (project, pipeline)
    )
    assert row is not None, f"pipelines are never deleted, yet {project}/{pipeline} is gone"
    return state_of(row)


async def insert_version(
    tx: Transaction, state: State, built: Built, reason: str, traceparent: str
) -> Version:
    """The version of this digest: the next number, unless it is there already."""
    await tx.execute(
        "insert into version (project, dataset, number, digest, rows, reason, pipeline, revision,"
        " traceparent, manifest)"
        " select %s, %s, coalesce(max(number), 0) + 1, %s, %s, %s, %s, %s, %s, %s"
        " from version where project = %s and dataset = %s on conflict do nothing",
        (
            state.project,
            state.dataset,
            built.blob.digest,
            built.rows,
            reason,
            state.pipeline,
            state.revision,
            traceparent,
            Jsonb(msgspec.to_builtins(built.manifest)),
            state.project,
            state.dataset,
        ),
    )
    row = await tx.one(
        "select * from version where project = %s and dataset = %s and digest = %s",
        (state.project, state.dataset, built.blob.digest),
    )
    assert row is not None
    return version_of(row)


async def move_to_version(
    tx: Transaction, state: State, built: Built, fresh: int, through: int
) -> None:
    """The pipeline's triggers count from this version on."""
    await tx.execute(
        "update pipeline set version_digest = %s, version_revision = %s, fresh_position = %s,"
        " through_position = %s, measured_position = greatest(measured_position, %s),"
        " learned = %s, failure = '',"
        " wanted = case when wanted_position <= %s then '' else wanted end"
        " where project = %s and name = %s",
        (
            built.blob.digest,
            state.revision,
            fresh,
            through,
            through,
            Jsonb(built.learned),
            through,
            state.project,
            state.pipeline,
        ),
    )


async def want(tx: Transaction, state: State, reason: str, part: Part) -> None:
    await tx.execute(
        "update pipeline set wanted = %s, wanted_position = %s, wanted_traceparent = %s"
        " where project = %s and name = %s",
        (reason, part.position, part.traceparent, state.project, state.pipeline),
    )


async def mark_measured(tx: Transaction, state: State, position: int) -> None:
    await tx.execute(
        "update pipeline set measured_position = %s where project = %s and name = %s",
        (position, state.project, state.pipeline),
    )


async def window(tx: Transaction, state: State, source: str) -> Window:
    """Since the pipeline's newest version; an older version's window counts no more."""
    row = await tx.one(
        "select content from drift_window where project = %s and pipeline = %s and source = %s"
        " and reference_digest = %s",
        (state.project, state.pipeline, source, state.version_digest),
    )
    return msgspec.convert(row["content"], Window) if row else Window()


async def keep_window(tx: Transaction, state: State, source: str, content: Window) -> None:
    await tx.execute(
        "insert into drift_window (project, pipeline, source, reference_digest, content)"
        " values (%s, %s, %s, %s, %s) on conflict (project, pipeline, source) do update set"
        " reference_digest = excluded.reference_digest, content = excluded.content",
        (
            state.project,
            state.pipeline,
            source,
            state.version_digest,
            Jsonb(msgspec.to_builtins(content)),
        ),
    )
