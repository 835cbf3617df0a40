"""Wires ingest: settings, connections, the landing, the doors."""

import contextlib
from typing import Annotated

from msgspec import Meta

from libs import database, settings, telemetry
from libs.bus import jetstream, loop
from libs.contracts.protos import ingest_pb2, ingest_pb2_grpc
from libs.doors import dependencies, serve
from libs.doors.drain import Drain
from libs.objectstore import ObjectStore, Unavailable
from services.ingest.handlers import HANDLERS, Context
from services.ingest.landing import Landing
from services.ingest.server import RecordsDoor, Servicer
from services.ingest.store import MIGRATIONS


class Settings(settings.Common, frozen=True, kw_only=True):
    http_port: Annotated[int, Meta(description="records, the platform API, metrics")] = 8010
    grpc_port: Annotated[int, Meta(description="leptonic.v1.Ingest over gRPC")] = 9010


async def main(settings: Settings) -> None:
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(telemetry.start("ingest", settings.otlp_endpoint, settings.log_level))
        db = await stack.enter_async_context(
            database.connect(settings.postgres_dsn, "ingest", MIGRATIONS)
        )
        bus = await stack.enter_async_context(
            jetstream.connect(settings.nats_url, settings.nats_token, "ingest")
        )
        objects = ObjectStore(
            settings.s3_endpoint,
            settings.s3_access_key,
            settings.s3_secret_key,
            settings.s3_bucket,
            settings.s3_secure,
        )
        await objects.create_bucket()
        landing = Landing(bus, db, objects)

        async def ready() -> bool:
            """Whether a record that is published now also lands now."""
            try:
                await objects.exists("ready")
            except Unavailable:
                return False
            return not landing.retrying and bus.connected and await db.ready()

        await stack.enter_async_context(
            serve.background(
                db.relay(bus),
                dependencies.watch(db, bus, objects),
                loop.run(bus, "ingest", HANDLERS, Context(db), database.TRANSIENT),
                landing.run(),
            )
        )
        drain = Drain(ready, settings.share_ports, settings.drain_s)
        service = ingest_pb2.DESCRIPTOR.services_by_name["Ingest"]
        servicer = Servicer(db)
        await stack.enter_async_context(
            serve.grpc_door(
                settings.host,
                settings.grpc_port,
                lambda server: ingest_pb2_grpc.add_IngestServicer_to_server(servicer, server),
                [service],
                drain.ready,
                drain=drain,
            )
        )
        records = RecordsDoor(bus, db).route
        app = serve.http_app("Ingest", [(servicer, service)], drain.ready, [records])
        await stack.enter_async_context(
            serve.http_door(settings.host, settings.http_port, app, drain)
        )
        await drain.until_over()
        await landing.drain()
