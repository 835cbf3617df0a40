"""KServe's own client against a server with the fixture models: REST as JSON, REST as binary, gRPC.

Runs in an environment of its own, which has `kserve==0.21.0` and nothing of ours:

    python kserve_client.py http://127.0.0.1:8000 127.0.0.1:8001

prints a line for each check and `N passed of N`.
"""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import numpy as np
from kserve import (
    InferenceGRPCClient,
    InferenceRESTClient,
    InferInput,
    InferOutput,
    InferRequest,
    InferResponse,
    RESTConfig,
)
from kserve.protocol.infer_type import RequestedOutput

REST_URL, GRPC_ADDRESS = sys.argv[1:3]
NUMBERS = np.arange(16, dtype=np.int32).reshape(1, 16)
ONES = np.ones((1, 16), np.int32)
IMAGE = np.full((1, 3, 224, 224), 0.5, np.float32)
Check = Callable[[], Awaitable[None]]
CHECKS: list[Check] = []


def check(one: Check) -> Check:
    CHECKS.append(one)
    return one


def given(name: str, values: np.ndarray[Any, Any], binary: bool, datatype: str) -> InferInput:
    tensor = InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


def sum_of(
    binary: bool, model: str = "simple", datatype: str = "INT32", **more: Any
) -> InferRequest:
    kinds = {"INT32": np.int32, "INT8": np.int8, "BYTES": object}
    pair = [one.astype(kinds[datatype]) for one in (NUMBERS, ONES)]
    if datatype == "BYTES":
        pair = [np.vectorize(lambda one: str(one).encode(), otypes=[object])(one) for one in pair]
    inputs = [given(f"INPUT{index}", one, binary, datatype) for index, one in enumerate(pair)]
    return InferRequest(model_name=model, infer_inputs=inputs, **more)


def output(response: InferResponse, name: str) -> InferOutput:
    return next(one for one in response.outputs if one.name == name)


def numbers(response: InferResponse, name: str) -> list[int]:
    return [int(one) for one in output(response, name).as_numpy().reshape(-1)]


def is_sum(response: InferResponse) -> None:
    assert numbers(response, "OUTPUT0") == (NUMBERS + ONES).reshape(-1).tolist()
    assert numbers(response, "OUTPUT1") == (NUMBERS - ONES).reshape(-1).tolist()


@asynccontextmanager
async def rest() -> AsyncIterator[InferenceRESTClient]:
    async with InferenceRESTClient(RESTConfig(protocol="v2", timeout=30)) as client:
        yield client


@asynccontextmanager
async def over_grpc() -> AsyncIterator[InferenceGRPCClient]:
    async with InferenceGRPCClient(GRPC_ADDRESS, timeout=30) as client:
        yield client


async def asked(request: InferRequest, **more: Any) -> InferResponse:
    async with rest() as client:
        return await client.infer(REST_URL, request, model_name=request.model_name, **more)


async def outcome(asking: Awaitable[Any]) -> Any:
    """What it gives, or what it raises."""
    return (await asyncio.gather(asking, return_exceptions=True))[0]


async def refused(request: InferRequest, status: int, said: str) -> None:
    problem: Any = await outcome(asked(request))
    assert isinstance(problem, httpx.HTTPStatusError), problem
    assert (problem.response.status_code, said in str(problem)) == (status, True), problem


@check
async def rest_server_is_live_and_ready() -> None:
    async with rest() as client:
        assert await client.is_server_live(REST_URL) is True
        assert await client.is_server_ready(REST_URL) is True


@check
async def rest_model_is_ready_and_another_is_not() -> None:
    async with rest() as client:
        assert await client.is_model_ready(REST_URL, "simple") is True
        assert await client.is_model_ready(REST_URL, "nobody") is False


@check
async def rest_json_answers() -> None:
    response = await asked(sum_of(binary=False, request_id="mine"))
    is_sum(response)
    assert (response.id, response.model_name) == ("mine", "simple")


@check
async def rest_json_of_strings() -> None:
    is_sum(await asked(sum_of(False, "simple_string", "BYTES")))


@check
async def rest_json_of_bytes() -> None:
    is_sum(await asked(sum_of(False, "simple_int8", "INT8")))


@check
async def rest_json_in_and_binary_out() -> None:
    is_sum(await asked(sum_of(False, parameters={"binary_data_output": True})))


@check
async def rest_json_with_chosen_outputs() -> None:
    request = sum_of(False, request_outputs=[RequestedOutput("OUTPUT1")])
    response = await asked(request)
    assert [one.name for one in response.outputs] == ["OUTPUT1"]


@check
async def rest_json_refuses_another_model() -> None:
    await refused(sum_of(False, "nobody"), 404, "Request for unknown model")


@check
async def rest_json_refuses_another_shape() -> None:
    request = sum_of(False)
    request.inputs[0] = given("INPUT0", NUMBERS[:, :3], False, "INT32")
    await refused(request, 400, "unexpected shape for input 'INPUT0'")


@check
async def rest_binary_answers() -> None:
    is_sum(await asked(sum_of(binary=True)))


@check
async def rest_binary_both_ways() -> None:
    is_sum(await asked(sum_of(True, parameters={"binary_data_output": True})))


@check
async def rest_binary_of_strings_both_ways() -> None:
    request = sum_of(True, "simple_string", "BYTES", parameters={"binary_data_output": True})
    is_sum(await asked(request))


@check
async def rest_binary_for_one_output() -> None:
    outputs = [RequestedOutput("OUTPUT0", {"binary_data": True}), RequestedOutput("OUTPUT1")]
    is_sum(await asked(sum_of(True, request_outputs=outputs)))


@check
async def rest_binary_of_an_image() -> None:
    tensor = given("data_0", IMAGE, True, "FP32")
    request = InferRequest(model_name="densenet_onnx", infer_inputs=[tensor])
    scores = output(await asked(request), "fc6_1").as_numpy()
    assert scores.shape == (1, 1000), scores.shape
    assert abs(float(np.sum(scores)) - 1) < 1e-3


@check
async def rest_classification() -> None:
    tensor = given("data_0", IMAGE, True, "FP32")
    request = InferRequest(
        model_name="densenet_onnx",
        infer_inputs=[tensor],
        request_outputs=[RequestedOutput("fc6_1", {"classification": 2})],
    )
    best = output(await asked(request), "fc6_1").as_numpy().reshape(-1)
    assert [len(str(one).split(":")) for one in best] == [3, 3], best


@check
async def rest_binary_refuses_what_is_cut_short() -> None:
    request = sum_of(True)
    request.inputs[0]._raw_data = request.inputs[0]._raw_data[:-4]
    request.inputs[0].parameters = {"binary_data_size": 60}
    await refused(request, 400, "INPUT0")


@check
async def grpc_server_is_live_and_ready() -> None:
    async with over_grpc() as client:
        assert await client.is_server_live() is True
        assert await client.is_server_ready() is True


@check
async def grpc_model_is_ready_and_another_is_not() -> None:
    async with over_grpc() as client:
        assert await client.is_model_ready("simple") is True
        assert await client.is_model_ready("nobody") is False


@check
async def grpc_raw_answers() -> None:
    async with over_grpc() as client:
        is_sum(await client.infer(sum_of(binary=True)))


@check
async def grpc_typed_answers() -> None:
    async with over_grpc() as client:
        is_sum(await client.infer(sum_of(binary=False)))


@check
async def grpc_strings() -> None:
    async with over_grpc() as client:
        is_sum(await client.infer(sum_of(True, "simple_string", "BYTES")))


@check
async def grpc_keeps_the_id_and_takes_parameters() -> None:
    async with over_grpc() as client:
        request = sum_of(True, request_id="mine", parameters={"timeout": 10_000_000})
        response = await client.infer(request)
        assert response.id == "mine"


@check
async def grpc_refuses_another_model() -> None:
    async with over_grpc() as client:
        problem: Any = await outcome(client.infer(sum_of(True, "nobody")))
        assert isinstance(problem, grpc.aio.AioRpcError), problem
        assert problem.code() is grpc.StatusCode.NOT_FOUND, problem
        assert "Request for unknown model" in str(problem.details())


async def passes(one: Check) -> bool:
    """A client's exception may be of any kind: all of them are failures."""
    problem = await outcome(one())
    name = getattr(one, "__name__", "")
    if problem is None:
        sys.stdout.write(f"passed  {name}\n")
        return True
    sys.stdout.write(f"FAILED  {name}\n")
    traceback.print_exception(problem)
    return False


async def main() -> int:
    passed = sum([await passes(one) for one in CHECKS])
    sys.stdout.write(f"{passed} passed of {len(CHECKS)}\n")
    return int(passed < len(CHECKS))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
