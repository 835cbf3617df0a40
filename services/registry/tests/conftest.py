"""The registry on real servers, and what a trainer would have left in object storage."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest_asyncio

from libs import database
from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.bus.loop import Meta, run_once, subjects_of
from libs.contracts.artifacts import (
    Blob,
    Evaluation,
    Lineage,
    ModelManifest,
    Signature,
    Tensor,
    TrainResult,
    canonical,
)
from libs.contracts.envelope import decode, encode
from libs.contracts.events import Event, JobSucceeded, subject_of
from libs.contracts.protos import registry_pb2 as pb
from libs.objectstore import ObjectStore
from services.registry import handlers
from services.registry.handlers import HANDLERS, Context
from services.registry.migrations import MIGRATIONS
from services.registry.server import Registry

YAML = """
pipeline: digits
dataset:
  name: digits
  schema:
    pixels: {type: float32, shape: [64]}
    label: {type: int64, role: label}
preprocess:
  - standardize: {columns: [pixels]}
  - split: {test: 0.2, seed: 1}
train: {recipe: mlp, params: {epochs: 2}}
gates:
  - {metric: accuracy, min: 0.9, max_drop: 0.05}
deployment:
  model: digits
  replicas: 2
  canary: {trafficPercent: 25, min_requests: 20, max_error_rate: 0.0}
"""


class Desk:
    """A registry with its doors' servicer, and a trainer's hand."""

    def __init__(self, context: Context, bus: JetStreamBus) -> None:
        self.context = context
        self.bus = bus
        self.registry = Registry(context)
        self.published = 0

    async def apply(self, yaml: str = YAML) -> pb.Pipeline:
        request = pb.ApplyPipelineRequest(project="default", yaml=yaml)
        return await self.registry.ApplyPipeline(request, None)

    async def trained(
        self,
        job: str,
        accuracy: float = 0.95,
        champion: int | None = None,
        model: str = "digits",
        revision: int = 1,
    ) -> JobSucceeded:
        """Artifacts in the store, and the event that tells of them."""
        objects = self.context.objects
        manifest = ModelManifest(
            model=model,
            weights=await objects.put_blob(f"weights of {job}".encode()),
            graph=await objects.put_blob(f"graph of {job}".encode()),
            transform=await objects.put_blob(b"transform"),
            signature=Signature(
                [Tensor("pixels", "FP32", [-1, 64])], [Tensor("label", "INT64", [-1])]
            ),
            metrics={"accuracy": accuracy},
            lineage=lineage(revision),
        )
        blob = await objects.put_blob(canonical(manifest))
        return succeeded(job, blob, accuracy, champion)

    async def publish(self, event: Event, id: str) -> None:
        payload = encode(event, id=id, service="test", time="2026-11-21T00:00:00+00:00")
        self.published += 1
        await self.bus.publish(subject_of(event), payload, id=f"{id}-{self.published}")

    async def handle(self, event: Event, id: str) -> None:
        """As the loop would, once the event is there."""
        await HANDLERS[type(event)](event, Meta(id, "", "", 1), self.context)

    async def loop(self) -> int:
        """One fetch of what was published, as the running service does it."""
        subscription = await self.bus.subscribe(EVENTS, "registry", subjects_of(HANDLERS))
        return await run_once(self.bus, subscription, "registry", HANDLERS, self.context)

    async def emitted(self) -> list[Event]:
        """What waits in the outbox, in order."""
        async with self.context.db.transaction() as tx:
            rows = await tx.all("select payload from outbox order by position")
        return [decode(bytes(row["payload"]))[1] for row in rows]

    async def versions(self, model: str = "digits") -> list[pb.ModelVersion]:
        request = pb.ListModelVersionsRequest(project="default", model=model)
        return list((await self.registry.ListModelVersions(request, None)).versions)

    async def deployment(self) -> pb.Deployment:
        request = pb.GetDeploymentRequest(project="default", model="digits")
        return await self.registry.GetDeployment(request, None)

    async def shares(self) -> list[tuple[int, int]]:
        return [(one.number, one.percent) for one in (await self.deployment()).targets]


def lineage(revision: int) -> Lineage:
    return Lineage(
        dataset="digits",
        dataset_version=1,
        dataset_digest="d" * 64,
        pipeline="digits",
        revision=revision,
        recipe="mlp",
        params={"epochs": 2},
        seed=0,
        workers=1,
        libraries={"torch": "2.13.0"},
    )


def succeeded(job: str, manifest: Blob, accuracy: float, champion: int | None) -> JobSucceeded:
    before = {} if champion is None else {"accuracy": 0.95}
    evaluation = Evaluation(
        dataset_digest="d" * 64,
        metrics={"accuracy": accuracy},
        champion=champion,
        champion_metrics=before,
    )
    result = TrainResult(manifest=manifest, evaluation=evaluation, seconds=1.0)
    return JobSucceeded(
        project="default",
        job=job,
        kind="train",
        attempt=1,
        spec={},
        result=msgspec.to_builtins(result),
    )


def fields(event: Event, *names: str) -> tuple[Any, ...]:
    return tuple(getattr(event, name) for name in names)


@pytest_asyncio.fixture
async def desk(postgres_dsn: str, objects: ObjectStore, bus: JetStreamBus) -> AsyncIterator[Desk]:
    async with database.connect(postgres_dsn, "registry", MIGRATIONS) as db:
        yield Desk(handlers.Context(db, objects), bus)
