"""Drift of what is asked: the request log, measured like landed records.

A message on `requests.<project>.<model>` is a JSON array of logged requests, each with its
`inputs`, column -> value or values. Requests bring no labels, so a drift among them is told
(`DriftDetected(source="requests")`) and builds nothing.
"""

import asyncio
import logging
import math
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from libs import telemetry
from libs.bus import ID_HEADER, REQUESTS, TRACE_HEADER, Bus, Delivery, metrics
from libs.bus.loop import (
    ACK_WAIT_S,
    FETCH_MAX,
    FETCH_TIMEOUT_S,
    backoff_s,
    dead_letter,
    kept_alive,
)
from libs.contracts.artifacts import DatasetManifest
from libs.contracts.pipeline import Field
from libs.database import TRANSIENT
from services.preprocess import drift, store
from services.preprocess.domain import State
from services.preprocess.handlers import Context
from services.preprocess.table import DTYPES, Column, Unusable, column_from_values
from services.preprocess.worker import observe

log = logging.getLogger(__name__)
SOURCE = "requests"
DURABLE = "preprocess-requests"
DEAD_LETTERS = "dlq.requests.preprocess"


class Logged(msgspec.Struct, frozen=True):
    inputs: dict[str, Any]


async def run(bus: Bus, context: Context) -> None:
    """Until cancelled."""
    subscription = await bus.subscribe(REQUESTS, DURABLE, ["requests.>"], ACK_WAIT_S)
    async with metrics.watched(subscription, REQUESTS, DURABLE):
        while True:
            deliveries = await subscription.fetch(FETCH_MAX, FETCH_TIMEOUT_S)
            async with kept_alive(deliveries):
                for delivery in deliveries:
                    await take(bus, delivery, context)


async def take(bus: Bus, delivery: Delivery, context: Context) -> None:
    began, outcome = perf_counter(), metrics.HANDLED
    try:
        try:
            await on_requests(delivery, context)
        except (msgspec.DecodeError, Unusable) as error:
            await dead_letter(bus, delivery, DEAD_LETTERS, str(error))
            outcome = metrics.DEAD_LETTERED
        await delivery.ack()
    except TRANSIENT as error:
        log.warning("%s: %s; again later", delivery.subject, error)
        await delivery.nak(backoff_s(delivery.deliveries))
        outcome = metrics.RETRIED
    metrics.settled(DURABLE, outcome, [delivery], began)


async def on_requests(delivery: Delivery, context: Context) -> None:
    """Adds the message's rows to the window, once."""
    logged = msgspec.json.decode(delivery.payload, type=list[Logged])
    _, project, model = delivery.subject.split(".", 2)
    state = await context.store.pipeline_of(project, model=model)
    manifest = await context.store.manifest(state) if state else None
    if state is None or manifest is None or not logged:
        return
    rows, counts = await asyncio.to_thread(count_requests, logged, manifest)
    parent = delivery.headers.get(TRACE_HEADER, "")
    with telemetry.span("preprocess requests", parent=parent):
        await add(context, state, manifest, rows, counts, id_of(delivery))


async def add(
    context: Context,
    state: State,
    manifest: DatasetManifest,
    rows: int,
    counts: drift.Counts,
    message_id: str,
) -> None:
    async with context.store.db.transaction() as tx:
        now = await store.locked(tx, state.project, state.pipeline)
        if now.version_digest != state.version_digest:
            return  # asked before the newest version, and not cut into its cells
        if await tx.first_time(message_id):
            await observe(tx, now, manifest, SOURCE, rows, counts)


def id_of(delivery: Delivery) -> str:
    return f"requests:{delivery.headers.get(ID_HEADER, delivery.sequence)}"


def count_requests(logged: list[Logged], manifest: DatasetManifest) -> tuple[int, drift.Counts]:
    features = {n: field for n, field in manifest.schema.items() if field.role == "feature"}
    columns = {
        name: column_from_requests(name, [one.inputs.get(name) for one in logged], field)
        for name, field in features.items()
    }
    reference = drift.references(manifest.statistics, features)
    rows = min(len(column.valid) for column in columns.values())
    return rows, drift.count(columns, features, reference)


def column_from_requests(name: str, values: list[Any], field: Field) -> Column:
    """One request's value may be one record or a batch of them. Raises `Unusable`."""
    try:
        arrays = [np.asarray(value, DTYPES[field.type]).reshape(-1) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise Unusable(name, f"logged inputs that are not {field.type}: {error}") from error
    flat = np.concatenate(arrays)
    if len(flat) % math.prod(field.shape):
        raise Unusable(name, f"{len(flat)} logged values for records of {field.shape}")
    return column_from_values(flat.reshape(-1, *field.shape), field)
