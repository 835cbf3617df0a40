"""The application of port 8000 on a real port, and what its tests ask it."""

import contextlib
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from libs.contracts.artifacts import Signature, Tensor
from libs.doors.serve import http_door
from services.inference.rest import app_of
from services.inference.tensors import Arrays
from services.inference.tests import desk as desks
from services.inference.tests.desk import Desk, Own, double

INFER = "/v2/models/double/infer"


class Shelf:
    """A repository that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def load(self, name: str, config: str = "", files: Mapping[str, bytes] = {}) -> None:
        self.told.append((name, config, dict(files)))

    async def unload(self, name: str) -> None:
        self.told.append(name)

    async def index(self, ready_only: bool) -> list[tuple[str, str, str, str]]:
        rows = [("double", "1", "READY", ""), ("other", "", "UNAVAILABLE", "no graph")]
        return rows[:1] if ready_only else rows


class Gate:
    """A model whose runs wait until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        signature = Signature([Tensor("x", "FP32", [-1, 1])], [Tensor("y", "FP32", [-1, 1])])
        self.model = Own(signature, self.run)

    def run(self, inputs: Arrays) -> Arrays:
        assert self.opened.wait(60)
        return {"y": inputs["x"]}


@contextlib.asynccontextmanager
async def listening(desk: Desk, *tokens: str) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        http_door("127.0.0.1", 0, app_of(desk.service, tokens)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        yield client


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[Desk]:
    """A model that doubles, one with many answers, one that sums up a sequence."""
    async with desks.opened(Shelf()) as one:
        await one.serve("double", double())
        await one.serve("counter", desks.counter())
        await one.serve("sum", desks.running_sum(), desks.STATEFUL)
        yield one


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2], **changes}


def asked(*tensors: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"inputs": list(tensors or [tensor()]), **fields}
