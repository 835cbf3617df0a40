"""An edge site's forwarder: what the site's NATS took goes to the hub, each message once.

`python -m stack.edge` runs beside a NATS server (deploy/compose/nats-edge.conf) with two accounts.
In one, publishers find the same `records.>` as at the hub, kept on the site's disk in the stream
EDGE. The other is the hub's, through the leaf node: a publish there is acked by the hub's RECORDS.
A message leaves the site's disk after that ack, under an id that a second try has too.
"""

import asyncio
import logging
import os
from time import perf_counter
from typing import Annotated

import uvloop
from msgspec import Meta

from libs import settings, telemetry
from libs.bus import ID_HEADER, RECORDS, Bus, Delivery, PublishFailed, Stream, Subscription, metrics
from libs.bus.jetstream import connect
from libs.doors.serve import background, http_app, http_door, until_stopped

log = logging.getLogger(__name__)
DURABLE = "forwarder"
BATCH_MAX = 32
"""In memory at once, of up to 8 MiB each."""
FETCH_TIMEOUT_S = 1.0
ACK_WAIT_S = 10.0
RETRY_S = 1.0
EXPECTED_STREAM = "Nats-Expected-Stream"
"""The server refuses the publish when another stream than this would take it."""


class Settings(settings.Common, frozen=True, kw_only=True):
    """`nats_url` is the site's own server, in the publishers' account."""

    http_port: Annotated[int, Meta(description="health and metrics")] = 8016
    site: Annotated[str, Meta(description="this edge site's name; unique")] = "edge"
    hub_url: Annotated[str, Meta(description="the hub, through the site's leaf node")] = ""
    held_mib_max: Annotated[int, Meta(ge=1, description="kept while the hub is away")] = 1024


async def main(config: Settings) -> None:
    telemetry.log_to_stderr("edge", config.log_level)
    telemetry.identify("edge")
    held = Stream("EDGE", RECORDS.subjects, 0, config.held_mib_max << 20, is_queue=True)
    async with (
        connect(config.nats_url, config.nats_token, config.site, (held,)) as site,
        connect(config.hub_url, name=config.site, streams=()) as hub,
    ):
        taken = await site.subscribe(held, DURABLE, list(held.subjects), ACK_WAIT_S)

        async def ready() -> bool:
            """Whether the site takes records; it does while the hub is away."""
            return site.connected

        app = http_app("Leptonic edge", [], ready)
        async with (
            background(forward(taken, hub, config.site)),
            metrics.watched(taken, held, DURABLE),
            http_door(config.host, config.http_port, app),
        ):
            await until_stopped()


async def forward(taken: Subscription, hub: Bus, site: str) -> None:
    while True:
        deliveries = await taken.fetch(BATCH_MAX, FETCH_TIMEOUT_S)
        await asyncio.gather(*(deliver(one, hub, site) for one in deliveries))


async def deliver(delivery: Delivery, hub: Bus, site: str) -> None:
    """The hub's ack first, then the site's; what comes between brings the message again."""
    began = perf_counter()
    own = {name: text for name, text in delivery.headers.items() if not name.startswith("Nats-")}
    headers = {**own, EXPECTED_STREAM: RECORDS.name}
    try:
        await hub.publish(
            delivery.subject, delivery.payload, id=id_of(delivery, site), headers=headers
        )
    except PublishFailed as error:
        log.warning("%s; it is kept, and tried again in %s s", error, RETRY_S)
        await delivery.nak(RETRY_S)
        outcome = metrics.RETRIED
    else:
        await delivery.ack()
        outcome = metrics.HANDLED
    metrics.settled(DURABLE, outcome, [delivery], began)


def id_of(delivery: Delivery, site: str) -> str:
    """The publisher's own, else one that neither another site nor a new disk repeats."""
    given = delivery.headers.get(ID_HEADER)
    return given or f"{site}-{delivery.sequence}-{delivery.stored_at_ns}"


if __name__ == "__main__":
    telemetry.log_everything("edge")
    uvloop.run(main(settings.load(Settings, "edge", os.environ)))
