"""What inference remembers in Postgres: assignments, desired state, the request log, tallies."""

from datetime import datetime
from typing import Any

import msgspec
import psycopg

from libs.contracts.events import (
    AttemptPlaced,
    AttemptStopped,
    DeploymentUpdated,
    Observation,
    Target,
)
from libs.database import Transaction
from services.inference import domain

REQUESTS_KEPT_DAYS = 7
"""Of the request log and of labels that wait for their request."""
SERVED_BEFORE_MAX = 10
"""Versions of a model that are looked at when one is quarantined."""

MIGRATIONS = (
    """
    create table assignment (
        project text not null,
        job text not null,
        node text not null,
        attempt int not null,
        token bigint not null,
        model text not null default '',
        stopped boolean not null,
        primary key (project, job, node)
    );
    create table desired (
        project text not null,
        model text not null,
        generation bigint not null,
        deployment bytea not null,
        traceparent text not null,
        primary key (project, model)
    );
    create table request (
        project text not null,
        model text not null,
        request_id text not null,
        number bigint not null,
        generation bigint not null,
        replica text not null,
        inputs json not null,
        outputs json not null,
        traceparent text not null,
        at timestamptz not null,
        label json,
        primary key (project, model, request_id)
    );
    create index request_at on request (at);
    create index request_by_id on request (project, request_id);
    create table feedback (
        project text not null,
        model text not null,
        request_id text not null,
        label json not null,
        at timestamptz not null default now(),
        primary key (project, model, request_id)
    );
    create index feedback_at on feedback (at);
    create table tally (
        project text not null,
        model text not null,
        generation bigint not null,
        number bigint not null,
        replica text not null,
        requests bigint not null default 0,
        errors bigint not null default 0,
        labelled bigint not null default 0,
        correct bigint not null default 0,
        primary key (project, model, generation, number, replica)
    );
    """,
    """
    create table served (
        project text not null,
        model text not null,
        number bigint not null,
        digest text not null,
        traceparent text not null,
        at timestamptz not null default now(),
        primary key (project, model, number)
    );
    create table quarantine (
        project text not null,
        model text not null,
        number bigint not null,
        generation bigint not null,
        reason text not null,
        at timestamptz not null default now(),
        primary key (project, model, number)
    );
    """,
)


class Unstorable(ValueError):
    """A value Postgres cannot hold."""


class Logged(msgspec.Struct, frozen=True):
    """One answered request, as it travels on `requests.<project>.<model>`."""

    request_id: str
    model: str
    number: int
    inputs: dict[str, Any]
    """Column -> nested list; the first dimension is the request's rows."""
    outputs: dict[str, Any]
    at: datetime
    traceparent: str = ""
    generation: int = 0
    replica: str = ""


class Assignment(msgspec.Struct, frozen=True):
    project: str
    job: str
    attempt: int
    token: int
    model: str


async def assign(tx: Transaction, event: AttemptPlaced, model: str) -> bool:
    """False for a placement older than what is known, or already stopped."""
    cursor = await tx.execute(
        "insert into assignment as a (project, job, node, attempt, token, model, stopped) "
        "values (%s, %s, %s, %s, %s, %s, false) on conflict (project, job, node) do update set "
        "attempt = excluded.attempt, token = excluded.token, model = excluded.model, "
        "stopped = false where a.token < excluded.token",
        (event.project, event.job, event.node, event.attempt, event.token, model),
    )
    return cursor.rowcount == 1


async def stop(tx: Transaction, event: AttemptStopped) -> None:
    """The row stays, so that its placement arriving late starts nothing."""
    await tx.execute(
        "insert into assignment as a (project, job, node, attempt, token, stopped) "
        "values (%s, %s, %s, %s, %s, true) on conflict (project, job, node) do update set "
        "token = excluded.token, stopped = true where a.token <= excluded.token",
        (event.project, event.job, event.node, event.attempt, event.token),
    )


async def assignments(tx: Transaction, node: str) -> list[Assignment]:
    rows = await tx.all(
        "select project, job, attempt, token, model from assignment "
        "where node = %s and not stopped order by project, job",
        (node,),
    )
    return [Assignment(**row) for row in rows]


async def desire(tx: Transaction, event: DeploymentUpdated, traceparent: str) -> None:
    """Keeps the newest generation."""
    await tx.execute(
        "insert into desired as d (project, model, generation, deployment, traceparent) "
        "values (%s, %s, %s, %s, %s) on conflict (project, model) do update set "
        "generation = excluded.generation, deployment = excluded.deployment, "
        "traceparent = excluded.traceparent where d.generation < excluded.generation "
        "or (d.generation = excluded.generation and d.traceparent = '')",
        (event.project, event.model, event.generation, msgspec.json.encode(event), traceparent),
    )


async def desired(tx: Transaction) -> list[tuple[DeploymentUpdated, str]]:
    """(deployment, traceparent of its event), of every model."""
    rows = await tx.all("select deployment, traceparent from desired order by project, model")
    return [
        (msgspec.json.decode(row["deployment"], type=DeploymentUpdated), row["traceparent"])
        for row in rows
    ]


async def remember(tx: Transaction, deployment: DeploymentUpdated) -> None:
    """These versions serve: what a later one that is quarantined falls back to."""
    for target in deployment.targets:
        await tx.execute(
            "insert into served (project, model, number, digest, traceparent) "
            "values (%s, %s, %s, %s, %s) on conflict (project, model, number) do update set "
            "digest = excluded.digest, traceparent = excluded.traceparent, at = now()",
            (
                deployment.project,
                deployment.model,
                target.number,
                target.digest,
                target.traceparent,
            ),
        )


async def served_before(tx: Transaction, project: str, model: str) -> list[Target]:
    """Newest first, whatever is served now among them."""
    rows = await tx.all(
        "select number, 100 as percent, digest, traceparent from served "
        "where (project, model) = (%s, %s) order by at desc, number desc limit %s",
        (project, model, SERVED_BEFORE_MAX),
    )
    return [Target(**row) for row in rows]


async def quarantine(
    tx: Transaction, deployment: DeploymentUpdated, number: int, reason: str
) -> None:
    """Until the version is deployed anew."""
    await tx.execute(
        "insert into quarantine (project, model, number, generation, reason) "
        "values (%s, %s, %s, %s, %s) on conflict (project, model, number) do update set "
        "generation = excluded.generation, reason = excluded.reason, at = now()",
        (deployment.project, deployment.model, number, deployment.generation, reason),
    )


async def quarantined(tx: Transaction, deployment: DeploymentUpdated) -> dict[str, str]:
    """Version -> why."""
    rows = await tx.all(
        "select number, reason from quarantine "
        "where (project, model) = (%s, %s) and generation >= %s",
        (deployment.project, deployment.model, deployment.generation),
    )
    return {str(row["number"]): row["reason"] for row in rows}


async def is_deployed(tx: Transaction, project: str, model: str) -> bool:
    found = await tx.one(
        "select 1 as one from desired where (project, model) = (%s, %s)", (project, model)
    )
    return found is not None


async def take_turns(tx: Transaction, project: str, model: str) -> None:
    """Requests and labels of a model are joined one transaction after the other.

    Else a label and its request, written at the same moment, would each miss the other.
    """
    await tx.execute("select pg_advisory_xact_lock(hashtext(%s))", (f"{project}/{model}",))


async def log_requests(tx: Transaction, project: str, model: str, rows: list[Logged]) -> None:
    """Logs each request once, and joins labels that came before it. Raises `Unstorable`.

    Ids are the clients': when one is used again the later answer replaces the earlier. One
    statement for all rows: a statement each cost more than answering the requests did.
    """
    await take_turns(tx, project, model)
    latest = {row.request_id: row for row in sorted(rows, key=lambda row: row.at)}.values()
    cursor = await guarded(
        tx,
        "insert into request as r (project, model, request_id, number, generation, replica, "
        "inputs, outputs, traceparent, at) select %s, %s, u.* from unnest(%s::text[], "
        "%s::bigint[], %s::bigint[], %s::text[], %s::json[], %s::json[], %s::text[], "
        "%s::timestamptz[]) as u "
        "on conflict (project, model, request_id) do update set number = excluded.number, "
        "generation = excluded.generation, replica = excluded.replica, "
        "inputs = excluded.inputs, outputs = excluded.outputs, label = null, "
        "traceparent = excluded.traceparent, at = excluded.at where r.at < excluded.at "
        "returning request_id",
        (
            project,
            model,
            [row.request_id for row in latest],
            [row.number for row in latest],
            [row.generation for row in latest],
            [row.replica for row in latest],
            [as_json(row.inputs) for row in latest],
            [as_json(row.outputs) for row in latest],
            [row.traceparent for row in latest],
            [row.at for row in latest],
        ),
    )
    await join_waiting(tx, project, model, [row["request_id"] async for row in cursor])


async def join_waiting(tx: Transaction, project: str, model: str, request_ids: list[str]) -> None:
    early = await tx.all(
        "delete from feedback where (project, model) = (%s, %s) and request_id = any(%s) "
        "returning request_id, label",
        (project, model, request_ids),
    )
    for row in early:
        await join(tx, project, model, row["request_id"], row["label"])


async def add_label(tx: Transaction, project: str, model: str, request_id: str, label: Any) -> None:
    """The first label of a request counts, once; one that is early waits. Raises `Unstorable`."""
    await take_turns(tx, project, model)
    logged = await guarded(
        tx,
        "select 1 from request where (project, model, request_id) = (%s, %s, %s)",
        (project, model, request_id),
    )
    if await logged.fetchone() is not None:
        await join(tx, project, model, request_id, label)
        return
    await tx.execute(
        "insert into feedback (project, model, request_id, label) values (%s, %s, %s, %s) "
        "on conflict do nothing",
        (project, model, request_id, as_json(label)),
    )


async def join(tx: Transaction, project: str, model: str, request_id: str, label: Any) -> None:
    row = await tx.one(
        "update request set label = %s where (project, model, request_id) = (%s, %s, %s) "
        "and label is null returning number, generation, replica, outputs",
        (as_json(label), project, model, request_id),
    )
    if row is None:
        return
    labelled, correct = domain.judge(label, row["outputs"])
    await tx.execute(
        "insert into tally as t (project, model, generation, number, replica, labelled, correct) "
        "values (%s, %s, %s, %s, %s, %s, %s) on conflict "
        "(project, model, generation, number, replica) do update set "
        "labelled = t.labelled + excluded.labelled, correct = t.correct + excluded.correct",
        (project, model, row["generation"], row["number"], row["replica"], labelled, correct),
    )


async def add_counts(
    tx: Transaction, place: tuple[str, str, int, int, str], requests: int, errors: int
) -> None:
    """`place` is (project, model, generation, number, replica)."""
    await tx.execute(
        "insert into tally as t (project, model, generation, number, replica, requests, errors) "
        "values (%s, %s, %s, %s, %s, %s, %s) on conflict "
        "(project, model, generation, number, replica) do update set "
        "requests = t.requests + excluded.requests, errors = t.errors + excluded.errors",
        (*place, requests, errors),
    )


async def tallies(
    tx: Transaction, deployment: DeploymentUpdated, replica: str | None = None
) -> dict[int, Observation]:
    """By version, of one replica or of all together."""
    rows = await tx.all(
        "select number, sum(requests)::bigint as requests, sum(errors)::bigint as errors, "
        "sum(labelled)::bigint as labelled, sum(correct)::bigint as correct from tally "
        "where (project, model, generation) = (%(project)s, %(model)s, %(generation)s) "
        "and (%(replica)s::text is null or replica = %(replica)s) group by number",
        {
            "project": deployment.project,
            "model": deployment.model,
            "generation": deployment.generation,
            "replica": replica,
        },
    )
    return {row["number"]: Observation(**row) for row in rows}


async def prediction(tx: Transaction, project: str, request_id: str) -> dict[str, Any] | None:
    """The newest answer under that id."""
    return await tx.one(
        "select * from request where (project, request_id) = (%s, %s) order by at desc limit 1",
        (project, request_id),
    )


async def forget_old(tx: Transaction) -> None:
    for query in (
        "delete from request where at < now() - make_interval(days => %s)",
        "delete from feedback where at < now() - make_interval(days => %s)",
    ):
        await tx.execute(query, (REQUESTS_KEPT_DAYS,))


async def guarded(
    tx: Transaction, query: str, parameters: tuple[Any, ...]
) -> psycopg.AsyncCursor[Any]:
    try:
        return await tx.execute(query, parameters)
    except psycopg.DataError as error:
        raise Unstorable(str(error).strip()) from error


def as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
