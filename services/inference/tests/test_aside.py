"""Who sends or gets many values keeps nobody waiting, loses nothing by it, and has a bound."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.protos import open_inference_pb2 as oip
from libs.doors import NotFound
from services.inference import aside
from services.inference.calls import Answer, Call
from services.inference.tensors import TOGETHER, Arrays, Given
from services.inference.tests import web
from services.inference.tests.desk import STATEFUL, Desk, Own, double, echo, opened, refused
from services.inference.tests.fronts import kinds

PATIENCE_S = 60.0
WIDE = aside.IN_PLACE_BYTES // 8 + 1
"""Values that are read beside the event loop."""
ROUNDS = 5


class Held(Sequence[float]):
    """Ones that cannot be read before they may."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()

    def __len__(self) -> int:
        return WIDE

    def __getitem__(self, index: Any) -> Any:
        self.asked.set()
        assert self.go_on.wait(PATIENCE_S)
        return [1.0] * len(range(*index.indices(WIDE)))


class Text:
    """A string of an answer that cannot be written before it may."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()

    def __str__(self) -> str:
        self.asked.set()
        assert self.go_on.wait(PATIENCE_S)
        return "at last"


@pytest.fixture(params=kinds())
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    async with opened(kind=request.param) as made:
        await made.serve("double", double())
        await made.serve("wide", echo("FP32", [-1, -1]))
        yield made


def typed(model: str, values: Sequence[float]) -> oip.ModelInferRequest:
    """Answered on the event loop, whatever the front."""
    asked = oip.ModelInferRequest(model_name=model)
    one = asked.inputs.add(name="x", datatype="FP32", shape=[1, len(values)])
    one.contents.fp32_contents.extend(values)
    return asked


async def others_are_answered(desk: Desk) -> None:
    answer = await desk.stub.ModelInfer(typed("double", [1, 2]), timeout=PATIENCE_S)
    assert list(answer.outputs[0].contents.fp32_contents) == [2, 4]


def reading(desk: Desk, values: Held, version: str = "") -> "asyncio.Task[Answer]":
    given = [Given("x", "FP32", [1, WIDE], values=values)]
    call = Call("wide", version, "", given, [], 0, "")
    return asyncio.create_task(desk.endpoints.infer(call))


async def is_asked(held: Held | Text) -> None:
    assert await asyncio.to_thread(held.asked.wait, PATIENCE_S)


async def test_others_are_answered_while_a_large_request_is_read(desk: Desk) -> None:
    values = Held()
    large = reading(desk, values)
    await is_asked(values)
    await others_are_answered(desk)
    values.go_on.set()
    ((_, array),) = (await large).outputs
    assert array.tolist() == [[1.0] * WIDE]


async def test_a_version_that_goes_while_a_request_is_read_is_followed_by_the_next(
    desk: Desk,
) -> None:
    any_version, first = Held(), Held()
    calls = [reading(desk, any_version), reading(desk, first, version="1")]
    await is_asked(any_version)
    await is_asked(first)
    await desk.serve("wide", echo("FP32", [-1, -1]), version="2")
    await desk.endpoints.find("wide").unload("1")
    for held in (any_version, first):
        held.go_on.set()
    assert (await calls[0]).version == "2"
    with pytest.raises(NotFound, match="version 1 is not found"):
        await calls[1]


async def unary(desk: Desk) -> list[bytes]:
    answer = await desk.stub.ModelInfer(typed("texts", [1]))
    return list(answer.outputs[0].contents.bytes_contents)


async def stream(desk: Desk) -> list[bytes]:
    asked = iter([typed("texts", [1])])
    (answer,) = [one async for one in desk.stub.ModelStreamInfer(asked)]
    return list(answer.infer_response.outputs[0].contents.bytes_contents)


async def http(desk: Desk) -> list[bytes]:
    async with web.listening(desk) as client:
        one = web.tensor(shape=[1, 1], data=[1])
        answer = await client.post("/v2/models/texts/infer", json=web.asked(one))
    return [text.encode() for text in answer.json()["outputs"][0]["data"]]


@pytest.mark.parametrize("door", [unary, stream, http])
async def test_others_are_answered_while_a_large_answer_is_written(
    desk: Desk, door: Callable[[Desk], Awaitable[list[bytes]]]
) -> None:
    text = Text()

    def write(inputs: Arrays) -> Arrays:
        array = np.full((1, WIDE), "a", object)
        array[0, -1] = text
        return {"y": array}

    signature = Signature([Tensor("x", "FP32", [-1, 1])], [Tensor("y", "BYTES", [-1, -1])])
    await desk.serve("texts", Own(signature, write))
    large = asyncio.ensure_future(door(desk))
    await is_asked(text)
    await others_are_answered(desk)
    text.go_on.set()
    assert await large == [b"a"] * (WIDE - 1) + [b"at last"]


async def test_many_values_come_back_in_their_order(desk: Desk) -> None:
    values = [float(number) for number in range(3 * TOGETHER + 1)]
    answer = await desk.stub.ModelInfer(typed("wide", values))
    assert list(answer.outputs[0].contents.fp32_contents) == values
    async with web.listening(desk) as client:
        one = web.tensor(shape=[1, len(values)], data=values)
        body = await client.post("/v2/models/wide/infer", json=web.asked(one))
    assert body.json()["outputs"][0]["data"] == values


async def test_a_large_request_keeps_its_place_in_its_sequence(desk: Desk) -> None:
    """The one behind it is read at once."""

    def add(inputs: Arrays) -> Arrays:
        total = inputs["x"] + inputs["before"]
        return {"y": total, "after": total}

    tensors = [Tensor("x", "INT32", [-1, WIDE])], [Tensor("y", "INT32", [-1, WIDE])]
    config = STATEFUL.replace("dims: [ 1 ]", f"dims: [ {WIDE} ]")
    await desk.serve("sum", Own(Signature(*tensors), add), config)
    for sequence in range(1, ROUNDS + 1):
        first, second = (oip.ModelInferRequest(model_name="sum") for _ in range(2))
        for one in (first, second):
            one.inputs.add(name="x", datatype="INT32", shape=[1, WIDE])
            one.parameters["sequence_id"].int64_param = sequence
        first.parameters["sequence_start"].bool_param = True
        first.inputs[0].contents.int_contents.extend([1] * WIDE)
        second.parameters["sequence_end"].bool_param = True
        second.raw_input_contents.append(np.full(WIDE, 2, np.int32).tobytes())
        answers = [one async for one in desk.stub.ModelStreamInfer(iter([first, second]))]
        assert [one.error_message for one in answers] == ["", ""]
        raw = answers[1].infer_response.raw_output_contents[0]
        assert set(np.frombuffer(raw, np.int32)) == {3}


async def test_a_long_body_is_read_aside(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before it is known what of it are values."""
    monkeypatch.setattr(aside, "ASIDE_BYTES_MAX", aside.IN_PLACE_BYTES)
    path = "/v2/models/double/infer"
    async with web.listening(desk) as client:
        long = web.asked(parameters={"note": "a" * aside.IN_PLACE_BYTES})
        answer = await client.post(path, json=long)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (await client.post(path, json=web.asked())).status_code == 200


async def test_all_that_is_read_together_is_bounded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "ASIDE_BYTES_MAX", WIDE * 8 + 1)
    values = Held()
    large = reading(desk, values)
    await is_asked(values)
    code, said = await refused(desk.stub.ModelInfer(typed("wide", [1.0] * WIDE)))
    assert (code, said.split()[0]) == ("RESOURCE_EXHAUSTED", str(WIDE * 8))
    await others_are_answered(desk)
    values.go_on.set()
    await large
    assert aside.ASIDE.held == 0
    await desk.stub.ModelInfer(typed("wide", [1.0] * WIDE))
