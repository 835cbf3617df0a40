"""Events -> what is desired and placed, in Postgres; the agent then acts on it."""

from dataclasses import dataclass

from libs.bus.loop import Handlers, Meta
from libs.contracts.events import (
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    DeploymentUpdated,
)
from libs.database import Database
from services.inference import store
from services.inference.agent import Agent


@dataclass(frozen=True)
class Context:
    db: Database
    agent: Agent

    def once(self, meta: Meta) -> str:
        """Replicas share a schema, and each takes every event."""
        return f"{self.agent.node.name}:{meta.id}"


async def on_deployment_updated(event: DeploymentUpdated, meta: Meta, context: Context) -> None:
    async with context.db.transaction() as tx:
        if not await tx.first_time(context.once(meta)):
            return
        await store.desire(tx, event, meta.traceparent)
    context.agent.wake()


async def on_attempt_placed(event: AttemptPlaced, meta: Meta, context: Context) -> None:
    if event.kind != "serve" or event.node != context.agent.node.name:
        return
    async with context.db.transaction() as tx:
        if not await tx.first_time(context.once(meta)):
            return
        if await store.assign(tx, event, event.spec["model"]):
            await tx.emit(
                AttemptStarted(
                    project=event.project,
                    job=event.job,
                    attempt=event.attempt,
                    token=event.token,
                    node=event.node,
                )
            )
    context.agent.wake(lacking=True)


async def on_attempt_stopped(event: AttemptStopped, meta: Meta, context: Context) -> None:
    if event.node != context.agent.node.name:
        return
    async with context.db.transaction() as tx:
        if not await tx.first_time(context.once(meta)):
            return
        await store.stop(tx, event)
    context.agent.wake()


HANDLERS: Handlers = {
    DeploymentUpdated: on_deployment_updated,
    AttemptPlaced: on_attempt_placed,
    AttemptStopped: on_attempt_stopped,
}
