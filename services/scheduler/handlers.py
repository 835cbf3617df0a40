"""What the bus brings, for the writer.

A request for a job that is known, running or long finished, changes nothing: `project` and `job`
are its identity. Results under an old token change nothing either. Both are logged.
"""

from dataclasses import dataclass

import msgspec

from libs.bus.loop import Handlers, Meta
from libs.contracts.autoscaling import Autoscaling
from libs.contracts.events import (
    AttemptFailed,
    AttemptStarted,
    AttemptSucceeded,
    DeploymentUpdated,
    JobCancelled,
    JobRequested,
)
from services.scheduler.jobs import NAME, PROJECT
from services.scheduler.nodes import Liveness
from services.scheduler.stimuli import Deployed, JobSubmitted
from services.scheduler.writer import Writer

FIELDS = Autoscaling.__struct_fields__


@dataclass
class Context:
    writer: Writer
    liveness: Liveness
    """Of whoever leads now."""


async def on_requested(event: JobRequested, meta: Meta, context: Context) -> None:
    check(event)
    await context.writer.take(JobSubmitted(event, meta.traceparent), meta.id)


async def on_told(
    event: JobCancelled | AttemptStarted | AttemptSucceeded | AttemptFailed,
    meta: Meta,
    context: Context,
) -> None:
    if isinstance(event, JobCancelled):
        check(event)
    await context.writer.take(event, meta.id)


def check(event: JobRequested | JobCancelled) -> None:
    """What makes a job needs names that can be written down. Raises `ValueError`."""
    if not PROJECT.fullmatch(event.project):
        raise ValueError(f"project: no token of a subject: {event.project[:80]!r}")
    if not NAME.fullmatch(event.job):
        raise ValueError(f"job: 1 to 200 of A-Z a-z 0-9 _ . : @ -, got {event.job[:80]!r}")


async def on_deployment_updated(event: DeploymentUpdated, meta: Meta, context: Context) -> None:
    """What a newer registry says beside is passed over."""
    said = {name: event.autoscaling[name] for name in FIELDS if name in event.autoscaling}
    fixed = max(1, event.replicas)
    wanted = msgspec.convert(said, Autoscaling) if said else Autoscaling(fixed, fixed)
    deployed = Deployed(
        project=event.project,
        model=event.model,
        generation=event.generation,
        wanted=wanted,
        resources=event.resources,
        traceparent=meta.traceparent,
    )
    await context.writer.take(deployed, meta.id)


HANDLERS: Handlers = {
    DeploymentUpdated: on_deployment_updated,
    JobRequested: on_requested,
    JobCancelled: on_told,
    AttemptStarted: on_told,
    AttemptSucceeded: on_told,
    AttemptFailed: on_told,
}
