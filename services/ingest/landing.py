"""Messages of RECORDS -> Parquet parts: each lands once, whatever is killed and whenever.

Per dataset of a batch: write the part under its digest, then in one transaction claim the
messages, record the part and emit its news, and only then ack. A crash at any point brings the
messages again; those whose claim committed are acked without another effect.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic, perf_counter
from typing import TypeVar

import pyarrow as pa

from libs import telemetry
from libs.bus import (
    ID_HEADER,
    PAYLOAD_BYTES_MAX,
    RECORDS,
    TRACE_HEADER,
    Bus,
    Delivery,
    Subscription,
    metrics,
)
from libs.bus.loop import ACK_WAIT_S, backoff_s, dead_letter, kept_alive
from libs.contracts.artifacts import digest_of
from libs.database import TRANSIENT, Database
from libs.objectstore import ObjectStore
from services.ingest import domain, meters, store
from services.ingest.domain import Place, Problem, Refused
from services.ingest.layout import Accepted, Layout, assemble, layout_of
from services.ingest.records import Unreadable, from_json
from services.ingest.tables import from_arrow, is_arrow, parquet_bytes

log = logging.getLogger(__name__)
T = TypeVar("T")
CONSUMER = "ingest"
LANES = 2
"""Batches in work at once: one computes while another waits for S3 or Postgres."""
FETCH_TIMEOUT_S = 1.0
FETCH_TIMEOUT_MIN_S = 0.001
LINGER_S = 0.05
DEAD_LETTERS_AT_ONCE = 64
DEAD_LETTER_BYTES_MAX = PAYLOAD_BYTES_MAX - (64 << 10)
"""Leaves room for the reason within the server's payload limit."""
UNKNOWN_DELAY_S = 1.0
UNKNOWN_DELIVERIES_MAX = 5
"""A record may overtake the event of the pipeline that declares its dataset."""
FORGET_S = 3600.0
DRAIN_S = 8.0


class Landing:
    """Runs until cancelled, or until `drain`."""

    def __init__(self, bus: Bus, db: Database, objects: ObjectStore) -> None:
        self.bus = bus
        self.db = db
        self.objects = objects
        self.retrying = 0
        """Actions that wait for a dependency to come back."""
        self.unknown_deliveries_max = UNKNOWN_DELIVERIES_MAX
        self.largest_bytes = PAYLOAD_BYTES_MAX
        self.fetching = asyncio.Lock()
        self.draining = False
        self.ended = asyncio.Event()

    async def run(self) -> None:
        subscription = await self.bus.subscribe(RECORDS, CONSUMER, ["records.>"], ACK_WAIT_S)
        async with asyncio.TaskGroup() as group, metrics.watched(subscription, RECORDS, CONSUMER):
            chore = group.create_task(self.forget())
            async with asyncio.TaskGroup() as lanes:
                for _ in range(LANES):
                    lanes.create_task(self.lane(subscription))
            chore.cancel()
        self.ended.set()

    async def drain(self) -> None:
        """Lands what was fetched and fetches no more; gives up after `DRAIN_S`."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S):
                await self.ended.wait()

    async def lane(self, subscription: Subscription) -> None:
        while not self.draining:
            async with self.fetching:
                deliveries = await self.gather(subscription)
            async with kept_alive(deliveries):
                await self.land(deliveries)

    async def gather(self, subscription: Subscription) -> list[Delivery]:
        """A batch: what is there now and what comes within `LINGER_S`, bounded in size."""
        held: list[Delivery] = []
        held_bytes = 0
        largest_bytes = self.largest_bytes
        deadline = monotonic() + FETCH_TIMEOUT_S
        while (left_s := deadline - monotonic()) > FETCH_TIMEOUT_MIN_S:
            limit = domain.fetch_limit(len(held), held_bytes, largest_bytes)
            if not limit:
                break
            fetched = await subscription.fetch(limit, left_s)
            if fetched and not held:
                deadline = monotonic() + LINGER_S
                largest_bytes = 0
            held += fetched
            held_bytes += sum(len(delivery.payload) for delivery in fetched)
            largest_bytes = max([largest_bytes, *(len(one.payload) for one in fetched)])
        if held:
            self.largest_bytes = largest_bytes
        return sorted(held, key=lambda delivery: delivery.sequence)

    async def land(self, deliveries: list[Delivery]) -> None:
        subjects: dict[str, list[Delivery]] = {}
        for delivery in deliveries:
            subjects.setdefault(delivery.subject, []).append(delivery)
        async with asyncio.TaskGroup() as group:
            for subject, some in subjects.items():
                group.create_task(self.land_subject(subject, some))

    async def land_subject(self, subject: str, deliveries: list[Delivery]) -> None:
        began = perf_counter()
        place = domain.place_of(subject)
        if place is None:
            await self.refuse_all(
                deliveries, "the subject is not records.<project>.<dataset>", began
            )
            return
        while True:
            try:
                await self.attempt(place, deliveries, began)
            except store.Raced as error:
                log.info("%s", error)
            else:
                return

    async def attempt(self, place: Place, deliveries: list[Delivery], began: float) -> None:
        """Lands what has not landed yet, and acks. Raises `store.Raced`.

        A process that stood still finds a message twice in one batch: as it was fetched, and as
        it was delivered again meanwhile.
        """
        messages = {domain.key_of(one): one for one in deliveries}
        ids = {key: one.headers.get(ID_HEADER, "") for key, one in messages.items()}
        seen = await self.insist(lambda: store.look(self.db, place, ids))
        if seen.schema is None:
            await self.unknown(place, deliveries, began)
            return
        fresh, duplicates = domain.sort_messages(ids, seen.landed, seen.ids)
        if fresh or duplicates:
            new = [messages[key] for key in fresh]
            await self.write(place, layout_of(seen.schema), new, duplicates)
        await self.ack(deliveries)
        metrics.settled(CONSUMER, metrics.HANDLED, deliveries, began)

    async def write(
        self,
        place: Place,
        layout: Layout,
        fresh: list[Delivery],
        duplicates: list[tuple[int, int]],
    ) -> None:
        """Everything up to the ack. Raises `store.Raced`."""
        parent, links = origins(fresh)
        with telemetry.span(
            "ingest land",
            kind=telemetry.SpanKind.CONSUMER,
            parent=parent,
            links=links,
            attributes={"leptonic.dataset": place.dataset, "leptonic.messages": len(fresh)},
        ) as span:
            made, refused = await asyncio.to_thread(build, place, layout, fresh)
            await self.dead_letter_all(refused)
            part = None
            if made:
                part, payload = made
                span.set_attribute("leptonic.records", part.rows)
                await self.insist(lambda: self.objects.put(part.key, payload))
            dead_letters = sum(one.records for _, one in refused)
            span.set_attribute("leptonic.dead_letters", dead_letters)
            claim = store.Claim(
                place=place,
                fresh=[domain.key_of(one) for one in fresh],
                ids=[one.headers.get(ID_HEADER) or None for one in fresh],
                duplicates=duplicates,
                dead_letters=dead_letters,
                part=part,
            )
            await self.insist(lambda: store.commit(self.db, claim))
        count(claim)

    async def insist(self, action: Callable[[], Awaitable[T]]) -> T:
        """Tries until it works: a dependency that is away holds this batch, and loses nothing."""
        tries = 0
        while True:
            try:
                return await action()
            except TRANSIENT as error:
                tries += 1
                log.warning("%s: %s; try %d", type(error).__name__, error, tries + 1)
                self.retrying += 1
                try:
                    await asyncio.sleep(backoff_s(tries))
                finally:
                    self.retrying -= 1

    async def unknown(self, place: Place, deliveries: list[Delivery], began: float) -> None:
        early = [one for one in deliveries if one.deliveries < self.unknown_deliveries_max]
        for delivery in early:
            await delivery.nak(UNKNOWN_DELAY_S)
        metrics.settled(CONSUMER, metrics.RETRIED, early, began)
        late = [one for one in deliveries if one.deliveries >= self.unknown_deliveries_max]
        reason = f"no dataset {place.dataset!r} in project {place.project!r}: apply a pipeline"
        await self.refuse_all(late, reason, began)

    async def refuse_all(self, deliveries: list[Delivery], reason: str, began: float) -> None:
        if not deliveries:
            return
        parent, links = origins(deliveries)
        with telemetry.span("ingest refuse", parent=parent, links=links) as span:
            telemetry.mark_failed(span, reason)
            problem = Problem("", reason)
            await self.dead_letter_all(
                [(delivery, Refused(0, problem, delivery.payload)) for delivery in deliveries]
            )
        await self.ack(deliveries)
        metrics.settled(CONSUMER, metrics.DEAD_LETTERED, deliveries, began)

    async def dead_letter_all(self, refused: list[tuple[Delivery, Refused]]) -> None:
        for start in range(0, len(refused), DEAD_LETTERS_AT_ONCE):
            async with asyncio.TaskGroup() as group:
                for delivery, one in refused[start : start + DEAD_LETTERS_AT_ONCE]:
                    group.create_task(self.dead_letter(delivery, one))

    async def dead_letter(self, delivery: Delivery, refused: Refused) -> None:
        payload = refused.payload[:DEAD_LETTER_BYTES_MAX]
        headers = {"Leptonic-Index": str(refused.index)}
        if refused.problem.field:
            headers["Leptonic-Field"] = " ".join(refused.problem.field.split())
        if len(payload) < len(refused.payload):
            headers["Leptonic-Truncated-From-Bytes"] = str(len(refused.payload))
        log.warning("%s, sequence %d: %s", delivery.subject, delivery.sequence, refused.reason)
        await self.insist(
            lambda: dead_letter(
                self.bus,
                delivery,
                f"dlq.{delivery.subject}",
                refused.reason,
                payload=payload,
                part=refused.index,
                headers=headers,
            )
        )

    async def ack(self, deliveries: Iterable[Delivery]) -> None:
        """An ack that is lost costs a delivery that finds itself landed."""
        try:
            await asyncio.gather(*(delivery.ack() for delivery in deliveries))
        except OSError as error:
            log.warning("ack: %s", error)

    async def forget(self) -> None:
        while True:
            await self.insist(lambda: store.forget_old(self.db))
            await asyncio.sleep(FORGET_S)


def origins(deliveries: list[Delivery]) -> tuple[str, list[str]]:
    """(parent, links) of a landing: where each of its messages was published.

    A publisher that sent no trace gets its span from us, from the time the stream took the
    message, for as many messages as a span can link.
    """
    places: list[str] = []
    for delivery in deliveries:
        place_in_trace = delivery.headers.get(TRACE_HEADER, "")
        if not place_in_trace and len(places) <= telemetry.LINKS_MAX:
            place_in_trace = published(delivery)
        places.append(place_in_trace)
    known = [one for one in dict.fromkeys(places) if one]
    return (known[0], known[1:]) if known else ("", [])


def published(delivery: Delivery) -> str:
    with telemetry.span(
        f"publish {delivery.subject}",
        kind=telemetry.SpanKind.PRODUCER,
        parent="",
        attributes={
            "messaging.destination.name": delivery.subject,
            "messaging.nats.sequence": delivery.sequence,
            "leptonic.recorded_by": "ingest",
        },
        start_time_ns=delivery.stored_at_ns,
    ):
        return telemetry.current()


def build(
    place: Place, layout: Layout, deliveries: list[Delivery]
) -> tuple[tuple[store.Part, bytes] | None, list[tuple[Delivery, Refused]]]:
    """Decodes, checks and packs; runs in a thread. The same deliveries make the same bytes."""
    accepted: list[tuple[int, Accepted]] = []
    refused: list[tuple[Delivery, Refused]] = []
    for delivery in deliveries:
        good, bad = decode(layout, delivery.payload)
        refused += [(delivery, one) for one in bad]
        if len(good.index):
            accepted.append((delivery.sequence, good))
    if not accepted:
        return None, refused
    table: pa.Table = assemble(layout, accepted)
    payload = parquet_bytes(table)
    digest = digest_of(payload)
    part = store.Part(
        digest=digest,
        key=domain.part_key(place, digest),
        rows=len(table),
        size_bytes=len(payload),
        first_sequence=accepted[0][0],
        last_sequence=accepted[-1][0],
    )
    return (part, payload), refused


def decode(layout: Layout, payload: bytes) -> tuple[Accepted, list[Refused]]:
    """By content: an Arrow IPC stream says so in its first bytes, all else must be JSON."""
    try:
        return (from_arrow if is_arrow(payload) else from_json)(layout, payload)
    except Unreadable as error:
        return Accepted.none(), [Refused(0, Problem("", str(error)), payload)]


def count(claim: store.Claim) -> None:
    labels = (claim.place.project, claim.place.dataset)
    meters.DUPLICATES.labels(*labels).inc(len(claim.duplicates))
    meters.REFUSED.labels(*labels).inc(claim.dead_letters)
    meters.BATCH_MESSAGES.observe(len(claim.fresh))
    if claim.part:
        meters.LANDED.labels(*labels).inc(claim.part.rows)
        meters.PARTS.labels(*labels).inc()
        meters.BATCH_RECORDS.observe(claim.part.rows)
        meters.PART_BYTES.observe(claim.part.size_bytes)
