"""A front, native or Python, answers ModelInfer by itself when it is plain, and rightly."""

import asyncio
from time import monotonic_ns
from typing import Any

import grpc
import numpy as np
import pytest

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference import frames, router
from services.inference.front import Lane, Sampling
from services.inference.rpcs import MODEL_INFER
from services.inference.tests.fronts import (
    DIGITS,
    PAIR,
    POST,
    SAID_BY_PYTHON,
    SILENT,
    kinds,
    pair,
    place,
    prefixed,
    refusal,
    request,
    times,
    values,
)
from stack.testing import eventually

pytestmark = pytest.mark.parametrize("kind", kinds())
HEX = set("0123456789abcdef")
PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
Code = grpc.StatusCode


async def test_every_request_gets_its_own_answer(kind: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"3": 100})
        channels = [here.channel() for _ in range(4)]
        infer = [
            one.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                oip.ModelInferRequest.SerializeToString,
                oip.ModelInferResponse.FromString,
            )
            for one in channels
        ]
        sent = [request(n, rows=1 + n % 3, id=f"r{n}" if n % 2 else "") for n in range(400)]
        got = await asyncio.gather(*(infer[n % 4](sent[n], timeout=30) for n in range(400)))
        for n, answer in enumerate(got):
            rows = 1 + n % 3
            assert values(answer) == [3.0 * n] * 4 * rows
            assert (answer.model_name, answer.model_version) == ("digits", "3")
            assert list(answer.outputs[0].shape) == [rows, 4]
            assert answer.id == f"r{n}" if n % 2 else set(answer.id) <= HEX and len(answer.id) == 32
        assert sum(here.sizes) == sum(1 + n % 3 for n in range(400))
        for one in channels:
            await one.close()


async def test_versions_share_requests_as_the_router_says(kind: str) -> None:
    shares = {"1": 70, "2": 30}
    async with place(kind) as here, here.client() as client:
        here.serve_digits(shares)
        got = [(await client.ModelInfer(request())).model_version for _ in range(100)]
        patterns = [[router.choose(shares, n + at) for n in range(100)] for at in range(100)]
        assert got in patterns


async def test_a_version_may_be_named_and_the_route_may_change(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        made = here.serve_digits({"1": 100, "2": 0})
        assert values(await client.ModelInfer(request(model_version="2"))) == [2.0] * 4
        assert values(await client.ModelInfer(request())) == [1.0] * 4
        here.front.route("digits", {"2": 100}, {"2": made["2"]})
        assert values(await client.ModelInfer(request())) == [2.0] * 4
        gone = await refusal(client.ModelInfer(request(model_version="1")))
        assert gone == (Code.INVALID_ARGUMENT, SAID_BY_PYTHON)
        here.front.route("digits", {}, {})
        assert await refusal(client.ModelInfer(request())) == gone


async def test_several_inputs_in_any_order_and_some_outputs(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        batcher = here.serve(Lane("pair", "1", PAIR, batched=True, opaque=False), pair)
        here.front.route("pair", {"1": 100}, {"1": batcher})
        a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([5, 6], np.int64)
        inputs = [
            {"name": "b", "datatype": "INT64", "shape": [2]},
            {"name": "a", "datatype": "FP32", "shape": [2, 2]},
        ]
        about: Any = {"model_name": "pair", "inputs": inputs}
        sent = oip.ModelInferRequest(**about, raw_input_contents=[b.tobytes(), a.tobytes()])
        for _ in range(2):
            answer = await client.ModelInfer(sent)
            assert [one.name for one in answer.outputs] == ["s", "t"]
            assert values(answer) == [2.0, 3.0, 4.0, 5.0]
            assert np.frombuffer(answer.raw_output_contents[1], np.int64).tolist() == [10, 12]
        for names in (["t"], ["t", "s"]):
            about["outputs"] = [{"name": name} for name in names]
            sent = oip.ModelInferRequest(**about, raw_input_contents=[b.tobytes(), a.tobytes()])
            answer = await client.ModelInfer(sent)
            known = {"s": (a + 1).tobytes(), "t": (b * 2).tobytes()}
            got = zip(answer.outputs, answer.raw_output_contents, strict=True)
            assert {one.name: raw for one, raw in got} == {name: known[name] for name in names}


async def test_where_rows_have_no_meaning_each_request_runs_alone(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        lane = Lane("digits", "1", DIGITS, batched=False, opaque=False)
        here.front.route("digits", {"1": 100}, {"1": here.serve(lane, times(2))})
        got = await asyncio.gather(*(client.ModelInfer(request(n, rows=3)) for n in range(8)))
        assert [values(one) for one in got] == [[2.0 * n] * 12 for n in range(8)]
        assert here.sizes == [1] * 8


def tensor(**about: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], **about}]}


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "unknown model": {"model_name": "letters"},
    "unknown version": {"model_version": "9"},
    "typed contents": {**tensor(contents={"fp32_contents": [1] * 4}), "raw_input_contents": []},
    "both contents": tensor(contents={"fp32_contents": [1] * 4}),
    "unknown input": tensor(name="z"),
    "wrong datatype": tensor(datatype="FP64"),
    "wrong shape": tensor(shape=[1, 2, 2]),
    "negative dimension": tensor(shape=[-1, 4]),
    "no rows": {**tensor(shape=[0, 4]), "raw_input_contents": [b""]},
    "huge shape": tensor(shape=[1 << 62, 4]),
    "fewer bytes": {"raw_input_contents": [bytes(15)]},
    "more bytes": {"raw_input_contents": [bytes(17)]},
    "no bytes": {"raw_input_contents": [b""]},
    "two contents": {"raw_input_contents": [bytes(16), bytes(16)]},
    "an input twice": {
        "inputs": tensor()["inputs"] * 2,
        "raw_input_contents": [bytes(16), bytes(16)],
    },
    "too many rows": {**tensor(shape=[65, 4]), "raw_input_contents": [bytes(65 * 16)]},
    "unknown output": {"outputs": [{"name": "z"}]},
    "an output with a parameter": {
        "outputs": [{"name": "y", "parameters": {"classification": {"int64_param": 1}}}]
    },
    "an input with a parameter": tensor(parameters={"binary_data_size": {"int64_param": 16}}),
    "a sequence": {"parameters": {"sequence_id": {"int64_param": 1}}},
    "a timeout that is text": {"parameters": {"timeout": {"string_param": "1"}}},
    "an id that cannot be printed": {"id": "a\nb"},
}


@pytest.mark.parametrize("what", NOT_PLAIN)
async def test_what_is_not_plain_is_for_python_to_judge(kind: str, what: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.serve_digits({"1": 100})
        for _ in range(2):
            answer = await refusal(client.ModelInfer(request(**NOT_PLAIN[what])))
            assert answer == (Code.INVALID_ARGUMENT, SAID_BY_PYTHON)
        assert values(await client.ModelInfer(request())) == [1.0] * 4


async def test_limits_that_are_lowered_as_a_request_comes_are_pythons_to_tell(kind: str) -> None:
    """It was read under the old ones, and joins under the new."""
    if kind != "python":
        pytest.skip("it is about a round of the Python loop")
    async with place(kind) as here:
        (batcher,) = here.serve_digits({"1": 100}).values()
        raw = await here.raw()
        await raw.say(
            raw.hello() + raw.ask(MODEL_INFER, prefixed(request(rows=4).SerializeToString()))
        )
        while not here.front.arrivals:  # type: ignore[attr-defined]  # noqa: ASYNC110 - in its round of the loop
            await asyncio.sleep(0)
        batcher.configure(Batching(max_batch_size=2), SILENT)
        headers: dict[str, str] = {}
        while "grpc-status" not in headers:
            headers = await raw.headers()
        assert headers["grpc-status"] == str(Code.INVALID_ARGUMENT.value[0])


async def test_plain_parameters_are_taken(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.serve_digits({"1": 100}, limits=Batching(priority_levels=2))
        parameters: Any = {
            "timeout": {"int64_param": 10_000_000},
            "priority": {"uint64_param": 1},
            "triton_enable_empty_final_response": {"bool_param": True},
        }
        assert values(await client.ModelInfer(request(parameters=parameters))) == [1.0] * 4


async def test_an_opaque_lane_is_pythons_alone(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        lane = Lane("digits", "1", DIGITS, batched=True, opaque=True)
        here.front.route("digits", {"1": 100}, {"1": here.serve(lane, times(1))})
        answer = await refusal(client.ModelInfer(request()))
        assert answer == (Code.INVALID_ARGUMENT, SAID_BY_PYTHON)


async def test_a_full_queue_says_so_and_when_to_come_back(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.go.clear()
        limits = Batching(max_queue_size=2, max_batch_size=1)
        batcher = here.serve_digits({"1": 100}, limits=limits)["1"]
        calls = [client.ModelInfer(request()) for _ in range(2)]
        await eventually(lambda: batcher.counts().waiting == 2)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await client.ModelInfer(request())
        assert raised.value.code() is Code.RESOURCE_EXHAUSTED
        assert raised.value.details() == (
            "exceeds maximum queue size of model 'digits' version 1: 2 requests wait already"
        )
        assert ("retry-after", "1") in [tuple(one) for one in raised.value.trailing_metadata()]
        here.go.set()
        assert [values(await call) for call in calls] == [[1.0] * 4] * 2


async def test_who_waited_too_long_is_told(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.go.clear()
        batcher = here.serve_digits({"1": 100}, limits=Batching(max_batch_size=1))["1"]
        parameters: Any = {"timeout": {"int64_param": 1000}}
        call = client.ModelInfer(request(parameters=parameters))
        await eventually(lambda: batcher.counts().waiting == 1)
        waits_ns = monotonic_ns()
        await eventually(lambda: monotonic_ns() > waits_ns + 2_000_000)
        here.go.set()
        assert await refusal(call) == (Code.UNAVAILABLE, "Request timeout expired")


async def test_who_is_past_its_callers_deadline_is_told_and_not_computed(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.go.clear()
        batcher = here.serve_digits({"1": 100})["1"]
        raw = await here.raw()
        head = [(b":path", MODEL_INFER.encode()), *POST, (b"grpc-timeout", b"100m")]
        said = frames.frame(frames.HEADERS, frames.END_HEADERS, 1, frames.block(head))
        body = prefixed(request(5.0).SerializeToString())
        said += frames.frame(frames.DATA, frames.END_STREAM, 1, body)
        await raw.say(raw.hello() + said)
        await eventually(lambda: batcher.counts().waiting == 1)
        over_ns = monotonic_ns() + 100_000_000
        await eventually(lambda: monotonic_ns() > over_ns)
        here.go.set()
        assert (await raw.headers())["grpc-status"] == "4"
        assert values(await client.ModelInfer(request(6.0))) == [6.0] * 4
        assert here.sizes == [1]


async def test_python_finds_out_who_answers_for_a_version_that_is_gone(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.serve_digits({"1": 100})["1"].close()
        answer = await refusal(client.ModelInfer(request()))
        assert answer == (Code.INVALID_ARGUMENT, SAID_BY_PYTHON)


async def test_a_request_whose_client_leaves_is_not_computed(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.go.clear()
        batcher = here.serve_digits({"1": 100})["1"]
        left, kept = client.ModelInfer(request(5)), client.ModelInfer(request(6))
        await eventually(lambda: batcher.counts().waiting == 2)
        left.cancel()
        await eventually(lambda: batcher.counts().waiting == 1)
        here.go.set()
        assert values(await kept) == [6.0] * 4
        assert sum(here.sizes) == 1


async def test_a_traced_request_is_told_its_place(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.serve_digits({"1": 100})
        answer = await client.ModelInfer(request(id="mine"), metadata=(("traceparent", PARENT),))
        version, trace, span, flags = answer.parameters["traceparent"].string_param.split("-")
        assert (version, trace, flags, answer.id) == ("00", PARENT.split("-")[1], "01", "mine")
        assert span != PARENT.split("-")[2]
        assert values(answer) == [1.0] * 4
        assert not (await client.ModelInfer(request())).parameters


async def test_notes_name_what_is_logged(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.go.clear()
        lane = Lane("digits", "1", DIGITS, batched=True, opaque=False)
        batcher = here.front.batcher(lane)
        batcher.configure(Batching(), Sampling(0.0, 100, 100.0))
        here.front.route("digits", {"1": 100}, {"1": batcher})
        calls = [client.ModelInfer(request(n, rows=2, id=f"r{n}")) for n in range(3)]
        await eventually(lambda: batcher.counts().waiting == 3)
        batch = await asyncio.to_thread(batcher.take)
        assert batch is not None
        notes = sorted(batch.notes, key=lambda note: note.start)
        assert [(note.start, note.stop) for note in notes] == [(0, 2), (2, 4), (4, 6)]
        assert {note.id for note in notes} == {"r0", "r1", "r2"}
        inputs = batch.inputs()["x"]
        assert all(int(note.id[1]) == inputs[note.start, 0] for note in notes)
        batch.answer({"y": inputs})
        assert [values(await call) for call in calls] == [[float(n)] * 8 for n in range(3)]
        batcher.close()


async def test_a_batch_that_fails_may_be_run_one_by_one(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        lane = Lane("digits", "1", DIGITS, batched=True, opaque=False)
        batcher = here.front.batcher(lane)
        batcher.configure(Batching(), Sampling(0.0, 0, 0.0))
        here.front.route("digits", {"1": 100}, {"1": batcher})
        calls = [client.ModelInfer(request(n)) for n in range(2)]
        await eventually(lambda: batcher.counts().waiting == 2)
        batch = await asyncio.to_thread(batcher.take)
        assert batch is not None
        for one in batch.split():
            inputs = one.inputs()["x"]
            if inputs[0, 0] == 0:
                one.fail(13, "model 'digits' version 1 failed: zero")
            else:
                one.answer({"y": inputs})
        failed = await refusal(calls[0])
        assert failed == (Code.INTERNAL, "model 'digits' version 1 failed: zero")
        assert values(await calls[1]) == [1.0] * 4
        batcher.close()


async def test_a_large_inference_is_answered(kind: str) -> None:
    signature = Signature(
        [Tensor("x", "FP32", [-1, -1])],
        [Tensor("y", "FP32", [-1, -1])],
    )
    async with place(kind) as here, here.client() as client:
        lane = Lane("digits", "1", signature, batched=True, opaque=False)
        here.front.route("digits", {"1": 100}, {"1": here.serve(lane, times(2))})
        array = np.arange(2_600_000, dtype=np.float32).reshape(2, -1)
        about: Any = {"inputs": [{"name": "x", "datatype": "FP32", "shape": array.shape}]}
        sent = request(**about, raw_input_contents=[array.tobytes()])
        answer = await client.ModelInfer(sent, timeout=60)
        assert answer.raw_output_contents[0] == (array * 2).tobytes()
        assert list(answer.outputs[0].shape) == [2, 1_300_000]
