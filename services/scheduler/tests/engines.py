"""An agent over an engine, and the scheduler's part played by the test."""

import asyncio
import contextlib
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
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
from services.scheduler.agents import Settings
from services.scheduler.docker_agent import DockerEngine
from services.scheduler.process_agent import ProcessEngine
from services.scheduler.stimuli import Heartbeat
from stack.testing import eventually

PATIENCE_S = 60.0
REAPER = Path(__file__).with_name("reaper.py")
NODE = "node-of-the-test"
IMAGE = "python:3.11-slim-bookworm"
OFFER = Offer(Resources(4000, 4096, 1000, 2), "G1")
TOLD = (AttemptStarted, AttemptSucceeded, AttemptFailed)


class Desk:
    """One node: its folder and its bus, whoever is its agent at the moment."""

    def __init__(self, folder: Path, kind: str, make: Callable[[Path], Engine]) -> None:
        self.folder = folder
        self.kind = kind
        self.node = NODE
        self.make = make
        self.python = sys.executable
        self.spec: dict[str, Any] = {}
        """Of every attempt."""
        self.bus = MemoryBus()
        self.sent = 0

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncIterator[Agent]:
        """A new process of it, as far as anybody can tell; when it ends, what runs runs on."""
        agent = Agent(self.bus, self.make(self.folder), self.node, self.folder)
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
        return await eventually(
            lambda: next((e for e in self.told(job) if isinstance(e, last)), 0), PATIENCE_S
        )

    async def running(self, agent: Agent, job: str) -> None:
        await eventually(
            lambda: AttemptStarted in {type(one) for one in self.told(job)}, PATIENCE_S
        )
        assert any(one.worker.job == job and one.running for one in agent.seen)

    async def heartbeat(self) -> Heartbeat:
        async for _, payload in self.bus.listen(f"heartbeats.{self.node}"):
            return msgspec.json.decode(payload, type=Heartbeat)
        raise AssertionError

    async def empty(self, agent: Agent) -> None:
        """Nothing is left of any attempt."""

        async def is_empty() -> bool:
            return await agent.engine.workers() == []

        await eventually(is_empty, PATIENCE_S)

    def placed(self, job: str, code: str, token: int = 1, **more: Any) -> AttemptPlaced:
        """Python `code` as the attempt; `grace_s` and `env` go to its spec."""
        own: dict[str, Any] = {name: more.pop(name) for name in ("grace_s", "env") if name in more}
        argv = [self.python, "-I", "-S", "-c", code]
        spec: dict[str, Any] = {"argv": argv, **self.spec, **own}
        spec = more.pop("spec", spec)
        attempt = {"project": "default", "job": job, "attempt": token, "token": token}
        usual = {"node": self.node, "kind": self.kind, "workers": 1, "spec": spec}
        return AttemptPlaced(**{**attempt, **usual, **more})


def stopped_of(placed: AttemptPlaced) -> AttemptStopped:
    return AttemptStopped(
        project=placed.project,
        job=placed.job,
        attempt=placed.attempt,
        token=placed.token,
        node=placed.node,
    )


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Desk]:
    with reaped(folder):
        yield Desk(folder, "command", lambda where: ProcessEngine(where, OFFER))


@contextlib.contextmanager
def reaped(folder: Path) -> Iterator[None]:
    """No command of the folder's outlives the block, also where whoever runs it is killed."""
    command = [sys.executable, "-I", "-S", str(REAPER), str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as reaper:
        assert reaper.stdin is not None
        try:
            yield
        finally:
            reaper.stdin.close()


@contextlib.asynccontextmanager
async def containers(folder: Path) -> AsyncIterator[Desk]:
    """Raises `OSError` where no Docker engine answers. Leaves no container behind."""
    node = f"test-{secrets.token_hex(4)}"
    settings = Settings(node=node, cpu_milli=4000)
    desk = Desk(folder, "container", lambda _: DockerEngine(node, settings))
    desk.node, desk.python, desk.spec = node, "python3", {"image": IMAGE, "grace_s": 1.0}
    engine = DockerEngine(node, settings)
    await asyncio.to_thread(engine.have, IMAGE)
    try:
        yield desk
    finally:
        for one in await engine.workers():
            container = engine.find(one.worker)
            assert container is not None
            container.remove(force=True)
