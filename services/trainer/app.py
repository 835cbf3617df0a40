"""The trainer, wired: settings, connections, the agent, Ray behind it, two doors, the drain."""

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator
from types import ModuleType
from typing import Annotated

import grpc
from msgspec import Meta

from libs import database, telemetry
from libs.bus import Bus, jetstream, loop
from libs.contracts.events import Resources
from libs.contracts.protos import trainer_pb2, trainer_pb2_grpc
from libs.database import TRANSIENT, Database
from libs.doors import dependencies
from libs.doors.drain import Drain
from libs.doors.serve import background, channel_to, grpc_door, http_app, http_door
from libs.objectstore import ObjectStore
from libs.settings import Common, Unknown
from services.trainer import cluster, session
from services.trainer.agent import Agent
from services.trainer.champion import Registry
from services.trainer.domain import Setup, Storage
from services.trainer.handlers import HANDLERS, Context
from services.trainer.server import Trainer
from services.trainer.store import MIGRATIONS

SERVICE = trainer_pb2.DESCRIPTOR.services_by_name["Trainer"]


class Settings(Common, frozen=True, kw_only=True):
    http_port: Annotated[int, Meta(description="the trainer's HTTP JSON door")] = 8012
    grpc_port: Annotated[int, Meta(description="the trainer's gRPC door")] = 9012
    node: Annotated[str, Meta(description="this node's name; unique")] = "trainer"
    cpu_milli: Annotated[int, Meta(description="CPU offered to the scheduler; 0: all")] = 0
    memory_mib: Annotated[int, Meta(description="memory offered to the scheduler")] = 4096
    pool_workers: Annotated[int, Meta(ge=1, le=16, description="workers kept warm")] = 2
    recipes_path: Annotated[str, Meta(description="folder with users' recipe modules")] = ""
    ray_address: Annotated[str, Meta(description="own address, to be a Ray node for others")] = ""
    ray_port: Annotated[int, Meta(description="first of the 47 ports of a Ray node")] = 6379
    ray_head: Annotated[str, Meta(description="for `ray_worker`: host:port to join")] = ""
    ray_token: Annotated[str, Meta(description="what Ray's nodes share; needed to be several")] = ""


async def main(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT; what trains then is resumed from its last checkpoint."""
    with telemetry.start("trainer", settings.otlp_endpoint, settings.log_level):
        async with contextlib.AsyncExitStack() as stack:
            db = await stack.enter_async_context(
                database.connect(settings.postgres_dsn, "trainer", MIGRATIONS)
            )
            bus = await stack.enter_async_context(
                jetstream.connect(settings.nats_url, settings.nats_token, settings.node)
            )
            _, drain = await stack.enter_async_context(serving(settings, db, bus))
            await drain.until_over()


@contextlib.asynccontextmanager
async def serving(settings: Settings, db: Database, bus: Bus) -> AsyncIterator[tuple[Agent, Drain]]:
    """Ready before Ray is: until then the node says that it is initializing."""
    async with contextlib.AsyncExitStack() as stack:
        objects = ObjectStore(
            settings.s3_endpoint,
            settings.s3_access_key,
            settings.s3_secret_key,
            settings.s3_bucket,
            settings.s3_secure,
        )
        await objects.create_bucket()
        channel = await stack.enter_async_context(channel_to(settings.registry_grpc))
        agent = Agent(
            db,
            bus,
            Registry(channel),
            settings.machine or settings.node,
            uuid.uuid4().hex,
            capacity_of(settings),
            settings.node if settings.machine else "",
        )
        folder = stack.enter_context(session.opened(settings.ray_token))
        context = Context(db, objects, agent)
        await stack.enter_async_context(
            background(
                db.relay(bus),
                dependencies.watch(db, bus, objects),
                warm(settings, agent, folder),
                work(settings, bus, context),
            )
        )
        drain = Drain(db.ready, settings.share_ports, settings.drain_s, agent.is_warm)
        await stack.enter_async_context(doors(settings, Trainer(db), drain))
        yield agent, drain


async def work(settings: Settings, bus: Bus, context: Context) -> None:
    """What a node does, one process of it at a time: a successor resumes what this one trains."""
    async with context.db.exclusively(f"node {settings.node}"), context.agent.running():
        await loop.run(bus, settings.node, HANDLERS, context, TRANSIENT)


@contextlib.asynccontextmanager
async def doors(settings: Settings, servicer: Trainer, drain: Drain) -> AsyncIterator[None]:
    def add(server: grpc.aio.Server) -> None:
        trainer_pb2_grpc.add_TrainerServicer_to_server(servicer, server)

    app = http_app("Leptonic trainer", [(servicer, SERVICE)], drain.ready)
    async with (
        grpc_door(settings.host, settings.grpc_port, add, [SERVICE], drain.ready, drain=drain),
        http_door(settings.host, settings.http_port, app, drain),
    ):
        yield


async def warm(settings: Settings, agent: Agent, folder: str) -> None:
    """Starts Ray and its pool beside everything else; the service ends with them."""
    engine = await asyncio.to_thread(import_engine)
    node = node_of(settings)
    async with engine.started(setup_of(settings), settings.pool_workers, node, folder) as pool:
        agent.engine.set_result(pool)
        await pool.watch()


def capacity_of(settings: Settings) -> Resources:
    all_milli = (os.cpu_count() or 1) * 1000
    return Resources(settings.cpu_milli or all_milli, settings.memory_mib)


def node_of(settings: Settings) -> cluster.Node:
    """This machine as a Ray node. Raises `Unknown` where anybody could join it."""
    if (settings.ray_address or settings.ray_head) and not settings.ray_token:
        raise Unknown("LEPTONIC_TRAINER_RAY_TOKEN: empty, and Ray is open to other machines")
    address = socket.gethostbyname(settings.ray_address) if settings.ray_address else ""
    return cluster.Node(address, settings.ray_port, capacity_of(settings))


def import_engine() -> ModuleType:
    """Ray takes 1 s to import and reads its environment then: so late, and in a thread."""
    from services.trainer import engine

    return engine


def setup_of(settings: Settings) -> Setup:
    storage = Storage(
        settings.s3_endpoint,
        settings.s3_access_key,
        settings.s3_secret_key,
        settings.s3_bucket,
        settings.s3_secure,
    )
    return Setup(storage, settings.otlp_endpoint, settings.log_level, settings.recipes_path)
