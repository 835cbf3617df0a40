"""Preprocess: landed records become immutable dataset versions, and drift is noticed."""

import asyncio
import contextlib
from typing import Annotated

import grpc
from msgspec import Meta

from libs import database, settings, telemetry
from libs.bus import jetstream, loop
from libs.contracts.protos import preprocess_pb2_grpc
from libs.doors import dependencies
from libs.doors.drain import Drain
from libs.doors.serve import background, grpc_door, http_app, http_door
from libs.objectstore import ObjectStore
from services.preprocess import request_log, worker
from services.preprocess.handlers import HANDLERS, Context
from services.preprocess.server import SERVICE, Servicer
from services.preprocess.store import MIGRATIONS, Store

NAME = "preprocess"


class Settings(settings.Common, frozen=True, kw_only=True):
    http_port: Annotated[int, Meta(description="platform API over HTTP JSON, health")] = 8011
    grpc_port: Annotated[int, Meta(description="platform API over gRPC")] = 9011


async def main(config: Settings) -> None:
    with telemetry.start(NAME, config.otlp_endpoint, config.log_level):
        async with contextlib.AsyncExitStack() as stack:
            db = await stack.enter_async_context(
                database.connect(config.postgres_dsn, NAME, MIGRATIONS)
            )
            bus = await stack.enter_async_context(
                jetstream.connect(config.nats_url, config.nats_token, NAME)
            )
            objects = ObjectStore(
                config.s3_endpoint,
                config.s3_access_key,
                config.s3_secret_key,
                config.s3_bucket,
                config.s3_secure,
            )
            await objects.create_bucket()
            context = Context(Store(db, objects), asyncio.Event(), asyncio.Lock())
            servicer = Servicer(context)

            def add(server: grpc.aio.Server) -> None:
                preprocess_pb2_grpc.add_PreprocessServicer_to_server(servicer, server)

            await stack.enter_async_context(
                background(
                    db.relay(bus),
                    dependencies.watch(db, bus, objects),
                    loop.run(bus, NAME, HANDLERS, context, database.TRANSIENT),
                    worker.run(context),
                    request_log.run(bus, context),
                )
            )
            drain = Drain(db.ready, config.share_ports, config.drain_s)
            await stack.enter_async_context(
                grpc_door(config.host, config.grpc_port, add, [SERVICE], drain.ready, drain=drain)
            )
            app = http_app(NAME, [(servicer, SERVICE)], drain.ready)
            await stack.enter_async_context(http_door(config.host, config.http_port, app, drain))
            await drain.until_over()
