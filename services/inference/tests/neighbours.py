"""Several replicas in one event loop, each with what it knows of the others."""

import contextlib
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any

import pytest

from libs.contracts.events import DeploymentUpdated
from services.inference import peers
from services.inference.endpoints import Key
from services.inference.forward import Forwarder
from services.inference.front import Front
from services.inference.loads import Load
from services.inference.peers import Told
from services.inference.presence import Presence
from services.inference.tests import stage
from services.inference.tests.desk import Desk, opened, request, row

KEY = ("default", "double")
ASKED = request("double", row(1, 2), [1, 2])


class Replica:
    """One of several, with what each knows of the others."""

    def __init__(self, name: str, desk: Desk) -> None:
        self.name = name
        self.desk = desk
        self.project = "default"
        self.known: dict[Key, tuple[DeploymentUpdated, str]] = {}
        self.called_out = self.heard_out = 0
        self.presence = Presence(
            desk.endpoints, Forwarder(name, []), lambda: self.known, self.call_out, self.hear_out
        )
        desk.endpoints.elsewhere = self.presence

    def call_out(self) -> None:
        self.called_out += 1

    def hear_out(self) -> None:
        self.heard_out += 1

    def deploy(self, model: str = "double", **batching: int) -> None:
        """It may sleep."""
        deployment = stage.deployment(1, model=model, **batching)
        fields = {"min_replicas": 0, "max_replicas": 2}
        asleep = DeploymentUpdated(
            **{name: getattr(deployment, name) for name in deployment.__struct_fields__}
            | {"autoscaling": fields}
        )
        self.known["default", model] = asleep, ""

    async def serve(self, *args: Any) -> None:
        await self.desk.serve(*args)
        self.presence.notify()

    def hear(self, other: "Replica", *loads: Load) -> None:
        front: Front = other.desk.endpoints.front
        told = Told(other.name, f"127.0.0.1:{front.port}", list(loads), project=other.project)
        self.presence.peers.heard(told, monotonic())
        self.presence.notify()


@contextlib.asynccontextmanager
async def replica(name: str) -> AsyncIterator[Replica]:
    async with opened() as desk:
        made = Replica(name, desk)
        yield made
        await made.presence.forwarder.close()


def answered(where: Replica) -> int:
    return where.desk.endpoints.served("double", "").counts().success_count


@pytest.fixture(autouse=True)
def never_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody beats here, however slow the machine is."""
    monkeypatch.setattr(peers, "FRESH_S", 600.0)


@pytest.fixture
async def one() -> AsyncIterator[Replica]:
    async with replica("one") as made:
        yield made


@pytest.fixture
async def two() -> AsyncIterator[Replica]:
    async with replica("two") as made:
        yield made
