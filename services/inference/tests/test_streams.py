"""Streams: answers in order or as they come, errors among them, sequences with their state."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from libs.contracts.protos import open_inference_pb2 as oip
from libs.doors import Unavailable
from services.inference import served
from services.inference.responses import PLACES_MAX, Responses
from services.inference.streams import PENDING_MAX
from services.inference.tensors import Arrays
from services.inference.tests.desk import (
    BROKEN,
    STATEFUL,
    Desk,
    counter,
    double,
    doubled,
    number,
    numbers,
    request,
    row,
    running_sum,
    three,
)
from services.inference.tests.fronts import kinds
from stack.testing import eventually


@pytest.fixture(params=kinds())
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    async with three(request.param) as made:
        yield made


async def streamed(desk: Desk, *asked: oip.ModelInferRequest) -> list[oip.ModelStreamInferResponse]:
    return [one async for one in desk.stub.ModelStreamInfer(iter(asked))]


def is_final(answer: oip.ModelStreamInferResponse) -> bool:
    return answer.infer_response.parameters["triton_final_response"].bool_param


async def test_a_stream_answers_in_order_and_shares_batches(desk: Desk) -> None:
    count = 3 * PENDING_MAX
    model, go_on = double(), threading.Event()

    def held(inputs: Arrays) -> Arrays:
        assert go_on.wait(60)
        return doubled(inputs)

    model.function = held
    await desk.serve("double", model)
    version = desk.endpoints.served("double", "")
    asked = [request("double", row(n, 0), [1, 2]) for n in range(count)]
    for n, one in enumerate(asked):
        one.id = f"r{n}"
    answering = asyncio.create_task(streamed(desk, *asked))
    await eventually(lambda: version.batcher.counts().waiting > 1)
    go_on.set()
    answers = await answering
    assert [one.infer_response.id for one in answers] == [f"r{n}" for n in range(count)]
    assert [numbers(one.infer_response)[0] for one in answers] == [2 * n for n in range(count)]
    assert all(is_final(one) for one in answers)
    assert max(model.rows) > 1


async def test_an_error_in_a_stream_is_an_answer(desk: Desk) -> None:
    bad = request("nobody", b"", [1])
    bad.id = "mine"
    answers = await streamed(desk, request("double", row(1, 2), [1, 2]), bad, bad)
    assert [bool(one.error_message) for one in answers] == [False, True, True]
    assert answers[1].error_message == "Request for unknown model: 'nobody' is not found"
    assert answers[1].infer_response.id == "mine"


@pytest.mark.parametrize("empty_final", [True, False])
async def test_a_decoupled_model_answers_as_often_as_it_likes(
    desk: Desk, empty_final: bool
) -> None:
    said = {"triton_enable_empty_final_response": empty_final}
    asked = [request("counter", number(n), [1], "INT32", **said) for n in (3, 0)]
    asked[0].id, asked[1].id = "three", "none"
    answers = [one.infer_response for one in await streamed(desk, *asked)]
    three = [one for one in answers if one.id == "three"]
    assert [numbers(one, np.int32) for one in three if one.outputs] == [[0], [1], [2]]
    finals = [one.id for one in answers if one.parameters["triton_final_response"].bool_param]
    assert sorted(finals) == (["none", "three"] if empty_final else [])
    assert all(one.model_version == "1" for one in answers)


async def test_a_stream_that_runs_comes_to_its_end_before_its_version_is_unloaded(
    desk: Desk,
) -> None:
    call = desk.stub.ModelStreamInfer(iter([request("counter", number(50), [1], "INT32")]))
    answers = [await anext(aiter(call))]
    await asyncio.create_task(desk.endpoints.find("counter").unload("1"))
    answers += [one async for one in call]
    assert [numbers(one.infer_response, np.int32) for one in answers] == [[n] for n in range(50)]


async def test_a_stream_that_outlasts_its_version_says_so(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "STREAMS_END_S", 0.01)
    stream = desk.endpoints.served("counter", "").stream({"x": np.array([9], np.int32)}, 0)
    await anext(stream)
    await desk.endpoints.find("counter").unload("1")
    with pytest.raises(Unavailable, match="model 'counter' version 1 is being unloaded"):
        await anext(stream)


async def test_a_stream_holds_its_place_for_as_long_as_its_thread(desk: Desk) -> None:
    model, running, go_on = counter(), threading.Event(), threading.Event()

    def silent(inputs: Arrays) -> Iterator[Arrays]:
        running.set()
        assert go_on.wait(60)
        yield from ()

    model.function = silent
    await desk.serve("counter", model)
    version = desk.endpoints.served("counter", "")

    async def read() -> None:
        async for _ in version.stream({"x": np.array([9], np.int32)}, 0):
            pass

    reading = asyncio.create_task(read())
    assert await asyncio.to_thread(running.wait, 60)
    reading.cancel()
    await asyncio.wait([reading])
    await asyncio.sleep(0)  # what would be given back is
    assert version.streams == 1
    go_on.set()
    await eventually(lambda: version.streams == 0)


async def test_a_decoupled_model_that_fails_says_so(desk: Desk) -> None:
    (answer,) = await streamed(desk, request("counter", number(BROKEN), [1], "INT32"))
    assert answer.error_message == "model 'counter' version 1 failed: it cannot"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"y": np.array([1], np.int64)}, "output 'y' has int64, its signature int32"),
        ({"z": np.array([1], np.int32)}, "it has no output 'z'"),
        (None, "Unexpected <class 'TypeError'>"),
    ],
    ids=["another datatype", "another name", "no arrays"],
)
async def test_what_a_decoupled_model_gives_is_checked(
    desk: Desk, given: Arrays | None, said: str
) -> None:
    """And whatever goes wrong is this request's answer."""
    model = counter()
    model.function = lambda inputs: iter([given or 7])
    await desk.serve("counter", model)
    asked = [request("counter", number(1), [1], "INT32"), request("double", row(1, 2), [1, 2])]
    asked[0].id, asked[1].id = "bad", "good"
    answers = {one.infer_response.id: one for one in await streamed(desk, *asked)}
    assert said in answers["bad"].error_message
    assert is_final(answers["bad"])
    assert numbers(answers["good"].infer_response) == [2, 4]


async def test_the_last_word_names_the_version_that_answered(desk: Desk) -> None:
    await desk.serve("counter", counter(), version="2")
    endpoint = desk.endpoints.find("counter")
    endpoint.direct({"1": 60, "2": 40})
    said = {"triton_enable_empty_final_response": True}
    asked = [request("counter", number(1), [1], "INT32", **said) for _ in range(10)]
    for n, one in enumerate(asked):
        one.id = str(n)
    versions: dict[str, set[str]] = {}
    for answer in await streamed(desk, *asked):
        named = answer.infer_response
        versions.setdefault(named.id, set()).add(named.model_version)
    assert {len(found) for found in versions.values()} == {1}
    assert set.union(*versions.values()) == {"1", "2"}


async def test_streams_are_counted_once_they_are_over(desk: Desk) -> None:
    asked = [request("counter", number(n), [1], "INT32") for n in (3, 0, BROKEN)]
    await streamed(desk, *asked)
    named = oip.ModelStatisticsRequest(name="counter")
    (found,) = (await desk.stub.ModelStatistics(named)).model_stats
    assert (found.inference_count, found.execution_count) == (2, 2)
    assert found.inference_stats.success.count == 2
    assert found.inference_stats.success.ns >= found.inference_stats.compute_infer.ns > 0
    assert found.inference_stats.fail.count == 1
    counts = {n: (one.success.count, one.fail.count) for n, one in found.response_stats.items()}
    assert counts == {"0": (1, 1), "1": (1, 0), "2": (1, 0)}


def test_a_long_stream_takes_no_more_room() -> None:
    responses = Responses()
    for place in range(10 * PLACES_MAX):
        responses.answered(place, 2)
    assert len(responses.by_place) == PLACES_MAX
    last = responses.by_place[PLACES_MAX - 1]
    assert (last.success, last.success_ns) == (9 * PLACES_MAX + 1, 2 * (9 * PLACES_MAX + 1))


async def test_many_answers_wait_for_a_slow_reader(desk: Desk) -> None:
    stream = desk.stub.ModelStreamInfer(iter([request("counter", number(500), [1], "INT32")]))
    found = [numbers((await stream.read()).infer_response, np.int32)[0] for _ in range(500)]
    assert found == list(range(500))
    stream.cancel()


async def test_a_sequence_keeps_its_state_over_a_stream_and_over_calls(desk: Desk) -> None:
    asked = [
        request("sum", number(x), [1, 1], "INT32", sequence_id=sequence, **said)
        for x, said in ((1, {"sequence_start": True}), (2, {}), (3, {"sequence_end": True}))
        for sequence in (7, "seven")
    ]
    answers = [numbers(one.infer_response, np.int32)[0] for one in await streamed(desk, *asked)]
    assert answers == [1, 1, 3, 3, 6, 6]
    calls = [numbers(await desk.stub.ModelInfer(one), np.int32)[0] for one in asked]
    assert calls == [1, 1, 3, 3, 6, 6]


async def test_a_sequence_stays_with_its_version(desk: Desk) -> None:
    """Of two versions that share the requests, each sequence has one."""
    await desk.serve("sum", running_sum(), STATEFUL, version="2")
    desk.endpoints.at(("default", "sum")).direct({"1": 50, "2": 50})
    versions: dict[int, set[str]] = {}
    for said in ({"sequence_start": True}, {}, {"sequence_end": True}):
        for sequence in range(1, 7):
            asked = request("sum", number(1), [1, 1], "INT32", sequence_id=sequence, **said)
            answer = await desk.stub.ModelInfer(asked)
            versions.setdefault(sequence, set()).add(answer.model_version)
    assert all(len(one) == 1 for one in versions.values())
    assert set.union(*versions.values()) == {"1", "2"}


async def test_a_client_that_goes_takes_its_stream_with_it(desk: Desk) -> None:
    asked = asyncio.Event()

    async def requests() -> AsyncIterator[oip.ModelInferRequest]:
        yield request("counter", number(1_000_000), [1], "INT32")
        asked.set()
        await asyncio.Event().wait()

    stream = desk.stub.ModelStreamInfer(requests())
    await stream.read()
    await asked.wait()
    stream.cancel()
    version = desk.endpoints.served("counter", "")
    await eventually(lambda: version.streams == 0)
