"""An inference request as JSON with binary tensors behind it, and its answer in the same form.

HTTP and the bus carry these bodies. The JSON's length travels in the header `HEADER_LENGTH` where
binary tensors follow; they come in the order in which the JSON names them.
"""

import re
from collections.abc import Mapping, Sequence
from time import monotonic_ns
from typing import Any, NamedTuple

import msgspec

from libs.bus import TRACE_HEADER
from libs.contracts.artifacts import Tensor
from libs.doors import Invalid
from services.inference import tensors
from services.inference.aside import aside
from services.inference.calls import Answer, Call, Parameter
from services.inference.classification import classes_of, classified
from services.inference.endpoints import Endpoints
from services.inference.protocol import RESERVED, Wish, empty_final_of
from services.inference.server import Unsupported
from services.inference.sharedmemory import SharedMemory, Window
from services.inference.tensors import Array, Given, flattened

HEADER_LENGTH = "Inference-Header-Content-Length"
LENGTH = re.compile(r"\d{1,18}", re.ASCII)
JSON = "application/json"
BINARY = "application/octet-stream"
BINARY_ONLY = ("FP16", "BF16")
"""Datatypes that have no JSON form, as Triton has it."""
NS, US = 1e9, 1000
"""In ns: a second, a microsecond."""
BINARY_SIZE = "binary_data_size"
BINARY_ALL = "binary_data_output"
Values = tuple[Any, ...] | None
"""Flat, row-major; None of an input whose values are elsewhere."""


class InputTensor(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Parameter] = {}
    data: list[Any] | None = None


class OutputTensor(msgspec.Struct, frozen=True):
    name: str
    parameters: dict[str, Parameter] = {}


class InferRequest(msgspec.Struct, frozen=True):
    inputs: list[InputTensor]
    id: str = ""
    parameters: dict[str, Parameter] = {}
    outputs: list[OutputTensor] = []


class AnsweredTensor(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Parameter] = {}
    data: list[Any] | msgspec.UnsetType = msgspec.UNSET
    """Flat, row-major; absent where it is in shared memory or behind the JSON."""


class InferResponse(msgspec.Struct):
    model_name: str
    model_version: str
    id: str
    parameters: dict[str, Parameter]
    outputs: list[AnsweredTensor]


class Body(NamedTuple):
    payload: bytes
    header_length: int = 0
    """Of the JSON; 0 where nothing follows it."""


class Exchange:
    """One request after the other, whatever carried it."""

    def __init__(self, endpoints: Endpoints, memory: SharedMemory) -> None:
        self.endpoints = endpoints
        self.memory = memory

    async def infer(
        self,
        model: str,
        version: str,
        body: bytes,
        header_length: str | None,
        traceparent: str,
        patience_s: float = 0,
    ) -> Body:
        """Raises `Refused`. `patience_s`: what a caller waits at most, by the request's `timeout`
        perhaps less; 0 for as long as it takes."""
        request, values, binary = await aside(len(body), split, body, header_length)
        given = given_of(request, values, binary, self.memory)
        wishes = wishes_of(request, self.memory)
        deadline_ns = deadline_of(request, patience_s) if patience_s else 0
        await self.endpoints.bring(model, deadline_ns)
        if self.endpoints.is_decoupled(model, version):
            raise Unsupported(
                f"model '{model}' gives any number of answers: ask it with ModelStreamInfer over "
                "gRPC, or with generate_stream over HTTP"
            )
        own = parameters_of(request)
        asked = [output.name for output in request.outputs]
        classes = {name: wish.classes for name, wish in wishes.items() if wish.classes}
        call = Call(
            model, version, request.id, given, asked, deadline_ns, traceparent, own, classes
        )
        answer = await self.endpoints.infer(call)
        size = sum(array.nbytes for _, array in answer.outputs)
        every_binary = bool(request.parameters.get(BINARY_ALL, False))
        return await aside(size, body_of, answer, wishes, every_binary)


def deadline_of(request: InferRequest, patience_s: float) -> int:
    timeout_us = request.parameters.get("timeout", 0)
    asked = isinstance(timeout_us, int) and timeout_us > 0
    left_ns = patience_s * NS
    return monotonic_ns() + int(min(left_ns, timeout_us * US) if asked else left_ns)


def split(body: bytes, header_length: str | None) -> tuple[InferRequest, list[Values], bytes]:
    """The request, the values of each input, and what follows it."""
    length = len(body)
    if header_length is not None:
        if not LENGTH.fullmatch(header_length) or int(header_length) > length:
            raise Invalid(f"{header_length[:20]!r} of a body of {length} bytes", HEADER_LENGTH)
        length = int(header_length)
    request: InferRequest = decoded(body[:length], InferRequest)
    values = [None if one.data is None else tuple(flattened(one.data)) for one in request.inputs]
    return request, values, body[length:]


def decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"failed to parse the request JSON: {error}", "body") from error


def parameters_of(request: InferRequest) -> dict[str, Parameter]:
    """The model's, and the queue's."""
    empty_final_of(request.parameters)
    return {
        name: value
        for name, value in request.parameters.items()
        if name != BINARY_ALL and not name.startswith(RESERVED)
    }


def given_of(
    request: InferRequest, values: Sequence[Values], binary: bytes, memory: SharedMemory
) -> list[Given]:
    given, position = [], 0
    for tensor, listed in zip(request.inputs, values, strict=True):
        window = memory.window(tensor.name, tensor.parameters)
        size = tensor.parameters.get(BINARY_SIZE)
        check_one_source(tensor, window, size)
        raw = window.read(tensor.name, tensor.datatype, tensor.shape) if window else None
        if size is not None:
            raw = binary[position : position + checked(tensor.name, size, len(binary) - position)]
            position += len(raw)
        given.append(Given(tensor.name, tensor.datatype, tensor.shape, raw, listed))
    if position != len(binary):
        raise Invalid(f"{len(binary) - position} bytes after the last binary input", "body")
    return given


def check_one_source(tensor: InputTensor, window: Window | None, size: Parameter | None) -> None:
    if (tensor.data is not None) + (window is not None) + (size is not None) != 1:
        raise Invalid(
            f"input '{tensor.name}' needs its values once: as 'data', as '{BINARY_SIZE}' bytes "
            "behind the JSON, or in a shared memory region"
        )
    if tensor.data is not None and tensor.datatype in BINARY_ONLY:
        raise Invalid(
            f"receiving {tensor.datatype} data via JSON is not supported. "
            f"Please use the binary data format for input {tensor.name}"
        )


def checked(name: str, size: Parameter, left: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= left:
        raise Invalid(f"input '{name}' says {BINARY_SIZE} {size}, {left} bytes are left")
    return size


def wishes_of(request: InferRequest, memory: SharedMemory) -> dict[str, Wish]:
    """By the name of the output."""
    every = flag("the request", request.parameters, BINARY_ALL, False)
    return {
        output.name: Wish(
            binary=flag(f"output '{output.name}'", output.parameters, "binary_data", every),
            classes=classes_of(output.name, output.parameters),
            window=memory.window(output.name, output.parameters),
        )
        for output in request.outputs
    }


def flag(what: str, parameters: Mapping[str, Parameter], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Invalid(f"'{name}' of {what} is true or false, got {value!r}")
    return value


def body_of(answer: Answer, wishes: Mapping[str, Wish], every_binary: bool) -> Body:
    outputs: list[AnsweredTensor] = []
    buffers: list[bytes] = []
    for tensor, array in answer.outputs:
        wish = wishes.get(tensor.name, Wish(binary=every_binary))
        if wish.classes and not answer.classified:
            labels = answer.labels.get(tensor.name, ())
            tensor, array = classified(tensor, array, wish.classes, labels)
        one = AnsweredTensor(tensor.name, tensor.datatype, list(array.shape))
        if wish.window is not None:
            raw = tensors.to_raw(tensor.datatype, array)
            wish.window.write(tensor.name, raw)
            one.parameters = {**wish.window.parameters(raw)}
        elif wish.binary:
            buffers.append(tensors.to_raw(tensor.datatype, array))
            one.parameters = {BINARY_SIZE: len(buffers[-1])}
        else:
            one.data = json_values(tensor, array)
        outputs.append(one)
    said: dict[str, Parameter] = {TRACE_HEADER: answer.traceparent} if answer.traceparent else {}
    response = InferResponse(answer.model, answer.version, answer.id, said, outputs)
    header = msgspec.json.encode(response)
    return Body(header + b"".join(buffers), len(header)) if buffers else Body(header)


def json_values(tensor: Tensor, array: Array) -> list[Any]:
    """NaN and the infinities have no JSON form and become null."""
    if tensor.datatype in BINARY_ONLY:
        raise Invalid(
            f"sending {tensor.datatype} data via JSON is not supported. "
            f"Please use the binary data format for output {tensor.name}"
        )
    if tensor.datatype != "BYTES":
        return tensors.to_values(tensor.datatype, array)
    return [one.decode(errors="replace") for one in tensors.to_values(tensor.datatype, array)]
