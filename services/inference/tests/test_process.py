"""`python -m services.inference`: a stranger's client, readiness, crash, drain."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest

from libs.bus import REQUESTS
from libs.bus.jetstream import JetStreamBus
from libs.contracts.protos import open_inference_pb2_grpc
from libs.contracts.protos.open_inference_pb2 import ServerLiveRequest
from libs.objectstore import ObjectStore
from services.inference.app import Settings
from services.inference.tests import stage
from services.inference.tests.conftest import ROW, labels, request
from services.inference.tests.stage import Platform, register
from stack.testing import eventually

DRAIN_S = 10.0


def environment(settings: Settings) -> dict[str, str]:
    own = ("http_port", "grpc_port", "metrics_port", "api_port")
    shared = ("nats_url", "postgres_dsn", "registry_grpc")
    s3 = ("s3_endpoint", "s3_access_key", "s3_secret_key", "s3_bucket")
    variables = {f"LEPTONIC_{name.upper()}": getattr(settings, name) for name in (*shared, *s3)}
    doors = {f"LEPTONIC_INFERENCE_{name.upper()}": str(getattr(settings, name)) for name in own}
    return {**os.environ, **variables, **doors}


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[asyncio.subprocess.Process]:
    """Ready when the block begins, gone when it ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.inference", env=environment(settings)
    )
    try:
        await eventually(lambda: answers(settings, "/v2/health/ready"), timeout_s=30)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def answers(settings: Settings, path: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.http_port}") as client:
            return (await client.get(path)).status_code == 200
    return False


@contextlib.asynccontextmanager
async def client(settings: Settings) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{settings.grpc_port}") as channel:
        yield open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.fixture
async def deployed(settings: Settings, platform: Platform, objects: ObjectStore) -> Settings:
    """What a replica that starts now finds: its placement and a slow batcher's deployment."""
    await platform.place()
    target = await register(objects, 1, 100, stage.digits())
    await platform.deploy(1, target, max_queue_delay_microseconds=300_000)
    return settings


async def test_tritonclient_works_over_grpc_and_http(
    settings: Settings, platform: Platform, objects: ObjectStore
) -> None:
    await platform.place()
    await platform.deploy(1, await register(objects, 1, 100, stage.digits()))
    async with running(settings):
        await eventually(lambda: answers(settings, "/v2/models/digits/ready"))
        stranger = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.inference.tests.stranger",
            f"127.0.0.1:{settings.grpc_port}",
            f"127.0.0.1:{settings.http_port}",
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            printed, _ = await stranger.communicate()
    kept = json.loads(printed)
    assert kept["grpc"] == kept["http"]
    assert kept["grpc"]["labels"] == kept["stream"] == [1, 0]
    unknown, name, shape, datatype = kept["grpc"]["refused"]
    assert unknown == "Request for unknown model: 'x' is not found"
    assert name.startswith("unexpected inference input 'pixel' for model 'digits'")
    assert shape.endswith("for input 'pixels' for model 'digits'. Expected [-1,4], got [2,3]")
    assert datatype.startswith("inference input 'pixels' data-type is 'FP64'")
    assert kept["inputs"] == [{"name": "pixels", "datatype": "FP32", "shape": [-1, 4]}]
    assert (kept["counted"], kept["index"]) == (5, [["digits", "READY"]])


async def test_sigterm_answers_what_was_accepted_and_logs_it(
    deployed: Settings, bus: JetStreamBus
) -> None:
    async with running(deployed) as process, client(deployed) as oip:
        await eventually(lambda: answers(deployed, "/v2/models/digits/ready"))
        accepted = [asyncio.ensure_future(oip.ModelInfer(request(ROW))) for _ in range(20)]
        await oip.ServerLive(ServerLiveRequest())  # behind them on the same connection
        process.send_signal(signal.SIGTERM)
        assert [labels(answer) for answer in await asyncio.gather(*accepted)] == [[1]] * 20
        async with asyncio.timeout(DRAIN_S):
            assert await process.wait() == 0
    messages = await bus.read(REQUESTS, "requests.default.digits", 0, 50)
    assert sum(len(json.loads(message.payload)) for message in messages) == 20


async def test_a_killed_replica_serves_again_by_itself(deployed: Settings) -> None:
    for _ in range(2):
        async with running(deployed) as process, client(deployed) as oip:
            await eventually(lambda: answers(deployed, "/v2/models/digits/ready"))
            assert labels(await oip.ModelInfer(request(ROW))) == [1]
            process.kill()
