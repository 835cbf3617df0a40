"""Traffic on its way to decisions: what replicas say, looked at by the one who leads."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

from libs.database import TRANSIENT
from services.scheduler.autoscale import Autoscaler
from services.scheduler.domain import Scheduler
from services.scheduler.stimuli import Heartbeat, Scaled
from services.scheduler.writer import Defect, Writer

log = logging.getLogger(__name__)
LOOK_S = 1.0
"""Between two looks; who waits for a model that nobody serves is looked at at once."""


class Scaler:
    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.autoscaler = Autoscaler()
        self.wanted = asyncio.Event()

    def heard(self, heartbeat: Heartbeat) -> None:
        if not heartbeat.loads:
            return
        self.autoscaler.heard(heartbeat.node, heartbeat.loads, time.monotonic())
        if not all(load.ready for load in heartbeat.loads):
            self.wanted.set()

    async def run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.wanted.wait()
            self.wanted.clear()
            try:
                await self.writer.ask(self.decisions, lambda _: None)
            except TRANSIENT as error:
                log.warning("replicas: %s", error)
            except Defect:
                log.exception("replicas stay as they are")

    def decisions(self, scheduler: Scheduler) -> Iterator[Scaled]:
        now = time.monotonic()
        for deployment in scheduler.deployments.values():
            decision = self.autoscaler.decide(
                deployment.key, deployment.wanted, deployment.replicas, now
            )
            yield Scaled(*deployment.key, *decision)
