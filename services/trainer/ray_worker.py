"""`python -m services.trainer.ray_worker`: lends this machine or container to the trainer's Ray.

It joins the head, and joins again whenever the head was restarted or this node was given up. On
SIGTERM it leaves at once: what trained here resumes elsewhere from its last checkpoint. Ready
means that it has joined.
"""

import asyncio
import logging
import os

import uvloop

from libs import telemetry
from libs.doors.serve import http_app, http_door, until_stopped
from libs.settings import load
from services.trainer import cluster, session
from services.trainer.app import Settings, node_of
from services.trainer.domain import Lost

log = logging.getLogger(__name__)
AGAIN_S = 1.0


class Joining:
    """This node's membership, as long as it lasts."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.joined = False

    async def ready(self) -> bool:
        return self.joined

    async def keep(self) -> None:
        """Every time with a session of its own: what Ray left of the last one is gone by then."""
        while True:
            try:
                await self.once()
            except Lost as error:
                log.warning("%s; again in %s s", error, AGAIN_S)
            await asyncio.sleep(AGAIN_S)

    async def once(self) -> None:
        head = self.settings.ray_head
        with session.opened(self.settings.ray_token) as folder:
            async with cluster.running(node_of(self.settings), folder, head) as process:
                log.info("joined %s", head)
                self.joined = True
                try:
                    await process.wait()
                finally:
                    self.joined = False
            raise Lost(f"no longer joined to {head}: exit code {process.returncode}")


async def main(settings: Settings) -> None:
    with telemetry.start("trainer", settings.otlp_endpoint, settings.log_level):
        joining = Joining(settings)
        app = http_app("Leptonic Ray worker", [], joining.ready)
        async with (
            http_door(settings.host, settings.http_port, app),
            asyncio.TaskGroup() as group,
        ):
            keeping = group.create_task(joining.keep())
            await until_stopped()
            keeping.cancel()


if __name__ == "__main__":
    telemetry.log_everything("trainer")
    uvloop.run(main(load(Settings, "trainer", os.environ)))
