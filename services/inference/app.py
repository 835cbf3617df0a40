"""Inference, wired: settings, connections, the agent and its loops, five doors, the drain."""

import contextlib
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta
from prometheus_client import REGISTRY

from libs import database, telemetry
from libs.bus import Bus, jetstream, loop
from libs.contracts.events import Resources
from libs.contracts.protos import (
    inference_pb2,
    inference_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
)
from libs.database import TRANSIENT, Database
from libs.doors import dependencies, gateway
from libs.doors.drain import Drain
from libs.doors.serve import background, channel_to, http_app, http_door
from libs.objectstore import ObjectStore
from libs.settings import Common
from services.inference import feedback, fronts
from services.inference.agent import Agent
from services.inference.bodies import Exchange
from services.inference.busdoor import BusDoor
from services.inference.cache import Cache
from services.inference.endpoints import Endpoints
from services.inference.forward import Forwarder
from services.inference.guard import Guard
from services.inference.handlers import HANDLERS, Context
from services.inference.isolated import in_worker
from services.inference.journal import Journal
from services.inference.models import in_process
from services.inference.node import Node
from services.inference.notes import Notes
from services.inference.platformapi import Inference
from services.inference.registry import Registry
from services.inference.rest import app_of
from services.inference.rpc import Host, health_and_reflection
from services.inference.served import Rates
from services.inference.server import MODEL_INFER, MODEL_STREAM_INFER, OpenInference
from services.inference.statistics import Statistics
from services.inference.store import MIGRATIONS

log = logging.getLogger(__name__)
OPEN_INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
PLATFORM_API = inference_pb2.DESCRIPTOR.services_by_name["Inference"]


class Settings(Common, frozen=True, kw_only=True):
    http_port: Annotated[int, Meta(description="Open Inference Protocol over HTTP")] = 8000
    grpc_port: Annotated[int, Meta(description="Open Inference Protocol over gRPC")] = 8001
    metrics_port: Annotated[int, Meta(description="Prometheus metrics")] = 8002
    api_port: Annotated[int, Meta(description="inference's HTTP JSON door")] = 8015
    node: Annotated[str, Meta(description="this replica's name; unique")] = "inference"
    project: Annotated[str, Meta(description="whose models are named without project")] = "default"
    server_name: Annotated[str, Meta(description="name in the server's metadata")] = "leptonic"
    front: Annotated[
        Literal["auto", "native", "python"],
        Meta(description="who speaks gRPC; auto: native where it is built"),
    ] = "auto"
    tokens: Annotated[
        str, Meta(description="tokens the inference doors ask for, by commas; empty: none")
    ] = ""
    traces_per_s: Annotated[
        float, Meta(ge=0, description="requests of a version traced beside their callers' traces")
    ] = 100
    request_log_per_s: Annotated[
        float, Meta(ge=0, description="requests of a version logged, at most")
    ] = 2000
    grpc_address: Annotated[
        str,
        Meta(description="where other replicas reach the gRPC door; empty: where it listens"),
    ] = ""
    cache_dir: Annotated[str, Meta(description="folder that keeps artifacts; empty: none")] = ""
    isolate: Annotated[bool, Meta(description="run each model in a process of its own")] = False
    cpu_milli: Annotated[int, Meta(description="CPU offered to the scheduler")] = 4000
    memory_mib: Annotated[int, Meta(description="memory offered to the scheduler")] = 4096


async def main(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; then what was accepted is answered and logged."""
    with telemetry.start("inference", settings.otlp_endpoint, settings.log_level):
        async with contextlib.AsyncExitStack() as stack:
            db = await stack.enter_async_context(
                database.connect(settings.postgres_dsn, "inference", MIGRATIONS)
            )
            bus = await stack.enter_async_context(
                jetstream.connect(settings.nats_url, settings.nats_token, settings.node)
            )
            _, drain = await stack.enter_async_context(serving(settings, db, bus))
            await drain.until_over()


@contextlib.asynccontextmanager
async def serving(settings: Settings, db: Database, bus: Bus) -> AsyncIterator[tuple[Agent, Drain]]:
    """The replica, with its doors open. They close first when the block ends."""
    async with contextlib.AsyncExitStack() as stack:
        journal = Journal(bus)
        await stack.enter_async_context(journal.running())
        host = Host([MODEL_INFER, MODEL_STREAM_INFER])
        front = fronts.make(settings.front, host.host, tokens_of(settings))
        rates = Rates(settings.traces_per_s, settings.request_log_per_s)
        name = settings.machine or settings.node
        endpoints = Endpoints(front, Notes(journal, name, rates), settings.project)
        stack.push_async_callback(endpoints.close)
        stack.enter_context(registered(Statistics(endpoints)))
        channel = await stack.enter_async_context(channel_to(settings.registry_grpc))
        node = Node(
            name=name,
            incarnation=uuid.uuid4().hex,
            capacity=Resources(settings.cpu_milli, settings.memory_mib),
            address=settings.grpc_address or f"{reached_at(settings.host)}:{settings.grpc_port}",
            agent=settings.node if settings.machine else "",
        )
        forwarder = Forwarder(node.name, tokens_of(settings))
        stack.push_async_callback(forwarder.close)
        objects = store_of(settings)
        cache = Cache(Path(settings.cache_dir)) if settings.cache_dir else None
        build = in_worker if settings.isolate else in_process
        agent = Agent(db, bus, objects, Registry(channel), endpoints, node, forwarder, cache, build)
        stack.push_async_callback(count_what_is_left, agent)
        await stack.enter_async_context(
            background(
                db.relay(bus),
                dependencies.watch(db, bus, objects),
                loop.run(bus, settings.node, HANDLERS, Context(db, agent), TRANSIENT),
                feedback.consume_requests(bus, db),
                feedback.consume_feedback(bus, db),
                agent.run(),
                agent.catch_up(),
                agent.beat(),
                agent.observe(),
                agent.tell(),
                agent.presence.listen(bus, node.name, node.incarnation),
            )
        )
        endpoints.on_quarantine = agent.quarantine
        drain = Drain(agent.ready, settings.share_ports, settings.drain_s)
        api = Inference(db, bus, endpoints)
        await stack.enter_async_context(doors(settings, api, endpoints, host, drain))
        yield agent, drain


def reached_at(host: str) -> str:
    """By the other replicas. Where it listens on every address, by this machine's name."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared


def tokens_of(settings: Settings) -> list[str]:
    return [token.strip() for token in settings.tokens.split(",") if token.strip()]


@contextlib.contextmanager
def registered(statistics: Statistics) -> Iterator[None]:
    """What the metrics door tells, while the block lasts."""
    REGISTRY.register(statistics)
    try:
        yield
    finally:
        REGISTRY.unregister(statistics)


def store_of(settings: Settings) -> ObjectStore:
    return ObjectStore(
        settings.s3_endpoint,
        settings.s3_access_key,
        settings.s3_secret_key,
        settings.s3_bucket,
        settings.s3_secure,
    )


async def count_what_is_left(agent: Agent) -> None:
    """Counts since the last second; without Postgres they are lost, and said so."""
    try:
        await agent.observe_once()
    except TRANSIENT as error:
        log.warning("the last counts are not kept: %s", error)


@contextlib.asynccontextmanager
async def doors(
    settings: Settings, api: Inference, endpoints: Endpoints, host: Host, drain: Drain
) -> AsyncIterator[None]:
    name, ready, address = settings.server_name, drain.ready, settings.host
    oip = OpenInference(endpoints, name, ready)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(oip, host)
    inference_pb2_grpc.add_InferenceServicer_to_server(api, host)
    label_door = gateway.route(api.SendFeedback, PLATFORM_API.methods_by_name["SendFeedback"])
    http = app_of(oip, tokens_of(settings), [label_door])
    platform = http_app("Leptonic inference", [(api, PLATFORM_API)], ready)
    platform.add_middleware(Guard, tokens=tokens_of(settings))
    services = [OPEN_INFERENCE, PLATFORM_API]
    async with (
        health_and_reflection(host, services, ready),
        BusDoor(api.bus, Exchange(endpoints, oip.memory)).serving(),
        fronts.listening(endpoints.front, host, address, settings.grpc_port, drain),
        http_door(address, settings.http_port, http, drain),
        http_door(address, settings.metrics_port, http_app("Metrics", [], ready), drain),
        http_door(address, settings.api_port, platform, drain),
    ):
        yield
