"""Plans, off the decision path: prices for what comes lately, through the log like everything."""

import asyncio
import functools
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


def planned(made: planner.Plan, scheduler: Scheduler) -> list[Planned]:
    """Without a plan the prices stay, and the next one is due when as much has come again."""
    return [Planned(made.prices if made != planner.Plan() else scheduler.prices)]


async def plan(writer: Writer) -> None:
    """Whenever enough has come; a plan that is late or lost costs little (docs/scheduler.md)."""
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            given = await writer.read(wanted)
            if given is not None:
                made = await asyncio.to_thread(planner.plan, *given)
                await writer.ask(functools.partial(planned, made), lambda _: None)
        except TRANSIENT as error:
            log.warning("planning: %s", error)
