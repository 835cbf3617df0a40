"""Wires the scheduler: its log, its executor, the one writer, the doors."""

import contextlib
from typing import Annotated

import grpc
from msgspec import Meta

from libs import telemetry
from libs.bus import jetstream
from libs.contracts.protos import scheduler_pb2
from libs.contracts.protos.scheduler_pb2_grpc import add_SchedulerServicer_to_server
from libs.database import TRANSIENT, connect
from libs.doors.serve import background, grpc_door, http_app, http_door, until_stopped
from libs.settings import Common
from services.scheduler.executor import BusExecutor
from services.scheduler.handlers import Context
from services.scheduler.leader import lead
from services.scheduler.nodes import Liveness
from services.scheduler.server import Doors
from services.scheduler.store import MIGRATIONS, Store
from services.scheduler.writer import Writer

API = scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"]


class Settings(Common, frozen=True, kw_only=True):
    http_port: Annotated[int, Meta(description="HTTP JSON, health and metrics")] = 8014
    grpc_port: Annotated[int, Meta(description="gRPC")] = 9014


async def main(settings: Settings) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(
            telemetry.start("scheduler", settings.otlp_endpoint, settings.log_level)
        )
        enter = stack.enter_async_context
        db = await enter(connect(settings.postgres_dsn, "scheduler", MIGRATIONS))
        bus = await enter(jetstream.connect(settings.nats_url, settings.nats_token, "scheduler"))
        writer = Writer(Store(db), BusExecutor())
        context = Context(writer, Liveness([], 0.0))
        doors = Doors(context)

        async def ready() -> bool:
            """A standby is not ready."""
            return writer.leads and await db.ready()

        def add(server: grpc.aio.Server) -> None:
            add_SchedulerServicer_to_server(doors, server)

        await enter(grpc_door(settings.host, settings.grpc_port, add, [API], ready))
        app = http_app("Leptonic scheduler", [(doors, API)], ready)
        await enter(http_door(settings.host, settings.http_port, app))
        await enter(background(db.relay(bus), lead(context, bus)))
        await until_stopped()
        with contextlib.suppress(*TRANSIENT):  # a standby has nothing to keep
            await writer.rest()
