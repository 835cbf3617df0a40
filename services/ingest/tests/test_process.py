"""`python -m services.ingest` as it runs: started, killed in mid-work, drained."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from libs.bus.jetstream import JetStreamBus
from libs.contracts.envelope import encode
from libs.contracts.events import subject_of
from libs.database import Database
from libs.objectstore import ObjectStore
from services.ingest.tests.pipelines import applied, digit, message
from services.ingest.tests.test_landing import landed, rows_of
from stack import ports
from stack.testing import eventually

MESSAGES = 120
RECORDS_EACH = 25
Process = asyncio.subprocess.Process


@pytest.fixture
def run(
    reaching_servers: dict[str, str], tmp_path: Path
) -> Callable[[], AbstractAsyncContextManager[tuple[Process, str]]]:
    """Starts the service; yields its process, ready, and its HTTP address."""
    http, grpc = ports.free(2)
    environment = {
        **reaching_servers,
        "LEPTONIC_INGEST_HTTP_PORT": str(http),
        "LEPTONIC_INGEST_GRPC_PORT": str(grpc),
    }

    @asynccontextmanager
    async def running() -> AsyncIterator[tuple[Process, str]]:
        with (tmp_path / "ingest.log").open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "services.ingest",
                env={**os.environ, **environment},
                stderr=output,
            )
        url = f"http://127.0.0.1:{http}"
        try:
            await eventually(lambda: is_ready(process, url), timeout_s=30)
            yield process, url
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    return running


async def is_ready(process: Process, url: str) -> bool:
    if process.returncode is not None:
        pytest.fail(f"ended with {process.returncode}")
    try:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{url}/health/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def publish_all(bus: JetStreamBus) -> list[tuple[int, int, int]]:
    """(sequence, index, label) of every record that was acked."""
    acked = []
    for number in range(MESSAGES):
        records = [digit(number + n) for n in range(RECORDS_EACH)]
        sequence = await bus.publish("records.default.digits", message(*records), id=f"m{number}")
        acked += [(sequence, n, number + n) for n in range(RECORDS_EACH)]
    return acked


async def test_every_acked_record_lands_once_although_the_service_is_killed(
    run: Callable[[], AbstractAsyncContextManager[tuple[Process, str]]],
    bus: JetStreamBus,
    db: Database,
    objects: ObjectStore,
) -> None:
    async with run() as (process, _):
        publishing = asyncio.create_task(publish_all(bus))
        await eventually(lambda: some_landed(db), timeout_s=30)
        process.kill()
        acked = await publishing
    async with run() as (process, url):
        await eventually(lambda: landed(db, MESSAGES * RECORDS_EACH), timeout_s=30)
        assert await rows_of(db, objects) == acked
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health/live")).json() == {"live": True}
            assert "/v1/projects/{project}/datasets" in (await client.get("/openapi.json")).text
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await process.wait() == 0


async def some_landed(db: Database) -> bool:
    async with db.transaction() as tx:
        return await tx.one("select 1 as one from part") is not None


async def test_a_pipeline_applied_on_the_bus_opens_its_dataset(
    run: Callable[[], AbstractAsyncContextManager[tuple[Process, str]]], bus: JetStreamBus
) -> None:
    event = applied("digits")
    payload = encode(event, id="e1", service="test", time="2026-11-21T00:00:00Z")
    await bus.publish(subject_of(event), payload, id="e1")
    async with run() as (_, url), httpx.AsyncClient(base_url=url) as client:
        await bus.publish("records.default.digits", message(digit(1)), id="a")

        async def rows() -> bool:
            answer = await client.get("/v1/projects/default/datasets/digits")
            return answer.status_code == 200 and answer.json()["rows"] == "1"

        await eventually(rows, timeout_s=20)
        assert "leptonic_consumer_waiting_messages" in (await client.get("/metrics")).text
