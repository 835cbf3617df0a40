"""A replica in the test's own event loop, on real servers, and clients of its doors."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import grpc
import httpx
import pytest
import pytest_asyncio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs import database
from libs.bus.jetstream import JetStreamBus
from libs.contracts.protos import open_inference_pb2 as oip
from libs.contracts.protos import open_inference_pb2_grpc
from libs.objectstore import ObjectStore
from services.inference import native
from services.inference.agent import Agent
from services.inference.app import Settings, serving
from services.inference.store import MIGRATIONS
from services.inference.tests.stage import Platform
from stack import ports
from stack.testing import ACCESS_KEY, PASSWORD, eventually

ROW = [0.0, 3.0, 1.0, 2.0]
"""Its label is 1."""


@dataclass
class Replica:
    settings: Settings
    agent: Agent
    oip: Any
    http: httpx.AsyncClient
    api: httpx.AsyncClient

    async def infer(self, *rows: list[float], version: str = "", **fields: Any) -> Any:
        return await self.oip.ModelInfer(request(*rows, version=version, **fields))

    async def until_announced(self, generation: int, model: str = "digits") -> None:
        def announced() -> bool:
            endpoint = self.agent.endpoints.by_key.get(("default", model))
            return endpoint is not None and endpoint.announced == generation

        await eventually(announced)


def request(*rows: list[float], version: str = "", **fields: Any) -> oip.ModelInferRequest:
    tensor = oip.ModelInferRequest.InferInputTensor(
        name="pixels",
        datatype="FP32",
        shape=[len(rows), len(rows[0])],
        contents=oip.InferTensorContents(fp32_contents=[one for row in rows for one in row]),
    )
    return oip.ModelInferRequest(
        model_name="digits", model_version=version, inputs=[tensor], **fields
    )


def labels(answer: oip.ModelInferResponse) -> list[int]:
    return list(answer.outputs[0].contents.int64_contents)


@pytest.fixture(params=["native", "python"])
def front(request: pytest.FixtureRequest) -> Literal["native", "python"]:
    if request.param == "native" and not native.available():
        pytest.skip("leptonic_native is not built: make native")
    found: Literal["native", "python"] = request.param
    return found


@pytest.fixture
def settings(
    front: Literal["native", "python"],
    nats_url: str,
    postgres_dsn: str,
    s3_server: str,
    objects: ObjectStore,
) -> Settings:
    http_port, grpc_port, metrics_port, api_port, nobody = ports.free(5)
    return Settings(
        nats_url=nats_url,
        postgres_dsn=postgres_dsn,
        s3_endpoint=s3_server,
        s3_access_key=ACCESS_KEY,
        s3_secret_key=PASSWORD,
        s3_bucket=objects.bucket,
        registry_grpc=f"127.0.0.1:{nobody}",
        front=front,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        api_port=api_port,
    )


@pytest.fixture
def platform(bus: JetStreamBus) -> Platform:
    return Platform(bus)


@contextlib.asynccontextmanager
async def started(settings: Settings, bus: JetStreamBus) -> AsyncIterator[Replica]:
    async with (
        database.connect(settings.postgres_dsn, "inference", MIGRATIONS) as db,
        serving(settings, db, bus) as (agent, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{settings.grpc_port}") as channel,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.http_port}") as http,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{settings.api_port}") as api,
    ):
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        yield Replica(settings, agent, stub, http, api)


@pytest_asyncio.fixture
async def replica(settings: Settings, bus: JetStreamBus) -> AsyncIterator[Replica]:
    async with started(settings, bus) as one:
        yield one


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """What this process's spans were, while the test ran."""
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield exporter
    exporter.shutdown()
