"""Inference over the bus: HTTP's bodies on NATS subjects, shared by replicas and in batches."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from libs.bus import Answer, Bus, NoAnswer
from libs.bus.jetstream import JetStreamBus
from libs.bus.memory import MemoryBus
from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.objectstore import ObjectStore
from services.inference import busdoor
from services.inference.bodies import HEADER_LENGTH, Exchange
from services.inference.busdoor import BusDoor
from services.inference.tensors import Arrays
from services.inference.tests import desk as desks
from services.inference.tests import stage
from services.inference.tests.conftest import ROW as PIXELS
from services.inference.tests.conftest import Replica
from services.inference.tests.desk import Desk, Own, double
from services.inference.tests.stage import Platform
from stack.testing import eventually

SUBJECT = "predict.default.double"
ROW: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}
ASKED = json.dumps({"inputs": [ROW]}).encode()
TIMEOUT_S = 30.0


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desks.opened() as one:
        await one.serve("double", double())
        yield one


@pytest.fixture(params=["jetstream", "memory"])
def either(request: pytest.FixtureRequest, bus: JetStreamBus) -> Bus:
    return MemoryBus() if request.param == "memory" else bus


@contextlib.asynccontextmanager
async def serving(bus: Bus, desk: Desk) -> AsyncIterator[BusDoor]:
    door = BusDoor(bus, Exchange(desk.endpoints, desk.service.memory))
    async with door.serving():
        await eventually(lambda: SUBJECT in door.open)
        yield door


async def told(bus: Bus, body: bytes = ASKED, **headers: str) -> tuple[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = await bus.request(SUBJECT, body, named, TIMEOUT_S)
    return reply.headers["status"], json.loads(reply.payload)


async def test_a_request_is_answered_as_over_http(either: Bus, desk: Desk) -> None:
    async with serving(either, desk):
        status, answer = await told(either, traceparent="")
        assert (status, answer["model_name"], answer["model_version"]) == ("200", "double", "1")
        assert answer["outputs"][0]["data"] == [2, 4]
        assert (await told(either, model_version="1"))[0] == "200"


async def test_binary_tensors_go_both_ways(either: Bus, desk: Desk) -> None:
    raw = np.array([1, 2], np.float32).tobytes()
    one = {**ROW, "data": None, "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [one], "parameters": {"binary_data_output": True}}).encode()
    async with serving(either, desk):
        headers = {HEADER_LENGTH: str(len(head))}
        reply = await either.request(SUBJECT, head + raw, headers, TIMEOUT_S)
    length = int(reply.headers[HEADER_LENGTH])
    assert json.loads(reply.payload[:length])["outputs"][0]["parameters"]["binary_data_size"] == 8
    assert np.frombuffer(reply.payload[length:], np.float32).tolist() == [2, 4]


async def test_what_is_wrong_has_https_status(either: Bus, desk: Desk) -> None:
    broken = json.dumps({"inputs": [{**ROW, "data": [-1, 0]}]}).encode()
    async with serving(either, desk):
        for body, headers, status, said in (
            (b"{", {}, "400", "failed to parse the request JSON"),
            (ASKED, {"model_version": "9"}, "404", "version 9 is not found"),
            (broken, {}, "500", "it cannot"),
        ):
            got, answer = await told(either, body, **headers)
            assert (got, said in answer["error"]) == (status, True), answer
        assert (await told(either))[0] == "200"


async def test_an_answer_too_long_for_a_message_says_so(
    either: Bus, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(busdoor, "ANSWER_BYTES_MAX", 10)
    async with serving(either, desk):
        status, answer = await told(either)
    assert (status, "a message at most 10" in answer["error"]) == ("413", True)


async def test_only_what_is_served_is_answered(either: Bus, desk: Desk) -> None:
    async with serving(either, desk) as door:
        with pytest.raises(NoAnswer):
            await either.request("predict.default.other", ASKED, {}, 1.0)
        await desk.endpoints.remove(("default", "double"))
        await eventually(lambda: not door.open and not door.closing)
        with pytest.raises(NoAnswer):
            await either.request(SUBJECT, ASKED, {}, 1.0)
        await desk.serve("double", double())
        await eventually(lambda: SUBJECT in door.open)
        assert (await told(either))[0] == "200"


def gated(opened: threading.Event) -> Own:
    """Runs wait until it is opened."""
    signature = Signature([Tensor("x", "FP32", [-1, 2])], [Tensor("y", "FP32", [-1, 2])])

    def run(inputs: Arrays) -> Arrays:
        assert opened.wait(60)
        return {"y": inputs["x"]}

    return Own(signature, run)


async def test_requests_share_batches_and_a_full_queue_says_when_to_come_again(
    either: Bus, desk: Desk
) -> None:
    opened = threading.Event()
    model = gated(opened)
    await desk.serve("double", model)
    served = desk.endpoints.served("double", "")
    served.configure(Batching(max_batch_size=8, max_queue_size=16), 0)
    async with serving(either, desk):
        asking = [
            asyncio.create_task(either.request(SUBJECT, ASKED, {}, TIMEOUT_S)) for _ in range(64)
        ]
        done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert (refused.headers["status"], refused.headers["retry-after"]) == ("503", "1")
        assert b"exceeds maximum queue size" in refused.payload
        opened.set()
        statuses = [(await one).headers["status"] for one in asking]
    assert set(statuses) == {"200", "503"}
    assert sum(model.rows) == statuses.count("200")
    assert max(model.rows) > 1


async def test_nobody_waits_longer_than_asked(either: Bus, desk: Desk) -> None:
    opened = threading.Event()
    model = gated(opened)
    await desk.serve("double", model)
    served = desk.endpoints.served("double", "")
    served.configure(Batching(max_batch_size=1, allow_timeout_override=False), 0)
    hurried = json.dumps({"inputs": [ROW], "parameters": {"timeout": 1000}}).encode()
    async with serving(either, desk):
        running = [asyncio.create_task(told(either)) for _ in served.threads]
        await eventually(lambda: len(model.rows) == len(served.threads))
        late = asyncio.create_task(told(either, hurried))
        await eventually(lambda: served.counts().waiting == 1)
        asyncio.get_running_loop().call_later(0.05, opened.set)
        assert {(await one)[0] for one in running} == {"200"}
        status, answer = await late
    assert (status, "ms for its turn" in answer["error"]) == ("504", True)


async def test_what_was_accepted_is_answered_when_the_door_closes(either: Bus, desk: Desk) -> None:
    opened = threading.Event()
    model = gated(opened)
    await desk.serve("double", model)
    async with serving(either, desk):
        asking = asyncio.create_task(told(either))
        await eventually(lambda: model.rows)
        asyncio.get_running_loop().call_later(0.05, opened.set)
    assert (await asking)[0] == "200"
    with pytest.raises(NoAnswer):
        await either.request(SUBJECT, ASKED, {}, 1.0)


async def test_replicas_share_the_requests(bus: JetStreamBus, desk: Desk) -> None:
    async with desks.opened() as other:
        await other.serve("double", double())
        async with serving(bus, desk), serving(bus, other):
            for _ in range(40):
                assert (await told(bus))[0] == "200"
        counts = [
            one.endpoints.served("double", "").counts().success_count for one in (desk, other)
        ]
    assert sum(counts) == 40
    assert min(counts) > 0


async def test_a_replica_of_the_platform_answers(
    replica: Replica, platform: Platform, objects: ObjectStore, bus: JetStreamBus
) -> None:
    await platform.place()
    await platform.deploy(1, await stage.register(objects, 1, 100, stage.digits()))
    await replica.until_announced(1)
    pixels = {"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": PIXELS}
    asked = json.dumps({"inputs": [pixels]}).encode()

    async def answered() -> Any:
        with contextlib.suppress(NoAnswer):
            reply = await bus.request("predict.default.digits", asked, {}, TIMEOUT_S)
            return json.loads(reply.payload)

    answer = await eventually(answered)
    assert (answer["model_version"], answer["outputs"][0]["data"]) == ("1", [1])


async def test_what_nobody_expected_is_an_answer_too(either: Bus, desk: Desk) -> None:
    async with serving(either, desk):
        desk.endpoints.find("double").served["1"].signature = None  # type: ignore[assignment]
        status, answer = await told(either)
    assert (status, "Unexpected" in answer["error"]) == ("500", True)


class Deaf(MemoryBus):
    """Takes no subscription."""

    def respond(self, subject: str, group: str, answer: Answer) -> Any:
        raise OSError("no more subjects")


async def test_a_door_that_cannot_follow_what_is_served_ends_the_service(desk: Desk) -> None:
    door = BusDoor(Deaf(), Exchange(desk.endpoints, desk.service.memory))
    with pytest.raises(ExceptionGroup) as raised:
        async with door.serving():
            await asyncio.Event().wait()
    assert "no more subjects" in str(raised.value.exceptions)
