"""`python -m services.trainer` and its Ray workers as processes, seen from outside."""

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
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.contracts.envelope import decode, encode
from libs.contracts.events import AttemptPlaced, Event, subject_of
from libs.contracts.protos import registry_pb2_grpc
from libs.objectstore import ObjectStore
from services.trainer.reaper import marked
from services.trainer.tests.desk import NODE, NoModels
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


class Process:
    """A program of the trainer's, its HTTP door, and all that carries its mark."""

    module = "services.trainer"

    def __init__(self, environment: dict[str, str]) -> None:
        self.mark = f"PROCESS_OF_THE_TEST={secrets.token_hex(8)}"
        name, _, value = self.mark.partition("=")
        self.environment = {**environment, name: value}
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await self.spawned()
        await eventually(self.ready, WARM_S)

    async def spawned(self, output: int | None = None) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            env=self.environment,
            stdout=output,
            stderr=output and asyncio.subprocess.STDOUT,
        )

    async def ready(self) -> bool:
        port = self.environment["LEPTONIC_TRAINER_HTTP_PORT"]
        with contextlib.suppress(httpx.TransportError):
            async with httpx.AsyncClient() as client:
                answer = await client.get(f"http://127.0.0.1:{port}/health/ready")
                return bool(answer.json() == {"ready": True})
        return False

    async def unready(self) -> bool:
        return not await self.ready()

    async def end(self, number: signal.Signals) -> float:
        """Seconds until it was gone."""
        assert self.process is not None
        began = monotonic()
        self.process.send_signal(number)
        await self.process.wait()
        return monotonic() - began

    def pid_of(self, name: str) -> int:
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in marked(self.mark)}
        (found,) = [pid for pid, its in names.items() if its == name]
        return found

    async def kill_all(self) -> None:
        """As the end of a container does."""
        for pid in marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()

    async def nothing_left(self) -> None:
        def none() -> bool:
            left = {pid: Path(f"/proc/{pid}/stat").read_text() for pid in marked(self.mark)}
            assert not left
            return True

        await eventually(none, GONE_S)


class Trainer(Process):
    """What one sees of the service over the bus."""

    def __init__(self, environment: dict[str, str], bus: JetStreamBus, receiver: Receiver) -> None:
        super().__init__(environment)
        self.bus = bus
        self.receiver = receiver

    async def heartbeat(self, name: str, value: Any) -> dict[str, Any]:
        """The first one that tells this."""
        async with asyncio.timeout(WARM_S):
            async for _, payload in self.bus.listen(f"heartbeats.{NODE}"):
                told: dict[str, Any] = json.loads(payload)
                if told[name] == value:
                    return told
        raise AssertionError("the bus closed")

    async def place(self, event: AttemptPlaced) -> None:
        payload = encode(
            event, id=secrets.token_hex(8), service="test", time="2026-01-01T00:00:00Z",
            traceparent=PLACE,
        )  # fmt: skip
        await self.bus.publish(subject_of(event), payload, id=secrets.token_hex(8))

    async def of(self, kind: type[Event]) -> list[Any]:
        found = await self.bus.read(EVENTS, f"events.*.{kind.entity}.{kind.verb}", 0, 1000)
        return [decode(one.payload)[1] for one in found]


@contextlib.asynccontextmanager
async def opened(
    bus: JetStreamBus, nats_url: str, postgres_dsn: str, s3: str, objects: ObjectStore
) -> AsyncIterator[Trainer]:
    """Not started yet; killed at the end."""
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
        "LEPTONIC_S3_ENDPOINT": s3,
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
    try:
        yield one
    finally:
        await one.kill_all()
        await others.stop(None)
