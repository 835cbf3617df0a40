"""The bus loop: takes deliveries, runs handlers, acks what took effect.

This is the one place with a broad `except`: what a handler could not do is tried again later, or
dead-lettered with its reason and its trace. A handler acks nothing itself; it must be idempotent,
because a crash between its effect and the ack brings the message again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from time import perf_counter
from typing import Any

import msgspec

from libs import telemetry
from libs.bus import EVENTS, ID_HEADER, TRACE_HEADER, Bus, Delivery, Subscription, metrics
from libs.bus.metrics import DEAD_LETTERED, HANDLED, RETRIED
from libs.contracts.envelope import UnknownType, decode
from libs.contracts.events import Event

log = logging.getLogger(__name__)
ATTEMPTS_MAX = 5
UNKNOWN_DELIVERIES_MAX = 20
"""Some three minutes: while a service is replaced, the newer process shares the consumer, and takes
what the older one does not know."""
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 10.0
FETCH_MAX = 64
FETCH_TIMEOUT_S = 1.0
ACK_WAIT_S = 4.0
"""After a kill, what was in work comes back this late; what is in work is kept alive thrice as
often."""


class Meta(msgspec.Struct, frozen=True):
    """What a handler may know about an event's way here."""

    id: str
    traceparent: str
    """Where the event was emitted; the handler's own span is current and its child."""
    time: str
    sequence: int


Handler = Callable[[Any, Meta, Any], Awaitable[None]]
"""`async def on_...(event, meta, context)`; the context is the service's own."""
Handlers = Mapping[type[Event], Handler]


def subjects_of(handlers: Handlers) -> list[str]:
    """The subjects a table of handlers needs, for every project."""
    return [f"events.*.{kind.entity}.{kind.verb}" for kind in handlers]


def backoff_s(deliveries: int) -> float:
    """0.5, 1, 2, 4, 8, 10, 10, ... seconds."""
    return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** (min(deliveries, 16) - 1)))


async def run(
    bus: Bus,
    service: str,
    handlers: Handlers,
    context: Any,
    transient: tuple[type[Exception], ...] = (OSError,),
    *,
    together: bool = False,
) -> None:
    """Handles events one after the other until cancelled.

    An error in `transient` is tried again for as long as it lasts; any other is tried
    `ATTEMPTS_MAX` times and then dead-lettered under `dlq.events.<service>`.

    `together`: those of one fetch begin in order, and none waits for the one before to end; for
    handlers that keep the order themselves and commit as a group.
    """
    subscription = await bus.subscribe(EVENTS, service, subjects_of(handlers), ACK_WAIT_S)
    async with metrics.watched(subscription, EVENTS, service):
        while True:
            await run_once(
                bus, subscription, service, handlers, context, transient, together=together
            )


async def run_once(
    bus: Bus,
    subscription: Subscription,
    service: str,
    handlers: Handlers,
    context: Any,
    transient: tuple[type[Exception], ...] = (OSError,),
    *,
    together: bool = False,
) -> int:
    """One fetch; returns how many deliveries it saw."""

    async def settle(delivery: Delivery) -> None:
        began = perf_counter()
        outcome = await take(bus, delivery, service, handlers, context, transient)
        metrics.settled(service, outcome, [delivery], began)

    deliveries = await subscription.fetch(FETCH_MAX, FETCH_TIMEOUT_S)
    async with kept_alive(deliveries):
        if together:
            await asyncio.gather(*(settle(delivery) for delivery in deliveries))
        else:
            for delivery in deliveries:
                await settle(delivery)
    return len(deliveries)


async def take(
    bus: Bus,
    delivery: Delivery,
    service: str,
    handlers: Handlers,
    context: Any,
    transient: tuple[type[Exception], ...],
) -> str:
    """Returns the outcome, for `metrics.settled`."""
    try:
        envelope, event = decode(delivery.payload)
        if type(event) not in handlers:
            raise UnknownType(f"{service} does not handle {envelope.type}")
    except msgspec.DecodeError as error:
        if isinstance(error, UnknownType) and delivery.deliveries < UNKNOWN_DELIVERIES_MAX:
            await delivery.nak(backoff_s(delivery.deliveries))
            return RETRIED
        await dead_letter(bus, delivery, f"dlq.events.{service}", f"not an event: {error}")
        await delivery.ack()
        return DEAD_LETTERED
    handler = handlers[type(event)]
    meta = Meta(envelope.id, envelope.traceparent, envelope.time, delivery.sequence)
    with telemetry.span(
        f"{service} {event.entity}.{event.verb}",
        kind=telemetry.SpanKind.CONSUMER,
        parent=envelope.traceparent,
        attributes={
            "messaging.system": "nats",
            "messaging.destination.name": delivery.subject,
            "messaging.message.id": envelope.id,
            "messaging.nats.deliveries": delivery.deliveries,
        },
    ) as span:
        try:
            await handler(event, meta, context)
        except Exception as error:
            span.record_exception(error)
            telemetry.mark_failed(span, str(error))
            if isinstance(error, transient) or delivery.deliveries < ATTEMPTS_MAX:
                log.warning("%s: %s; again later", delivery.subject, error, exc_info=error)
                await delivery.nak(backoff_s(delivery.deliveries))
                return RETRIED
            log.exception("%s: dead-lettered", delivery.subject)
            reason = f"{type(error).__name__}: {error}"
            await dead_letter(bus, delivery, f"dlq.events.{service}", reason)
            await delivery.ack()
            return DEAD_LETTERED
        await delivery.ack()
        log.info("%s, delivery %d", delivery.subject, delivery.deliveries)
        return HANDLED


async def dead_letter(
    bus: Bus,
    delivery: Delivery,
    subject: str,
    reason: str,
    *,
    payload: bytes | None = None,
    part: int = 0,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Keeps what could not be handled, with its reason and its trace, exactly once.

    `payload` and `part` name one record of a message that holds several.
    """
    kept = {
        "Leptonic-Reason": " ".join(reason.split())[:1000],
        "Leptonic-Subject": delivery.subject,
        "Leptonic-Sequence": str(delivery.sequence),
        TRACE_HEADER: telemetry.current() or delivery.headers.get(TRACE_HEADER, ""),
        **(headers or {}),
    }
    if ID_HEADER in delivery.headers:
        kept["Leptonic-Msg-Id"] = delivery.headers[ID_HEADER]
    letter = f"{subject}:{delivery.sequence}:{part}"
    await bus.publish(
        subject, delivery.payload if payload is None else payload, id=letter, headers=kept
    )


@contextlib.asynccontextmanager
async def kept_alive(deliveries: list[Delivery], ack_wait_s: float = ACK_WAIT_S) -> Any:
    """Tells the broker that these are being worked on, for as long as the block lasts."""

    async def beat() -> None:
        while True:
            await asyncio.sleep(ack_wait_s / 3)
            for delivery in deliveries:
                await delivery.in_progress()

    task = asyncio.create_task(beat())
    try:
        yield
    finally:
        task.cancel()
