"""`python -m services.registry`: starts, answers, survives a crash with its outbox, drains."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest

from libs import database
from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.contracts.envelope import decode
from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.objectstore import ObjectStore
from services.registry.handlers import Context
from services.registry.migrations import MIGRATIONS
from services.registry.tests.conftest import YAML, Desk
from stack import ports
from stack.testing import eventually

DRAIN_S = 10.0


@pytest.fixture
def environment(reaching_servers: dict[str, str]) -> dict[str, str]:
    http_port, grpc_port = ports.free(2)
    return {
        **os.environ,
        **reaching_servers,
        "LEPTONIC_REGISTRY_HTTP_PORT": str(http_port),
        "LEPTONIC_REGISTRY_GRPC_PORT": str(grpc_port),
    }


@contextlib.asynccontextmanager
async def running(environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Ready when the block begins, gone when it ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.registry", env=environment
    )
    try:
        await eventually(lambda: is_ready(environment), timeout_s=30)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def is_ready(environment: dict[str, str]) -> bool:
    with contextlib.suppress(httpx.TransportError):
        answer = await get(environment, "/health/ready")
        return bool(answer.json() == {"ready": True})
    return False


async def get(environment: dict[str, str], path: str) -> httpx.Response:
    port = environment["LEPTONIC_REGISTRY_HTTP_PORT"]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        return await client.get(path)


async def events(bus: JetStreamBus) -> list[Any]:
    found = await bus.read(EVENTS, "events.>", 0, 100)
    return [decode(one.payload)[1] for one in found]


async def test_it_starts_answers_publishes_and_drains(
    environment: dict[str, str], bus: JetStreamBus
) -> None:
    async with running(environment) as process:
        address = f"127.0.0.1:{environment['LEPTONIC_REGISTRY_GRPC_PORT']}"
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = registry_pb2_grpc.RegistryStub(channel)
            applied = await stub.ApplyPipeline(pb.ApplyPipelineRequest(project="p", yaml=YAML))
        assert applied.revision == 1
        assert (await get(environment, "/v1/projects/p/pipelines/digits")).status_code == 200
        assert "/v1/projects/{project}/models" in (await get(environment, "/openapi.json")).text
        (event,) = await eventually(lambda: events(bus))
        assert (event.project, event.pipeline) == ("p", "digits")
        feed = (await get(environment, "/v1/events?project=p")).json()
        assert [one["type"] for one in feed["events"]] == ["ai.leptonic.pipeline.applied.v1"]
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DRAIN_S):
            assert await process.wait() == 0


async def test_what_was_committed_before_a_crash_is_published_after_the_restart(
    environment: dict[str, str], bus: JetStreamBus, objects: ObjectStore
) -> None:
    """The crash came between the commit and the publish: the outbox still holds the events."""
    dsn = environment["LEPTONIC_POSTGRES_DSN"]
    async with database.connect(dsn, "registry", MIGRATIONS) as db:
        desk = Desk(Context(db, objects), bus)
        await desk.apply()
        await desk.handle(await desk.trained("job-1"), "e1")
        kept = await desk.emitted()
    assert len(kept) == 6
    assert await events(bus) == []
    async with running(environment):
        assert await eventually(lambda: events(bus)) == kept
    async with running(environment):
        assert await events(bus) == kept, "and only once"
