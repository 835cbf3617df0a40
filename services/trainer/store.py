"""The trainer's tables, and its checkpoints' keys in object storage."""

from typing import Any

import msgspec
from psycopg.rows import DictRow

from libs.contracts.events import AttemptPlaced, AttemptStopped
from libs.database import Jsonb, Transaction
from libs.objectstore import ObjectStore
from services.trainer.domain import Progress, Version

MIGRATIONS = (
    """
    create table pipeline (
        project text not null,
        pipeline text not null,
        revision int not null,
        spec jsonb not null,
        primary key (project, pipeline, revision)
    );
    create table version (
        project text not null,
        pipeline text not null,
        revision int not null,
        digest text not null,
        dataset text not null,
        number int not null,
        rows bigint not null,
        traceparent text not null,
        requested bool not null default false,
        primary key (project, pipeline, revision, digest)
    );
    create table attempt (
        project text not null,
        job text not null,
        attempt int not null,
        token bigint not null,
        node text not null,
        state text not null,
        spec jsonb not null default '{}',
        reason text not null default '',
        result jsonb not null default '{}',
        placed_at timestamptz not null default now(),
        primary key (project, job, attempt)
    );
    create index attempt_by_time on attempt (project, placed_at desc);
    create table epoch (
        project text not null,
        job text not null,
        epoch int not null,
        attempt int not null,
        metrics jsonb not null,
        primary key (project, job, epoch)
    );
    """,
)
RUNS_MAX = 200


async def put_pipeline(
    tx: Transaction, project: str, pipeline: str, revision: int, spec: dict[str, Any]
) -> None:
    await tx.execute(
        "insert into pipeline values (%s, %s, %s, %s) on conflict do nothing",
        (project, pipeline, revision, Jsonb(spec)),
    )


async def put_version(tx: Transaction, version: Version, traceparent: str) -> None:
    await tx.execute(
        """insert into version (project, pipeline, revision, digest, dataset, number, rows,
           traceparent) values (%s, %s, %s, %s, %s, %s, %s, %s) on conflict do nothing""",
        (
            version.project,
            version.pipeline,
            version.revision,
            version.digest,
            version.dataset,
            version.number,
            version.rows,
            traceparent,
        ),
    )


async def take_unrequested(
    tx: Transaction, project: str, pipeline: str, revision: int
) -> list[tuple[Version, dict[str, Any], str]]:
    """(version, pipeline spec, traceparent) of those whose job nobody has asked for, now asked."""
    rows = await tx.all(
        """update version v set requested = true from pipeline p
           where (v.project, v.pipeline, v.revision) = (p.project, p.pipeline, p.revision)
           and (v.project, v.pipeline, v.revision) = (%s, %s, %s) and not v.requested
           returning v.*, p.spec""",
        (project, pipeline, revision),
    )
    ordered = sorted(rows, key=lambda row: row["number"])
    return [(msgspec.convert(row, Version), row["spec"], row["traceparent"]) for row in ordered]


async def place(tx: Transaction, placed: AttemptPlaced) -> bool:
    """False for an attempt that was stopped already, or overtaken by a newer one."""
    newer = await tx.one(
        "select 1 from attempt where (project, job) = (%s, %s) and token > %s",
        (placed.project, placed.job, placed.token),
    )
    if newer is not None:
        return False
    await tx.execute(
        """update attempt set state = 'stopped'
           where (project, job) = (%s, %s) and state = 'running'""",
        (placed.project, placed.job),
    )
    cursor = await tx.execute(
        """insert into attempt (project, job, attempt, token, node, state, spec)
           values (%s, %s, %s, %s, %s, 'running', %s) on conflict do nothing""",
        (
            placed.project,
            placed.job,
            placed.attempt,
            placed.token,
            placed.node,
            Jsonb(placed.spec),
        ),
    )
    return cursor.rowcount == 1


async def stop(tx: Transaction, stopped: AttemptStopped) -> None:
    """Also notes the end of an attempt whose beginning has not come yet."""
    await tx.execute(
        """insert into attempt (project, job, attempt, token, node, state, reason)
           values (%s, %s, %s, %s, %s, 'stopped', %s)
           on conflict (project, job, attempt) do update
           set state = 'stopped', reason = excluded.reason where attempt.state = 'running'""",
        (
            stopped.project,
            stopped.job,
            stopped.attempt,
            stopped.token,
            stopped.node,
            stopped.reason,
        ),
    )


async def settle(
    tx: Transaction, placed: AttemptPlaced, state: str, reason: str, result: dict[str, Any]
) -> bool:
    """True for the one who ends the attempt; False when it was ended otherwise."""
    cursor = await tx.execute(
        """update attempt set state = %s, reason = %s, result = %s
           where (project, job, attempt) = (%s, %s, %s) and state = 'running'""",
        (state, reason, Jsonb(result), placed.project, placed.job, placed.attempt),
    )
    return cursor.rowcount == 1


async def lose_all(tx: Transaction, node: str) -> None:
    """What ran here before this process started runs no more; the scheduler places it again."""
    await tx.execute(
        "update attempt set state = 'lost' where node = %s and state = 'running'", (node,)
    )


async def put_epoch(tx: Transaction, placed: AttemptPlaced, progress: Progress) -> bool:
    """False when it was known: an epoch done again after a resume gives the same numbers."""
    cursor = await tx.execute(
        "insert into epoch values (%s, %s, %s, %s, %s) on conflict do nothing",
        (placed.project, placed.job, progress.epoch, placed.attempt, Jsonb(progress.metrics)),
    )
    return cursor.rowcount == 1


async def run_rows(tx: Transaction, project: str) -> list[DictRow]:
    """The last attempt of every job, newest first; not what was ended before it was placed, nor
    what another agent of the node ran."""
    return await tx.all(
        """select * from (select distinct on (job) * from attempt
           where project = %s and not (state = 'stopped' and spec = '{}')
           order by job, token desc) one order by placed_at desc limit %s""",
        (project, RUNS_MAX),
    )


async def run_row(tx: Transaction, project: str, job: str) -> DictRow | None:
    return await tx.one(
        """select * from attempt where (project, job) = (%s, %s)
           and not (state = 'stopped' and spec = '{}') order by token desc limit 1""",
        (project, job),
    )


async def epoch_rows(tx: Transaction, project: str, jobs: list[str]) -> list[DictRow]:
    return await tx.all(
        "select * from epoch where project = %s and job = any(%s) order by job, epoch",
        (project, jobs),
    )


async def delete_under(objects: ObjectStore, prefix: str) -> None:
    for key in await objects.list(prefix):
        await objects.delete(key)
