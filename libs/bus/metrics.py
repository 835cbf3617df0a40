"""What consumers do, and what waits for them, as Prometheus reads it at `/metrics`."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from time import perf_counter

from prometheus_client import Counter, Gauge, Histogram

from libs.bus import Delivery, Stream, Subscription

log = logging.getLogger(__name__)
POLL_S = 5.0
HANDLED, RETRIED, DEAD_LETTERED = "handled", "retried", "dead_lettered"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
WHAT = ["consumer", "type"]
PLACE = ["stream", "consumer"]
MESSAGES = Counter(
    "leptonic_consumer_messages", "Deliveries taken, by how that ended", [*WHAT, "outcome"]
)
REDELIVERIES = Counter(
    "leptonic_consumer_redeliveries", "Deliveries of a message that was delivered before", WHAT
)
DURATION = Histogram(
    "leptonic_consumer_seconds",
    "From taken to settled, of a message or a batch",
    WHAT,
    buckets=SECONDS,
)
WAITING = Gauge("leptonic_consumer_waiting_messages", "Not yet delivered: the lag", PLACE)
UNACKED = Gauge("leptonic_consumer_unacked_messages", "Delivered and not yet acked", PLACE)


def type_of(subject: str) -> str:
    """`job.requested` of an event, else the first word: `records`, `requests`, `feedback`."""
    first, *others = subject.split(".")
    return ".".join(others[1:3]) if first == "events" else first


def settled(consumer: str, outcome: str, deliveries: Sequence[Delivery], began: float) -> None:
    """Counts deliveries of one type; `began`: of `perf_counter`."""
    if not deliveries:
        return
    what = (consumer, type_of(deliveries[0].subject))
    MESSAGES.labels(*what, outcome).inc(len(deliveries))
    REDELIVERIES.labels(*what).inc(sum(one.deliveries > 1 for one in deliveries))
    DURATION.labels(*what).observe(perf_counter() - began)


@contextlib.asynccontextmanager
async def watched(subscription: Subscription, stream: Stream, consumer: str) -> AsyncIterator[None]:
    """Keeps what waits for a consumer up to date, for as long as the block lasts."""
    task = asyncio.create_task(watch(subscription, stream, consumer))
    try:
        yield
    finally:
        task.cancel()


async def watch(subscription: Subscription, stream: Stream, consumer: str) -> None:
    waiting, unacked = WAITING.labels(stream.name, consumer), UNACKED.labels(stream.name, consumer)
    while True:
        try:
            backlog = await subscription.backlog()
        except OSError as error:
            log.warning("lag of %s: %s", consumer, error)
        else:
            waiting.set(backlog.waiting)
            unacked.set(backlog.unacked)
        await asyncio.sleep(POLL_S)
