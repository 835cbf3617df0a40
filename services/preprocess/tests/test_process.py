"""`python -m services.preprocess`: starts, answers, survives SIGKILL in mid-build, drains."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import psycopg
import pytest

from libs import database
from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.contracts.envelope import decode, encode
from libs.contracts.events import DatasetVersionCreated, Event, subject_of
from libs.contracts.protos import preprocess_pb2 as pb
from libs.contracts.protos import preprocess_pb2_grpc
from libs.objectstore import ObjectStore
from services.preprocess.store import MIGRATIONS
from services.preprocess.tests.desk import applied, landed
from services.preprocess.tests.digits import part
from stack import ports
from stack.testing import eventually

DRAIN_S = 10.0
START_S = 60.0
VERSIONS = "/v1/projects/default/datasets/digits/versions"
DRIFT = "/v1/projects/default/datasets/digits/drift"


@pytest.fixture
def environment(reaching_servers: dict[str, str]) -> dict[str, str]:
    http_port, grpc_port = ports.free(2)
    return {
        **os.environ,
        **reaching_servers,
        "LEPTONIC_PREPROCESS_HTTP_PORT": str(http_port),
        "LEPTONIC_PREPROCESS_GRPC_PORT": str(grpc_port),
    }


@contextlib.asynccontextmanager
async def running(environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Ready when the block begins, gone when it ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.preprocess", env=environment
    )
    try:
        await eventually(lambda: is_ready(environment), timeout_s=START_S)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def is_ready(environment: dict[str, str]) -> bool:
    with contextlib.suppress(httpx.TransportError):
        answer = await call(environment, "GET", "/health/ready")
        return bool(answer.json() == {"ready": True})
    return False


async def call(environment: dict[str, str], verb: str, path: str) -> httpx.Response:
    port = environment["LEPTONIC_PREPROCESS_HTTP_PORT"]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        return await client.request(verb, path, json={} if verb == "POST" else None)


async def publish(bus: JetStreamBus, event: Event, id: str) -> None:
    payload = encode(event, id=id, service="test", time="2026-11-21T00:00:00Z")
    await bus.publish(subject_of(event), payload, id=id)


async def publish_digits(bus: JetStreamBus, objects: ObjectStore) -> None:
    await publish(bus, applied(), "applied")
    one, payload = part(0, 1000)
    await objects.put(one.key, payload)
    await publish(bus, landed(one), "landed")


async def created(bus: JetStreamBus) -> list[Any]:
    found = await bus.read(EVENTS, "events.>", 0, 100)
    events = [decode(one.payload)[1] for one in found]
    return [event for event in events if isinstance(event, DatasetVersionCreated)]


async def test_it_starts_builds_answers_and_drains(
    environment: dict[str, str], bus: JetStreamBus, objects: ObjectStore
) -> None:
    await publish_digits(bus, objects)
    async with running(environment) as process:
        (event,) = await eventually(lambda: created(bus), timeout_s=START_S)
        one = (await call(environment, "GET", f"{VERSIONS}/1")).json()
        assert (one["digest"], one["rows"]) == (event.digest, "1000")
        assert one["manifest"]["dataset"] == "digits"
        listed = (await call(environment, "GET", VERSIONS)).json()
        assert [version["number"] for version in listed["versions"]] == ["1"]
        again = (await call(environment, "POST", VERSIONS)).json()
        assert (again["number"], again["digest"]) == ("1", event.digest)
        drift = (await call(environment, "GET", DRIFT)).json()
        assert drift == {"reference_digest": event.digest, "features": []}
        missing = await call(environment, "GET", f"{VERSIONS}/9")
        assert (missing.status_code, missing.json()["field"]) == (404, "number")
        address = f"127.0.0.1:{environment['LEPTONIC_PREPROCESS_GRPC_PORT']}"
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = preprocess_pb2_grpc.PreprocessStub(channel)
            with pytest.raises(grpc.aio.AioRpcError, match="no pipeline uses a dataset 'cats'"):
                await stub.BuildDatasetVersion(
                    pb.BuildDatasetVersionRequest(project="default", dataset="cats")
                )
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DRAIN_S):
            assert await process.wait() == 0


async def test_killed_in_mid_build_it_builds_once_on_its_return(
    environment: dict[str, str], bus: JetStreamBus, objects: ObjectStore
) -> None:
    """The artifacts are stored, the version is not committed: the worst moment."""
    dsn = environment["LEPTONIC_POSTGRES_DSN"]
    async with database.connect(dsn, "preprocess", MIGRATIONS):
        pass
    held = await psycopg.AsyncConnection.connect(dsn)
    async with held:
        await held.execute("lock table preprocess.version in exclusive mode")
        await publish_digits(bus, objects)

        async def stored() -> bool:
            return len(await objects.list("artifacts/")) == 4

        async with running(environment) as process:
            await eventually(stored, timeout_s=START_S)
            process.kill()
            await process.wait()
        assert await created(bus) == []
        await held.rollback()
    async with running(environment):
        (event,) = await eventually(lambda: created(bus), timeout_s=START_S)
        versions = (await call(environment, "GET", VERSIONS)).json()["versions"]
        assert [version["digest"] for version in versions] == [event.digest]
        again = (await call(environment, "POST", VERSIONS)).json()
        assert (again["number"], again["digest"]) == ("1", event.digest)
    assert await created(bus) == [event]
    assert await stored()
