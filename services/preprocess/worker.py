"""Measures what landed against the newest version, and builds the next one when it is due.

What there is to do follows from Postgres alone (the parts after a pipeline's positions), so a
worker that is killed anywhere does it again on its return. A build writes content-addressed
artifacts first and commits the version, its news and its positions in one transaction last: it
takes effect once, however often it is begun.
"""

import asyncio
import contextlib
import logging

import msgspec

from libs import telemetry
from libs.contracts.artifacts import DatasetManifest
from libs.contracts.events import DatasetVersionCreated, DriftDetected
from libs.database import TRANSIENT, Transaction
from libs.objectstore import Corrupt, Missing
from services.preprocess import builder, domain, drift, meters, store
from services.preprocess.domain import Part, State
from services.preprocess.handlers import Context
from services.preprocess.store import Version
from services.preprocess.table import Unusable, read

log = logging.getLogger(__name__)
POLL_S = 1.0
UNUSABLE = (Unusable, Corrupt, Missing)
"""What trying again would not change."""


async def run(context: Context) -> None:
    """Until cancelled. A dependency that is away is waited for."""
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await context.wake.wait()
        context.wake.clear()
        try:
            await run_once(context)
        except TRANSIENT as error:
            log.warning("%s; again in %s s", error, POLL_S)
            await asyncio.sleep(POLL_S)


async def run_once(context: Context) -> None:
    """Does all there is to do."""
    for project, pipeline, position in await context.store.unchecked():
        state = await context.store.state(project, pipeline)
        failure = ""
        try:
            while not await measure(context, project, pipeline):
                log.info("pipeline %s: a new version to measure against", pipeline)
            await build(context, project, pipeline)
        except UNUSABLE as error:
            failure = str(error)
            log.error("pipeline %s: no version: %s", pipeline, failure)
            meters.FAILURES.labels(project, pipeline).inc()
        await context.store.mark_checked(state, position, failure)


async def measure(context: Context, project: str, pipeline: str) -> bool:
    """Adds every part that landed since the reference to the drift window, each once.

    False when another version became the reference meanwhile.
    """
    state = await context.store.state(project, pipeline)
    manifest = await context.store.manifest(state)
    if manifest is None:
        return True
    for part in await context.store.parts(state, after=state.measured_position):
        payload = await context.store.payload(part)
        rows, counts = await asyncio.to_thread(count_part, payload, manifest)
        async with context.store.db.transaction() as tx:
            now = await store.locked(tx, project, pipeline)
            if now.version_digest != state.version_digest:
                return False
            if now.measured_position >= part.position:
                continue  # by another replica
            await store.mark_measured(tx, now, part.position)
            with telemetry.span("preprocess drift", parent=part.traceparent):
                moved = await observe(tx, now, manifest, domain.RECORDS, rows, counts)
            if moved and now.spec.triggers.drift:
                await store.want(tx, now, domain.DRIFT, part)
    return True


def count_part(payload: bytes, manifest: DatasetManifest) -> tuple[int, drift.Counts]:
    """A part that does not fit the reference's schema cannot be compared, and counts nothing."""
    try:
        table = read(payload, manifest.schema)
    except Unusable as error:
        log.warning("drift against %s: %s", manifest.dataset, error)
        return 0, {}
    reference = drift.references(manifest.statistics, manifest.schema)
    return table.rows, drift.count(table.columns, manifest.schema, reference)


async def observe(
    tx: Transaction,
    state: State,
    manifest: DatasetManifest,
    source: str,
    rows: int,
    counts: drift.Counts,
) -> bool:
    """Moves a window on; True, with `DriftDetected`, when that makes it a drift."""
    before = await store.window(tx, state, source)
    after, most = drift.advance(
        before,
        rows,
        counts,
        drift.references(manifest.statistics, manifest.schema),
        state.learned,
        threshold_psi=state.drift.psi,
        min_records=state.drift.min_records,
    )
    if after != before:
        await store.keep_window(tx, state, source, after)
        worst = max((one.psi for one in after.judged), default=0.0)
        meters.DRIFT.labels(state.project, state.dataset, source).set(worst)
    if most is None:
        return False
    detected = DriftDetected(
        project=state.project,
        dataset=state.dataset,
        pipeline=state.pipeline,
        reference_digest=state.version_digest,
        source=source,
        window_rows=after.judged_rows,
        feature=most.feature,
        psi=most.psi,
        ks=most.ks,
        threshold_psi=state.drift.psi,
    )
    await tx.emit(detected)
    log.info("drift of %s: %s", state.dataset, msgspec.json.encode(detected).decode())
    return True


async def build(context: Context, project: str, pipeline: str, reason: str = "") -> Version | None:
    """Builds the version that is due, or in any case when a `reason` is given.

    Raises one of `UNUSABLE`.
    """
    state = await context.store.state(project, pipeline)
    async with context.building, context.store.exclusive(project, state.dataset):
        state = await context.store.state(project, pipeline)
        parts = await context.store.parts(state)
        since = domain.rows_after(parts, state.through_position)
        why = reason or domain.due(state.spec.triggers, state.wanted, since)
        if not why:
            return None
        with telemetry.span(
            "preprocess build",
            parent=trigger_of(state, parts, why),
            links=[part.traceparent for part in parts],
            attributes={
                "leptonic.dataset": state.dataset,
                "leptonic.pipeline": pipeline,
                "leptonic.reason": why,
                "leptonic.parts": len(parts),
            },
        ):
            return await build_now(context, state, parts, why)


def trigger_of(state: State, parts: list[Part], why: str) -> str | None:
    """The trace to continue: of the part that was one too many, or of the caller (None)."""
    if why == domain.DRIFT:
        return state.wanted_traceparent
    return parts[-1].traceparent if why == domain.RECORDS else None


async def build_now(context: Context, state: State, parts: list[Part], why: str) -> Version:
    through = max((part.position for part in parts), default=0)
    fresh = state.through_position if through > state.through_position else state.fresh_position
    with meters.BUILD.labels(state.project, state.dataset).time():
        payloads = await context.store.payloads(parts)
        built = await asyncio.to_thread(builder.build, state.project, state.spec, payloads, fresh)
        await context.store.put(built)
    async with context.store.db.transaction() as tx:
        version = await store.insert_version(tx, state, built, why, telemetry.current())
        await store.move_to_version(tx, state, built, fresh, through)
        if domain.is_news(state, version.digest):
            await tx.emit(news_of(state, version, why))
    meters.ROWS.labels(state.project, state.dataset).set(version.rows)
    log.info("dataset %s version %d: %d rows", state.dataset, version.number, version.rows)
    return version


def news_of(state: State, version: Version, why: str) -> DatasetVersionCreated:
    return DatasetVersionCreated(
        project=state.project,
        dataset=state.dataset,
        number=version.number,
        digest=version.digest,
        rows=version.rows,
        pipeline=state.pipeline,
        revision=state.revision,
        reason=why,
    )
