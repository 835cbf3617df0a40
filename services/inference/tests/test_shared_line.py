"""Requests of every door stand in one line, so that they share a batch; each model has its own, so
that one that is full or slow keeps no other waiting."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from libs.bus.memory import MemoryBus
from libs.contracts.pipeline import Batching
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference.bodies import Exchange
from services.inference.busdoor import BusDoor
from services.inference.served import Served
from services.inference.tests import web
from services.inference.tests.desk import Desk, double, numbers, opened, refused, request, row
from services.inference.tests.fronts import kinds
from stack.testing import eventually

SUBJECT = "predict.default.gate"
TIMEOUT_S = 30.0


@pytest.fixture
def gate() -> web.Gate:
    made = web.Gate()
    made.model.parallel = 1
    return made


@pytest.fixture(params=kinds())
async def desk(request: pytest.FixtureRequest, gate: web.Gate) -> AsyncIterator[Desk]:
    async with opened(kind=request.param) as made:
        await made.serve("gate", gate.model)
        await made.serve("double", double())
        try:
            yield made
        finally:
            gate.opened.set()


def typed(value: float) -> oip.ModelInferRequest:
    asked = oip.ModelInferRequest(model_name="gate")
    one = asked.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    one.contents.fp32_contents.append(value)
    return asked


def raw(value: float) -> oip.ModelInferRequest:
    return request("gate", row(value), [1, 1])


def listed(value: float) -> dict[str, Any]:
    return web.asked(web.tensor(shape=[1, 1], data=[value]))


async def is_busy(gate: web.Gate) -> None:
    await eventually(lambda: len(gate.model.rows) == 1)


async def wait(served: Served, count: int) -> None:
    await eventually(lambda: served.counts().waiting == count)


async def test_requests_of_every_door_share_a_batch(desk: Desk, gate: web.Gate) -> None:
    served, bus = desk.endpoints.served("gate", ""), MemoryBus()
    door = BusDoor(bus, Exchange(desk.endpoints, desk.service.memory))
    ask = asyncio.ensure_future
    async with web.listening(desk) as http, door.serving():
        await eventually(lambda: SUBJECT in door.open)
        first = ask(desk.stub.ModelInfer(raw(0)))
        await is_busy(gate)
        fast = ask(desk.stub.ModelInfer(raw(1)))
        slow = ask(desk.stub.ModelInfer(typed(2)))
        stream = desk.stub.ModelStreamInfer(iter([raw(3)]))
        streamed = ask(stream.read())
        posted = ask(http.post("/v2/models/gate/infer", json=listed(4)))
        sent = ask(bus.request(SUBJECT, json.dumps(listed(5)).encode(), {}, TIMEOUT_S))
        await wait(served, 5)
        gate.opened.set()
        assert numbers(await first) == [0]
        assert numbers(await fast) == [1]
        assert list((await slow).outputs[0].contents.fp32_contents) == [2]
        assert numbers((await streamed).infer_response) == [3]
        assert (await posted).json()["outputs"][0]["data"] == [4]
        assert json.loads((await sent).payload)["outputs"][0]["data"] == [5]
    assert gate.model.rows == [1, 5]


async def test_a_line_that_is_full_is_its_own_models(desk: Desk, gate: web.Gate) -> None:
    served = desk.endpoints.served("gate", "")
    served.configure(Batching(max_batch_size=1, max_queue_size=2), 0)
    calls = [asyncio.ensure_future(desk.stub.ModelInfer(raw(0)))]
    await is_busy(gate)
    calls += [asyncio.ensure_future(desk.stub.ModelInfer(raw(n))) for n in (1, 2)]
    await wait(served, 2)
    for one in (raw(3), typed(3)):
        assert (await refused(desk.stub.ModelInfer(one)))[0] == "RESOURCE_EXHAUSTED"
    for n in range(20):
        answer = await desk.stub.ModelInfer(request("double", row(n, 0), [1, 2]), timeout=TIMEOUT_S)
        assert numbers(answer) == [2 * n, 0]
    assert served.counts().waiting == 2
    gate.opened.set()
    assert [np.float32(n) for n in range(3)] == [numbers(await call)[0] for call in calls]
