"""The trainer's handlers and agent on real servers; the scheduler's part is played by the test."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import msgspec
import yaml

from libs import database
from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.bus.loop import run_once, subjects_of
from libs.contracts.envelope import decode, encode
from libs.contracts.events import (
    AttemptPlaced,
    DatasetVersionCreated,
    Event,
    PipelineApplied,
    Resources,
    subject_of,
)
from libs.contracts.pipeline import convert
from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.objectstore import ObjectStore
from services.trainer.agent import Agent
from services.trainer.champion import Registry
from services.trainer.domain import TrainSpec
from services.trainer.handlers import HANDLERS, Context
from services.trainer.server import Trainer
from services.trainer.store import MIGRATIONS
from services.trainer.tests.conftest import PROJECT

NODE = "trainer-of-the-test"
DIGITS = Path(__file__).resolve().parents[3] / "examples" / "digits.yaml"


class NoModels(registry_pb2_grpc.RegistryServicer):
    """A registry before the first version."""

    async def GetModelVersion(  # noqa: N802 - gRPC's name
        self, request: pb.GetModelVersionRequest, context: Any
    ) -> pb.ModelVersion:
        assert request.version == "@champion"
        return await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")  # type: ignore[no-any-return]


class Desk:
    def __init__(self, context: Context, bus: JetStreamBus) -> None:
        self.context = context
        self.bus = bus
        self.agent = context.agent
        self.trainer = Trainer(context.db)
        self.sent = 0

    async def send(self, *events: Event, id: str = "", traceparent: str = "") -> None:
        """Publishes, and lets the trainer handle everything there is."""
        for event in events:
            name = id or f"test-{uuid.uuid4()}"
            payload = encode(
                event, id=name, service="test", time="2026-01-01T00:00:00Z", traceparent=traceparent
            )
            await self.bus.publish(subject_of(event), payload, id=str(uuid.uuid4()))
        inbox = await self.bus.subscribe(EVENTS, "trainer", subjects_of(HANDLERS))
        while (await inbox.backlog()).total:
            await run_once(self.bus, inbox, "trainer", HANDLERS, self.context)

    async def emitted(self) -> list[Event]:
        """What the trainer said so far, in order."""
        await self.context.db.relay_once(self.bus)
        everything = await self.bus.read(EVENTS, "events.>", 0, 1000)
        said = [decode(one.payload) for one in everything]
        return [event for envelope, event in said if envelope.source == "/leptonic/trainer"]

    async def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in await self.emitted() if type(event) is kind]


def applied(revision: int = 1) -> PipelineApplied:
    spec = msgspec.to_builtins(convert(yaml.safe_load(DIGITS.read_text())))
    return PipelineApplied(project=PROJECT, pipeline="digits", revision=revision, spec=spec)


def created(digest: str, revision: int = 1) -> DatasetVersionCreated:
    return DatasetVersionCreated(
        project=PROJECT,
        dataset="digits",
        number=1,
        digest=digest,
        rows=1200,
        pipeline="digits",
        revision=revision,
        reason="records",
    )


def placed(job: str, spec: TrainSpec, attempt: int = 1, node: str = NODE) -> AttemptPlaced:
    return AttemptPlaced(
        project=PROJECT,
        job=job,
        attempt=attempt,
        token=attempt,
        node=node,
        kind="train",
        workers=spec.train.workers,
        spec=msgspec.to_builtins(spec),
    )


@contextlib.asynccontextmanager
async def opened(dsn: str, bus: JetStreamBus, objects: ObjectStore) -> AsyncIterator[Desk]:
    registry = grpc.aio.server()
    registry_pb2_grpc.add_RegistryServicer_to_server(NoModels(), registry)
    port = registry.add_insecure_port("127.0.0.1:0")
    await registry.start()
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        database.connect(dsn, "trainer", MIGRATIONS) as db,
    ):
        agent = Agent(db, bus, Registry(channel), NODE, uuid.uuid4().hex, Resources(2000, 4096))
        async with agent.running():
            yield Desk(Context(db, objects, agent), bus)
            for task in list(agent.tasks.values()):
                task.cancel()
            await asyncio.gather(*agent.tasks.values(), return_exceptions=True)
    await registry.stop(None)
