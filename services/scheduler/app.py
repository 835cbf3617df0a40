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
from libs.doors import dependencies
from libs.doors.drain import Drain
from libs.doors.serve import background, grpc_door, http_app, http_door
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

        def add(server: grpc.aio.Server) -> None:
            add_SchedulerServicer_to_server(doors, server)

        await enter(background(db.relay(bus), dependencies.watch(db, bus), lead(context, bus)))
        # A standby is ready too: what it is asked waits until it leads.
        drain = Drain(db.ready, settings.share_ports, settings.drain_s)
        host, ready = settings.host, drain.ready
        async with (
            grpc_door(host, settings.grpc_port, add, [API], ready, drain=drain),
            http_door(
                host,
                settings.http_port,
                http_app("Leptonic scheduler", [(doors, API)], ready),
                drain,
            ),
        ):
            await drain.until_over()
        if writer.leading.is_set():
            with contextlib.suppress(*TRANSIENT):
                await writer.rest()
