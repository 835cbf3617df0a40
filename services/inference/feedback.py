"""The request log and the labels, taken from the bus and joined in Postgres."""

import logging
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

import msgspec

from libs import telemetry
from libs.bus import FEEDBACK, REQUESTS, TRACE_HEADER, Bus, Delivery, Stream, metrics
from libs.bus.loop import ACK_WAIT_S, backoff_s, dead_letter, kept_alive
from libs.database import TRANSIENT, Database
from services.inference import domain, store

log = logging.getLogger(__name__)
FETCH_MAX = 64
FETCH_TIMEOUT_S = 1.0
Keep = Callable[[Database, str, str, Delivery], Awaitable[None]]
"""`async def (db, project, model, delivery)`; raises `Refused` for what can never be kept."""


class Refused(ValueError):
    """A message that will not get better by trying again."""


class Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One feedback, as it travels on `feedback.<project>.<model>`."""

    request_id: str
    label: Any


async def consume_requests(bus: Bus, db: Database) -> None:
    await consume(bus, db, REQUESTS, "inference-requests", keep_requests)


async def consume_feedback(bus: Bus, db: Database) -> None:
    await consume(bus, db, FEEDBACK, "inference-feedback", keep_label)


async def consume(bus: Bus, db: Database, stream: Stream, durable: str, keep: Keep) -> None:
    """Until cancelled. All replicas share the consumer."""
    subscription = await bus.subscribe(stream, durable, list(stream.subjects), ACK_WAIT_S)
    async with metrics.watched(subscription, stream, durable):
        while True:
            deliveries = await subscription.fetch(FETCH_MAX, FETCH_TIMEOUT_S)
            async with kept_alive(deliveries):
                for delivery in deliveries:
                    began = perf_counter()
                    outcome = await take(bus, db, delivery, keep)
                    metrics.settled(durable, outcome, [delivery], began)


async def take(bus: Bus, db: Database, delivery: Delivery, keep: Keep) -> str:
    """Returns the outcome, for `metrics.settled`."""
    outcome = metrics.HANDLED
    try:
        try:
            project, model = place_of(delivery.subject)
            await keep(db, project, model, delivery)
        except Refused as error:
            log.warning("%s: %s", delivery.subject, error)
            await dead_letter(bus, delivery, f"dlq.{delivery.subject}", str(error))
            outcome = metrics.DEAD_LETTERED
    except TRANSIENT as error:
        log.warning("%s: %s; again later", delivery.subject, error)
        await delivery.nak(backoff_s(delivery.deliveries))
        return metrics.RETRIED
    await delivery.ack()
    return outcome


def place_of(subject: str) -> tuple[str, str]:
    parts = subject.split(".")
    if len(parts) != 3:
        raise Refused(f"subject {subject}: expected {parts[0]}.<project>.<model>")
    return parts[1], parts[2]


async def keep_requests(db: Database, project: str, model: str, delivery: Delivery) -> None:
    try:
        rows = msgspec.json.decode(delivery.payload, type=list[store.Logged])
        async with db.transaction() as tx:
            await store.log_requests(tx, project, model, rows)
    except (msgspec.DecodeError, store.Unstorable) as error:
        raise Refused(f"not a request log: {error}") from error


async def keep_label(db: Database, project: str, model: str, delivery: Delivery) -> None:
    """In a span of its own, a child of whoever sent the label."""
    with telemetry.span(
        f"feedback {model}",
        kind=telemetry.SpanKind.CONSUMER,
        parent=delivery.headers.get(TRACE_HEADER, ""),
    ) as span:
        feedback = label_of(delivery.payload)
        span.set_attribute("leptonic.request_id", feedback.request_id)
        try:
            async with db.transaction() as tx:
                if not await store.is_deployed(tx, project, model):
                    raise Refused(f"Request for unknown model: '{model}' is not found")
                await store.add_label(tx, project, model, feedback.request_id, feedback.label)
        except store.Unstorable as error:
            raise Refused(f"request_id: {error}") from error


def label_of(payload: bytes) -> Label:
    try:
        feedback = msgspec.json.decode(payload, type=Label)
    except msgspec.DecodeError as error:
        raise Refused(f"not a feedback: {error}") from error
    problem = domain.problem_of(feedback.request_id, feedback.label)
    if problem:
        raise Refused(problem)
    return feedback
