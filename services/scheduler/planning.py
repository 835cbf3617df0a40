"""Plans, off the decision path: prices for what comes lately, through the log like everything."""

import asyncio
import logging

from libs.database import TRANSIENT
from services.scheduler import planner
from services.scheduler.domain import Scheduler
from services.scheduler.shapes import Machine, Shape
from services.scheduler.stimuli import Planned
from services.scheduler.writer import Writer

log = logging.getLogger(__name__)
LOOK_S = 5.0
"""Between two looks at whether enough came for a new plan."""
Wanted = tuple[list[Machine], list[tuple[Shape, int]]]


def wanted(scheduler: Scheduler) -> Wanted | None:
    """What a plan is made of, if one is due."""
    machines = list(scheduler.machines.values())
    if not scheduler.typical.is_due or not any(machine.gpus for machine in machines):
        return None
    return machines, scheduler.typical.shapes()


async def plan(writer: Writer) -> None:
    """Whenever enough has come; a plan that is late or lost costs little (docs/scheduler.md)."""
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            given = await writer.read(wanted)
            if given is not None:
                made = await asyncio.to_thread(planner.plan, *given)
                await writer.take(Planned(made.prices))
        except TRANSIENT as error:
            log.warning("planning: %s", error)
