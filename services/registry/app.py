"""The registry, wired: settings, connections, doors, the loop and the outbox."""

import contextlib
from typing import Annotated

from msgspec import Meta

from libs import database, telemetry
from libs.bus import jetstream, loop
from libs.contracts.protos import registry_pb2, registry_pb2_grpc
from libs.database import TRANSIENT
from libs.doors import dependencies
from libs.doors.drain import Drain
from libs.doors.serve import background, grpc_door, http_app, http_door
from libs.objectstore import ObjectStore
from libs.settings import Common
from services.registry import feed
from services.registry.handlers import HANDLERS, Context
from services.registry.migrations import MIGRATIONS
from services.registry.server import Registry

SERVICE = registry_pb2.DESCRIPTOR.services_by_name["Registry"]


class Settings(Common, frozen=True, kw_only=True):
    http_port: Annotated[int, Meta(description="the registry's HTTP JSON door")] = 8013
    grpc_port: Annotated[int, Meta(description="the registry's gRPC door")] = 9013


async def main(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    with telemetry.start("registry", settings.otlp_endpoint, settings.log_level):
        async with contextlib.AsyncExitStack() as stack:
            db = await stack.enter_async_context(
                database.connect(settings.postgres_dsn, "registry", MIGRATIONS)
            )
            bus = await stack.enter_async_context(
                jetstream.connect(settings.nats_url, settings.nats_token, "registry")
            )
            objects = ObjectStore(
                settings.s3_endpoint,
                settings.s3_access_key,
                settings.s3_secret_key,
                settings.s3_bucket,
                settings.s3_secure,
            )
            await objects.create_bucket()
            context = Context(db, objects)
            servicer = Registry(context)
            handling = loop.run(bus, "registry", HANDLERS, context, TRANSIENT)
            needs = dependencies.watch(db, bus, objects)
            await stack.enter_async_context(background(db.relay(bus), needs, handling))
            drain = Drain(db.ready, settings.share_ports, settings.drain_s)
            await stack.enter_async_context(
                grpc_door(
                    settings.host,
                    settings.grpc_port,
                    lambda server: registry_pb2_grpc.add_RegistryServicer_to_server(
                        servicer, server
                    ),
                    [SERVICE],
                    drain.ready,
                    drain=drain,
                )
            )
            routes = feed.routes(bus)
            app = http_app("Leptonic registry", [(servicer, SERVICE)], drain.ready, routes)
            await stack.enter_async_context(
                http_door(settings.host, settings.http_port, app, drain)
            )
            await drain.until_over()
