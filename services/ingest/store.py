"""Which datasets there are, which messages have landed, and the manifest of every part."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from libs import telemetry
from libs.bus import RECORDS
from libs.contracts.events import PartLanded
from libs.contracts.pipeline import Field, Pipeline
from libs.database import Database, Transaction
from services.ingest.domain import Place

LANDED_KEPT_S = RECORDS.age_max_s + 86_400
"""A message older than its stream's oldest cannot be delivered again."""

MIGRATIONS = (
    """
    create table dataset (
        project text not null,
        dataset text not null,
        pipeline text not null,
        revision bigint not null,
        schema text not null, -- JSON; its key order is the order of the columns
        rows bigint not null default 0,
        parts bigint not null default 0,
        duplicates bigint not null default 0,
        dead_letters bigint not null default 0,
        primary key (project, dataset)
    );
    create table part (
        project text not null,
        dataset text not null,
        number bigint not null,
        digest text not null,
        key text not null,
        rows bigint not null,
        size_bytes bigint not null,
        first_sequence bigint not null,
        last_sequence bigint not null,
        traceparent text not null,
        landed_at timestamptz not null default now(),
        primary key (project, dataset, number)
    );
    create table landed (
        sequence bigint not null,
        stored_at_ns bigint not null,
        project text not null,
        dataset text not null,
        msg_id text, -- null for none, and for a duplicate
        at timestamptz not null default now(),
        primary key (sequence, stored_at_ns),
        unique (project, dataset, msg_id)
    );
    create index landed_at on landed (at);
    """,
)


class Raced(Exception):
    """Another landing has taken some of these messages since they were looked up."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A Parquet part that is in object storage."""

    digest: str
    key: str
    rows: int
    size_bytes: int
    first_sequence: int
    last_sequence: int


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one landing changes; all of it or nothing."""

    place: Place
    fresh: Sequence[tuple[int, int]]
    """(sequence, stored_at_ns) of the messages that take effect here."""
    ids: Sequence[str | None]
    """The message id of each, None for none."""
    duplicates: Sequence[tuple[int, int]]
    dead_letters: int
    part: Part | None
    """None when no record of the messages was good."""


class Seen(msgspec.Struct, frozen=True):
    """What is known about some messages of a dataset."""

    schema: bytes | None
    """JSON of the dataset's schema; None for an unknown dataset."""
    landed: set[tuple[int, int]]
    ids: set[str]


async def apply_pipeline(tx: Transaction, project: str, pipeline: Pipeline, revision: int) -> None:
    """New records are checked against the newest revision's schema; parts stay as they are."""
    await tx.execute(
        """
        insert into dataset (project, dataset, pipeline, revision, schema)
        values (%s, %s, %s, %s, %s)
        on conflict (project, dataset) do update
            set pipeline = excluded.pipeline,
                revision = excluded.revision,
                schema = excluded.schema
            where dataset.pipeline <> excluded.pipeline or dataset.revision <= excluded.revision
        """,
        (
            project,
            pipeline.dataset.name,
            pipeline.pipeline,
            revision,
            msgspec.json.encode(pipeline.dataset.schema).decode(),
        ),
    )


async def look(db: Database, place: Place, messages: Mapping[tuple[int, int], str]) -> Seen:
    """`messages`: (sequence, stored_at_ns) -> message id, "" for none."""
    ids = [msg_id for msg_id in messages.values() if msg_id]
    known: list[dict[str, Any]] = []
    async with db.transaction() as tx:
        schema = await schema_of(tx, place)
        landed = await tx.all(
            "select sequence, stored_at_ns from landed where sequence = any(%s)",
            ([sequence for sequence, _ in messages],),
        )
        if ids:
            known = await tx.all(
                "select msg_id from landed"
                " where project = %s and dataset = %s and msg_id = any(%s)",
                (place.project, place.dataset, ids),
            )
    return Seen(
        schema,
        {(row["sequence"], row["stored_at_ns"]) for row in landed},
        {row["msg_id"] for row in known},
    )


async def schema_of(tx: Transaction, place: Place) -> bytes | None:
    row = await tx.one(
        "select schema from dataset where project = %s and dataset = %s",
        (place.project, place.dataset),
    )
    return row["schema"].encode() if row else None


async def commit(db: Database, claim: Claim) -> None:
    """Claims the messages, counts, records the part and emits its news. Raises `Raced`."""
    place, part = claim.place, claim.part
    async with db.transaction() as tx:
        await take(tx, claim)
        row = await tx.one(
            """
            update dataset set rows = rows + %s, parts = parts + %s,
                duplicates = duplicates + %s, dead_letters = dead_letters + %s
            where project = %s and dataset = %s returning parts
            """,
            (
                part.rows if part else 0,
                1 if part else 0,
                len(claim.duplicates),
                claim.dead_letters,
                place.project,
                place.dataset,
            ),
        )
        assert row is not None, f"dataset {place} was there when its schema was read"
        if part:
            await record(tx, place, row["parts"], part)


async def take(tx: Transaction, claim: Claim) -> None:
    keys = [*claim.fresh, *claim.duplicates]
    cursor = await tx.execute(
        """
        insert into landed (sequence, stored_at_ns, project, dataset, msg_id)
        select sequence, stored_at_ns, %s, %s, msg_id
        from unnest(%s::bigint[], %s::bigint[], %s::text[]) as m (sequence, stored_at_ns, msg_id)
        order by sequence
        on conflict do nothing
        """,
        (
            claim.place.project,
            claim.place.dataset,
            [sequence for sequence, _ in keys],
            [stored_at_ns for _, stored_at_ns in keys],
            [*claim.ids, *[None for _ in claim.duplicates]],
        ),
    )
    if cursor.rowcount != len(keys):
        raise Raced(f"{claim.place.subject}: {len(keys) - cursor.rowcount} landed elsewhere")


async def record(tx: Transaction, place: Place, number: int, part: Part) -> None:
    traceparent = telemetry.current()
    await tx.execute(
        """
        insert into part (project, dataset, number, digest, key, rows, size_bytes,
            first_sequence, last_sequence, traceparent)
        values (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
        """,
        (place.project, place.dataset, number, *msgspec.structs.astuple(part), traceparent),
    )
    await tx.emit(
        PartLanded(project=place.project, dataset=place.dataset, **msgspec.structs.asdict(part)),
        traceparent,
    )


async def forget_old(db: Database) -> None:
    """Drops claims that no delivery can ask for any more."""
    async with db.transaction() as tx:
        await tx.execute(
            "delete from landed where at < now() - make_interval(secs => %s)", (LANDED_KEPT_S,)
        )


async def datasets(db: Database, project: str) -> list[dict[str, Any]]:
    async with db.transaction() as tx:
        return await tx.all("select * from dataset where project = %s order by dataset", (project,))


async def dataset(db: Database, place: Place) -> dict[str, Any] | None:
    async with db.transaction() as tx:
        return await tx.one(
            "select * from dataset where project = %s and dataset = %s",
            (place.project, place.dataset),
        )


async def parts(db: Database, place: Place, after: int, limit: int) -> list[dict[str, Any]]:
    async with db.transaction() as tx:
        return await tx.all(
            """
            select * from part where project = %s and dataset = %s and number > %s
            order by number limit %s
            """,
            (place.project, place.dataset, after, limit),
        )


def fields_of(schema: str) -> dict[str, Field]:
    return msgspec.json.decode(schema, type=dict[str, Field])
