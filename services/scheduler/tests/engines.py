"""An agent over an engine, and the scheduler's part played by the test."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from libs.bus.memory import MemoryBus
from libs.contracts.envelope import decode, encode
from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    Resources,
    subject_of,
)
from services.scheduler.agent import Agent, Engine, Offer
from services.scheduler.process_agent import ProcessEngine
from services.scheduler.stimuli import Heartbeat
from stack.testing import eventually

NODE = "node-of-the-test"
OFFER = Offer(Resources(4000, 4096, 1000, 2), "G1")
TOLD = (AttemptStarted, AttemptSucceeded, AttemptFailed)


class Desk:
    """One node: its folder and its bus, whoever is its agent at the moment."""

    def __init__(self, folder: Path, kind: str, make: Callable[[Path], Engine]) -> None:
        self.folder = folder
        self.kind = kind
        self.make = make
        self.bus = MemoryBus()
        self.sent = 0

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncIterator[Agent]:
        """A new process of it, as far as anybody can tell; when it ends, what runs runs on."""
        agent = Agent(self.bus, self.make(self.folder), NODE, self.folder)
        running = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    async def say(self, event: Event) -> None:
        self.sent += 1
        name = f"said-{self.sent}"
        payload = encode(event, id=name, service="scheduler", time="2026-11-21T00:00:00Z")
        await self.bus.publish(subject_of(event), payload, id=name)

    def told(self, job: str) -> list[Event]:
        """What the agent has said of a job, each as often as it said it."""
        events = [decode(one.payload)[1] for one in self.bus.streams["EVENTS"]]
        return [one for one in events if isinstance(one, TOLD) and one.job == job]

    async def ended(self, job: str) -> Any:
        """How its attempt ended."""
        last = (AttemptSucceeded, AttemptFailed)
        return await eventually(lambda: next((e for e in self.told(job) if isinstance(e, last)), 0))

    async def running(self, agent: Agent, job: str) -> None:
        await eventually(lambda: AttemptStarted in {type(one) for one in self.told(job)})
        assert any(one.worker.job == job and one.running for one in agent.seen)

    async def heartbeat(self) -> Heartbeat:
        async for _, payload in self.bus.listen(f"heartbeats.{NODE}"):
            return msgspec.json.decode(payload, type=Heartbeat)
        raise AssertionError

    async def empty(self, agent: Agent) -> None:
        """Nothing is left of any attempt."""

        async def is_empty() -> bool:
            return await agent.engine.workers() == []

        await eventually(is_empty)

    def placed(self, job: str, code: str, token: int = 1, **more: Any) -> AttemptPlaced:
        """Python `code` as the attempt; `grace_s` goes to its spec."""
        grace_s = more.pop("grace_s", 5.0)
        spec = {"argv": [sys.executable, "-I", "-S", "-c", code], "grace_s": grace_s}
        attempt = {"project": "default", "job": job, "attempt": token, "token": token}
        usual = {"node": NODE, "kind": self.kind, "workers": 1, "spec": spec}
        return AttemptPlaced(**{**attempt, **usual, **more})


def stopped_of(placed: AttemptPlaced) -> AttemptStopped:
    return AttemptStopped(
        project=placed.project,
        job=placed.job,
        attempt=placed.attempt,
        token=placed.token,
        node=placed.node,
    )


def processes(folder: Path) -> Desk:
    return Desk(folder, "command", lambda where: ProcessEngine(where, OFFER))
