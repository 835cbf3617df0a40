"""On real Postgres and S3: every trigger is one build, every part counts once."""

import asyncio
import random

import msgspec
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs.contracts.artifacts import DatasetManifest
from libs.contracts.events import DatasetVersionCreated, DriftDetected
from libs.database import TRANSIENT
from libs.objectstore import ObjectStore, Unavailable
from services.preprocess import worker
from services.preprocess.tests.desk import Desk, applied, context_of, landed, traceparent_of
from services.preprocess.tests.digits import part
from stack import ports

FIRST = [part(start, start + 250) for start in range(0, 1000, 250)]
INVERTED = [part(start, start + 100, inverted=True) for start in range(1000, 1600, 100)]


async def with_first_version(desk: Desk) -> None:
    await desk.handle(applied())
    for one in FIRST:
        await desk.land(one)
    await desk.work()


async def test_a_version_is_built_when_enough_records_landed(desk: Desk) -> None:
    await desk.handle(applied())
    for one in FIRST[:-1]:
        await desk.land(one)
        await desk.work()
    assert await desk.versions() == []
    await desk.land(FIRST[-1])
    await desk.work()
    await desk.work()
    (version,) = await desk.versions()
    (event,) = await desk.emitted(DatasetVersionCreated)
    assert (event.number, event.digest, event.reason) == (1, version.digest, "records")
    assert (event.rows, event.pipeline, event.revision) == (1000, "digits", 1)
    payload = await desk.objects.get_blob(event.digest)
    manifest = msgspec.json.decode(payload, type=DatasetManifest)
    for blob in (*manifest.splits.values(), manifest.transform):
        assert len(await desk.objects.get_blob(blob.digest)) == blob.size_bytes


async def test_a_part_counts_once_however_often_it_is_told(desk: Desk) -> None:
    await desk.handle(applied())
    await desk.land(FIRST[0])
    for _ in range(3):
        await desk.handle(landed(FIRST[1][0]), id="the same")
        await desk.handle(landed(FIRST[0][0]))
        await desk.work()
    assert await desk.versions() == []
    row = await desk.one("select count(*) as parts, sum(rows)::int as rows from part")
    assert row == {"parts": 2, "rows": 500}


@pytest.mark.parametrize("seed", range(3))
async def test_the_order_of_events_does_not_matter(desk: Desk, seed: int) -> None:
    """Parts may come before their pipeline, an older revision after a newer."""
    for one, payload in FIRST:
        await desk.objects.put(one.key, payload)
    old = applied(1, preprocess=[{"split": {"test": 0.5}}])
    events = [applied(2), old, *(landed(one) for one, _ in FIRST)]
    random.Random(seed).shuffle(events)
    for event in events:
        await desk.handle(event)
    await desk.work()
    (version,) = await desk.versions()
    (event,) = await desk.emitted(DatasetVersionCreated)
    assert event.revision == 2
    manifest = msgspec.convert(version.manifest, DatasetManifest)
    assert manifest.parts == [one.digest for one, _ in FIRST]


async def test_two_replicas_build_one_version(desk: Desk) -> None:
    await desk.handle(applied())
    for one in FIRST:
        await desk.land(one)
    other = context_of(desk.db, desk.objects)
    built = await asyncio.gather(
        *(worker.build(context, "default", "digits") for context in (desk.context, other))
    )
    assert sorted(one is None for one in built) == [False, True]
    assert len(await desk.emitted(DatasetVersionCreated)) == 1


async def test_the_same_content_is_the_same_version_and_no_news(desk: Desk) -> None:
    await with_first_version(desk)
    again = await worker.build(desk.context, "default", "digits", "manual")
    assert [again] == await desk.versions()
    assert len(await desk.emitted(DatasetVersionCreated)) == 1
    await desk.handle(applied(2))
    await worker.build(desk.context, "default", "digits", "manual")
    news = await desk.emitted(DatasetVersionCreated)
    assert [(one.number, one.revision) for one in news] == [(1, 1), (1, 2)]


async def test_a_drift_is_one_event_and_one_version(desk: Desk) -> None:
    """The records trigger fires at the same time, and 400 more such records follow."""
    await with_first_version(desk)
    triggers = {"records": 200, "drift": {"psi": 0.25, "min_records": 200}}
    await desk.handle(applied(2, triggers=triggers))
    for one in INVERTED[:2]:
        await desk.land(one)
    await desk.work()
    (drift,) = await desk.emitted(DriftDetected)
    assert (drift.source, drift.window_rows, drift.threshold_psi) == ("records", 200, 0.25)
    assert drift.psi > 0.25
    assert drift.reference_digest == (await desk.versions())[0].digest
    await desk.handle(applied(3))
    for one in INVERTED[2:]:
        await desk.land(one)
        await desk.work()
    news = await desk.emitted(DatasetVersionCreated)
    assert [(one.number, one.reason, one.rows) for one in news] == [
        (1, "records", 1000),
        (2, "drift", 1200),
    ]
    assert len(await desk.emitted(DriftDetected)) == 1


async def test_without_a_drift_trigger_a_drift_is_told_and_builds_nothing(desk: Desk) -> None:
    await desk.handle(applied(triggers={"records": 1000}))
    for one in [*FIRST, *INVERTED]:
        await desk.land(one)
        await desk.work()
    assert len(await desk.emitted(DriftDetected)) == 1
    assert [one.number for one in await desk.versions()] == [1]


async def test_a_part_is_measured_once_across_replicas(desk: Desk) -> None:
    await with_first_version(desk)
    await desk.land(INVERTED[0])
    other = context_of(desk.db, desk.objects)
    await asyncio.gather(
        *(worker.measure(context, "default", "digits") for context in (desk.context, other))
    )
    row = await desk.one("select content->'rows' as rows from drift_window")
    assert row == {"rows": 100}


async def test_a_part_whose_bytes_changed_is_refused_and_told(desk: Desk) -> None:
    await desk.handle(applied())
    for one in FIRST:
        await desk.land(one)
    await desk.objects.put(FIRST[0][0].key, b"other bytes")
    await desk.work()
    assert await desk.versions() == []
    row = await desk.one("select failure from pipeline")
    assert FIRST[0][0].digest in row["failure"]
    assert await desk.context.store.unchecked() == []
    await desk.objects.put(*(FIRST[0][0].key, FIRST[0][1]))
    await desk.land(INVERTED[0])
    await desk.work()
    assert len(await desk.versions()) == 1


async def test_the_build_continues_the_trace_of_its_trigger_and_links_all_parts(
    desk: Desk,
) -> None:
    finished = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    provider.add_span_processor(SimpleSpanProcessor(finished))
    await desk.handle(applied())
    for number, one in enumerate(FIRST, start=1):
        await desk.land(one, traceparent=traceparent_of(number))
    await desk.work()
    (span,) = (one for one in finished.get_finished_spans() if one.name == "preprocess build")
    assert isinstance(span, ReadableSpan)
    assert span.parent is not None
    assert span.parent.span_id == 4
    assert [link.context.trace_id for link in span.links] == [1, 2, 3, 4]
    (version,) = await desk.versions()
    own = f"{span.context.span_id:016x}"
    assert version.traceparent.split("-")[1:3] == [f"{4:032x}", own]
    row = await desk.one("select traceparent from outbox")
    assert row == {"traceparent": version.traceparent}


async def test_while_the_object_store_is_away_nothing_is_lost(desk: Desk) -> None:
    await desk.handle(applied())
    for one in FIRST:
        await desk.land(one)
    (port,) = ports.free(1)
    away = context_of(desk.db, ObjectStore(f"127.0.0.1:{port}", "key", "secret", "bucket"))
    with pytest.raises(Unavailable):
        await worker.run_once(away)
    assert issubclass(Unavailable, TRANSIENT)
    assert await desk.versions() == []
    await desk.work()
    assert len(await desk.versions()) == 1
