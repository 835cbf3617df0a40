"""The protocol's servicer on a front, serving small models of the test's own."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import text_format

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.contracts.protos import model_config_pb2 as pb
from libs.contracts.protos import open_inference_pb2 as oip
from libs.contracts.protos import open_inference_pb2_grpc
from services.inference.endpoint import Origin
from services.inference.endpoints import Endpoints
from services.inference.models import RunFailed
from services.inference.notes import Notes
from services.inference.rpc import Host
from services.inference.served import Rates
from services.inference.server import MODEL_INFER, MODEL_STREAM_INFER, OpenInference
from services.inference.tensors import Arrays
from services.inference.tests import fronts

RATES = Rates(traces_per_s=60, log_per_s=0)
BROKEN = -1
STATEFUL = """
name: "sum" max_batch_size: 8
input { name: "x" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_INT32 dims: [ 1 ] }
sequence_batching {
  max_sequence_idle_microseconds: 60000000
  control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }
  state { input_name: "before" output_name: "after" data_type: TYPE_INT32 dims: [ 1 ] }
}
"""


class Own:
    """A model that is a function; `decoupled` ones give each of what it returns."""

    digest = "0" * 64
    platform = "python"
    parallel: int | None = None
    on_crash: Callable[[str], None] | None = None

    def __init__(
        self,
        signature: Signature,
        function: Callable[[Arrays], Any],
        *,
        batched: bool = True,
        decoupled: bool = False,
        labels: dict[str, list[str]] | None = None,
    ) -> None:
        self.signature = signature
        self.function = function
        self.batched = batched
        self.decoupled = decoupled
        self.labels = labels or {}
        self.rows: list[int] = []
        """Of each run."""

    def run(self, inputs: Arrays) -> Arrays:
        self.rows.append(len(next(iter(inputs.values()))))
        outputs: Arrays = self.function(inputs)
        return outputs

    def stream(self, inputs: Arrays) -> Iterator[Arrays]:
        yield from self.function(inputs)

    def close(self) -> None:
        """Nothing is held."""


def echo(datatype: str, shape: list[int], **more: Any) -> Own:
    signature = Signature([Tensor("x", datatype, shape)], [Tensor("y", datatype, shape)])
    return Own(signature, lambda inputs: {"y": inputs["x"]}, **more)


def doubled(inputs: Arrays) -> Arrays:
    if (inputs["x"] == BROKEN).any():
        raise RunFailed("it cannot")
    return {"y": inputs["x"] * 2}


def double() -> Own:
    signature = Signature([Tensor("x", "FP32", [-1, 2])], [Tensor("y", "FP32", [-1, 2])])
    return Own(signature, doubled, labels={"y": ["left", "right"]})


def counter() -> Own:
    """As many answers as it is asked for."""
    signature = Signature([Tensor("x", "INT32", [1])], [Tensor("y", "INT32", [1])])

    def answers(inputs: Arrays) -> Iterator[Arrays]:
        if inputs["x"][0] == BROKEN:
            raise RunFailed("it cannot")
        for number in range(inputs["x"][0]):
            yield {"y": np.array([number], np.int32)}

    return Own(signature, answers, batched=False, decoupled=True)


def running_sum() -> Own:
    signature = Signature([Tensor("x", "INT32", [-1, 1])], [Tensor("y", "INT32", [-1, 1])])

    def add(inputs: Arrays) -> Arrays:
        total = inputs["x"] + inputs["before"]
        return {"y": total, "after": total}

    return Own(signature, add)


class Desk:
    def __init__(self, service: OpenInference, stub: Any, host: Host) -> None:
        self.service = service
        self.endpoints = service.endpoints
        self.stub = stub
        self.host = host

    async def serve(self, name: str, model: Own, config: str = "", version: str = "1") -> None:
        endpoint = self.endpoints.at(("default", name))
        parsed = text_format.Parse(config, pb.ModelConfig()) if config else None
        limits = Batching(max_batch_size=8)
        origin = Origin(model.digest)
        await self.endpoints.add(endpoint, version, model, limits, origin, config=parsed)
        endpoint.direct({version: 100})


async def ready() -> bool:
    return True


@contextlib.asynccontextmanager
async def opened(repository: Any = None, kind: str = "python") -> AsyncIterator[Desk]:
    host = Host([MODEL_INFER, MODEL_STREAM_INFER])
    front = await fronts.opened(kind, host.host)
    endpoints = Endpoints(front, Notes(None, "test", RATES), "default")
    service = OpenInference(endpoints, "triton", ready, repository)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, host)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        yield Desk(service, open_inference_pb2_grpc.GRPCInferenceServiceStub(channel), host)
    await front.close(5)
    await endpoints.close()


@contextlib.asynccontextmanager
async def three(kind: str) -> AsyncIterator[Desk]:
    """`double`, `counter` (decoupled) and `sum` (stateful)."""
    async with opened(kind=kind) as made:
        await made.serve("double", double())
        await made.serve("counter", counter())
        await made.serve("sum", running_sum(), STATEFUL)
        yield made


def request(
    model: str, raw: bytes, shape: list[int], datatype: str = "FP32", **said: Any
) -> oip.ModelInferRequest:
    """One raw input `x`; `said`: the request's parameters."""
    asked = oip.ModelInferRequest(model_name=model, raw_input_contents=[raw])
    asked.inputs.add(name="x", datatype=datatype, shape=shape)
    for name, value in said.items():
        kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
        setattr(asked.parameters[name], kinds[type(value)], value)
    return asked


def row(*values: float) -> bytes:
    return np.array(values, np.float32).tobytes()


def number(value: int) -> bytes:
    return np.array([value], np.int32).tobytes()


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code().name, error.value.details() or ""


def numbers(answer: oip.ModelInferResponse, kind: Any = np.float32) -> list[Any]:
    return list(np.frombuffer(answer.raw_output_contents[0], kind))
