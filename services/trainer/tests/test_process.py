"""`python -m services.trainer`: ready before Ray, resumes after SIGKILL, leaves nothing behind."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import httpx
import msgspec
import pytest
import pytest_asyncio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.contracts.artifacts import TrainResult
from libs.contracts.events import (
    AttemptPlaced,
    AttemptSucceeded,
    Event,
    JobProgressed,
    decode,
    encode,
    subject_of,
)
from libs.contracts.protos import registry_pb2_grpc
from libs.objectstore import ObjectStore
from services.trainer.reaper import marked
from services.trainer.tests.conftest import spec_of, store_digits
from services.trainer.tests.desk import NODE, NoModels, placed
from stack import ports
from stack.testing import ACCESS_KEY, PASSWORD, eventually

WARM_S = 180.0
DRAIN_S = 10.0
GONE_S = 30.0
PLACE = f"00-{'a' * 32}-{'b' * 16}-01"


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans it gets."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    async def Export(self, request: Any, _: Any) -> Any:  # noqa: N802 - gRPC's name
        for resource in request.resource_spans:
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


class Trainer:
    """The process, and what one sees of it from outside."""

    def __init__(self, environment: dict[str, str], bus: JetStreamBus, receiver: Receiver) -> None:
        self.mark = f"TRAINER_OF_THE_TEST={secrets.token_hex(8)}"
        name, _, value = self.mark.partition("=")
        self.environment = {**environment, name: value}
        self.bus = bus
        self.receiver = receiver
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.trainer", env=self.environment
        )
        await eventually(self.ready, WARM_S)

    async def ready(self) -> bool:
        port = self.environment["LEPTONIC_TRAINER_HTTP_PORT"]
        with contextlib.suppress(httpx.TransportError):
            async with httpx.AsyncClient() as client:
                answer = await client.get(f"http://127.0.0.1:{port}/health/ready")
                return bool(answer.json() == {"ready": True})
        return False

    async def until_health(self, health: str) -> dict[str, Any]:
        async with asyncio.timeout(WARM_S):
            async for _, payload in self.bus.listen(f"heartbeats.{NODE}"):
                told: dict[str, Any] = json.loads(payload)
                if told["health"] == health:
                    return told
        raise AssertionError("the bus closed")

    async def end(self, number: signal.Signals) -> float:
        """Seconds until it was gone."""
        assert self.process is not None
        began = monotonic()
        self.process.send_signal(number)
        await self.process.wait()
        return monotonic() - began

    def raylet(self) -> int:
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in marked(self.mark)}
        (found,) = [pid for pid, name in names.items() if name == "raylet"]
        return found

    async def nothing_left(self) -> None:
        def none() -> bool:
            left = {pid: Path(f"/proc/{pid}/stat").read_text() for pid in marked(self.mark)}
            assert not left
            return True

        await eventually(none, GONE_S)

    async def place(self, event: AttemptPlaced) -> None:
        payload = encode(
            event, id=secrets.token_hex(8), service="test", time="2026-01-01T00:00:00Z",
            traceparent=PLACE,
        )  # fmt: skip
        await self.bus.publish(subject_of(event), payload, id=secrets.token_hex(8))

    async def of(self, kind: type[Event]) -> list[Any]:
        found = await self.bus.read(EVENTS, f"events.*.{kind.entity}.{kind.verb}", 0, 1000)
        return [decode(one.payload)[1] for one in found]


@pytest_asyncio.fixture
async def trainer(
    bus: JetStreamBus, nats_url: str, postgres_dsn: str, s3_server: str, objects: ObjectStore
) -> AsyncIterator[Trainer]:
    others, receiver = grpc.aio.server(), Receiver()
    registry_pb2_grpc.add_RegistryServicer_to_server(NoModels(), others)
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(receiver, others)
    other = f"127.0.0.1:{others.add_insecure_port('127.0.0.1:0')}"
    await others.start()
    http_port, grpc_port = ports.free(2)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "LEPTONIC_NATS_URL": nats_url,
        "LEPTONIC_POSTGRES_DSN": postgres_dsn,
        "LEPTONIC_S3_ENDPOINT": s3_server,
        "LEPTONIC_S3_ACCESS_KEY": ACCESS_KEY,
        "LEPTONIC_S3_SECRET_KEY": PASSWORD,
        "LEPTONIC_S3_BUCKET": objects.bucket,
        "LEPTONIC_REGISTRY_GRPC": other,
        "LEPTONIC_OTLP_ENDPOINT": other,
        "LEPTONIC_TRAINER_NODE": NODE,
        "LEPTONIC_TRAINER_HTTP_PORT": str(http_port),
        "LEPTONIC_TRAINER_GRPC_PORT": str(grpc_port),
    }
    one = Trainer(environment, bus, receiver)
    await one.start()
    try:
        yield one
    finally:
        assert one.process is not None
        if one.process.returncode is None:
            one.process.kill()
        await one.process.wait()
        await others.stop(None)


async def test_it_resumes_after_a_kill_and_leaves_nothing_behind(
    trainer: Trainer, objects: ObjectStore
) -> None:
    await trainer.until_health("Initializing")
    first = await trainer.until_health("Healthy")
    params = {"epochs": 12, "hidden": [512, 512], "batch_size": 16}
    spec = spec_of(await store_digits(objects), workers=2, params=params)
    await trainer.place(placed("resumed", spec))
    await eventually(lambda: trainer.of(JobProgressed), 60)
    await trainer.end(signal.SIGKILL)
    await trainer.nothing_left()

    await trainer.start()
    again = await trainer.until_health("Healthy")
    assert again["incarnation"] != first["incarnation"]
    assert again["running"] == []
    await trainer.place(placed("resumed", spec, attempt=2))
    await eventually(lambda: trainer.of(AttemptSucceeded), 120)
    (said,) = await trainer.of(AttemptSucceeded)
    result = msgspec.convert(said.result, TrainResult)
    assert result.resumed_from_epoch > 0
    assert result.evaluation.metrics["accuracy"] > 0.8
    await spans_are_one_tree(trainer.receiver)

    assert await trainer.end(signal.SIGTERM) < DRAIN_S
    assert trainer.process is not None
    assert trainer.process.returncode == 0
    await trainer.nothing_left()


@pytest.mark.slow
async def test_it_ends_with_ray_so_that_both_are_started_again(trainer: Trainer) -> None:
    await trainer.until_health("Healthy")
    os.kill(trainer.raylet(), signal.SIGKILL)
    assert trainer.process is not None
    async with asyncio.timeout(WARM_S):
        assert await trainer.process.wait() != 0
    await trainer.nothing_left()


async def spans_are_one_tree(receiver: Receiver) -> None:
    """The phases are children of `train`, wherever they ran; `train` is the placement's."""
    await eventually(lambda: receiver.named("train"))
    (train,) = receiver.named("train")
    assert (train.trace_id.hex(), train.parent_span_id.hex()) == ("a" * 32, "b" * 16)

    def phases() -> list[str]:
        return sorted(s.name for s in receiver.spans if s.parent_span_id == train.span_id)

    own = {"evaluate", "export", "fit", "load"}
    await eventually(lambda: set(phases()) >= own)
    await eventually(lambda: phases().count("fit") == 2)
