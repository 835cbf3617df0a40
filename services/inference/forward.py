"""A request on its way to another replica, over the door that clients use."""

import asyncio
from collections.abc import Collection, Sequence
from time import monotonic_ns

import grpc

from libs.bus import TRACE_HEADER
from libs.contracts.artifacts import Tensor
from libs.contracts.protos import open_inference_pb2 as oip
from libs.contracts.protos import open_inference_pb2_grpc
from libs.doors import (
    DeadlineExceeded,
    Exhausted,
    Internal,
    Invalid,
    NotFound,
    Refused,
    Unavailable,
)
from libs.doors.serve import MESSAGE_BYTES_MAX, RECONNECT_MS_MAX, cancelled
from services.inference import protocol, tensors
from services.inference.calls import Answer, Call
from services.inference.classification import PARAMETER as CLASSIFICATION
from services.inference.endpoint import NO_VERSIONS
from services.inference.front import LEAVING
from services.inference.protocol import FORWARDED
from services.inference.server import Unsupported
from services.inference.tensors import Given

NS = 1e9
PATIENCE_S = 60.0
"""Of a request without a deadline."""
KEEPALIVE_MS, KEEPALIVE_LOST_MS = 5000, 2000
"""A machine that vanishes says nothing: without pings, its requests wait for their deadlines."""
UNREACHED = "failed to connect to all addresses"
"""As gRPC's C core says it; a connection that breaks later may have brought the request there."""
OPTIONS = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_LOST_MS),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]
REFUSALS: dict[grpc.StatusCode, type[Refused]] = {
    kind.code: kind
    for kind in (DeadlineExceeded, Exhausted, Internal, Invalid, NotFound, Unavailable, Unsupported)
}


class Untaken(Unavailable):
    """Not begun there: another replica may be asked. What was begun may be what ended it, and would
    end the next one too."""


class Unreached(Untaken):
    """Nobody to ask there."""


class Forwarder:
    """One channel to each replica that was ever asked."""

    def __init__(self, node: str, tokens: Sequence[str]) -> None:
        self.own = [(FORWARDED, node)]
        if tokens:
            self.own.append(("authorization", f"Bearer {tokens[0]}"))
        self.channels: dict[str, grpc.aio.Channel] = {}
        self.closing: set[asyncio.Task[None]] = set()

    def keep(self, addresses: Collection[str]) -> None:
        """The others have gone; what they were asked they may still answer."""
        for address in [one for one in self.channels if one not in addresses]:
            task = asyncio.create_task(self.channels.pop(address).close(PATIENCE_S))
            self.closing.add(task)
            task.add_done_callback(self.closing.discard)

    async def close(self) -> None:
        await cancelled(list(self.closing))
        for channel in self.channels.values():
            await channel.close()

    async def infer(self, address: str, name: str, call: Call) -> Answer:
        """`name`: of the model, there. Raises `Refused`, as the other replica did."""
        if address not in self.channels:
            self.channels[address] = grpc.aio.insecure_channel(address, options=OPTIONS)
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(self.channels[address])
        left_s = (call.deadline_ns - monotonic_ns()) / NS if call.deadline_ns else PATIENCE_S
        metadata = [*self.own, (TRACE_HEADER, call.traceparent)]
        try:
            response = await stub.ModelInfer(
                request_of(name, call), timeout=max(0.001, left_s), metadata=metadata
            )
        except grpc.aio.AioRpcError as error:
            raise refusal_of(error.code(), error.details() or error.code().name) from error
        try:
            return answer_of(response, call)
        except (tensors.Unfit, ValueError) as error:
            raise Internal(f"{address} answered for '{call.model}': {error}") from error


def refusal_of(code: grpc.StatusCode, text: str) -> Refused:
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return Unreached(f"another replica does not take this one's token: {text}")
    if code is grpc.StatusCode.UNAVAILABLE and text.startswith(UNREACHED):
        return Unreached(text)
    if code is grpc.StatusCode.UNAVAILABLE and (text.endswith(LEAVING) or NO_VERSIONS in text):
        return Untaken(text)
    return REFUSALS.get(code, Internal)(text)


def request_of(name: str, call: Call) -> oip.ModelInferRequest:
    """As it came, whatever door it came through."""
    request = oip.ModelInferRequest(model_name=name, model_version=call.version, id=call.id)
    for parameter, value in call.parameters.items():
        protocol.set_parameter(request.parameters[parameter], value)
    for given in call.given:
        request.inputs.add(name=given.name, datatype=given.datatype, shape=given.shape)
        request.raw_input_contents.append(raw_of(call.model, given))
    for output in call.outputs:
        wanted = request.outputs.add(name=output)
        if output in call.classes:
            wanted.parameters[CLASSIFICATION].int64_param = call.classes[output]
    return request


def raw_of(model: str, given: Given) -> bytes:
    """Raises `Invalid`."""
    if given.raw is not None:
        return bytes(given.raw)
    try:
        array = tensors.from_values(model, given, given.values or (), text=False)
    except (tensors.Unfit, KeyError) as error:
        raise Invalid(str(error)) from error
    return tensors.to_raw(given.datatype, array)


def answer_of(response: oip.ModelInferResponse, call: Call) -> Answer:
    """Raises `Unfit`, `ValueError`."""
    outputs = []
    for one, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        shape = list(one.shape)
        given = Given(one.name, one.datatype, shape, raw=raw)
        array = tensors.from_raw(response.model_name, given, raw, text=False)
        outputs.append((Tensor(one.name, one.datatype, shape), array))
    place = response.parameters[TRACE_HEADER].string_param if response.parameters else ""
    answer = Answer(call.model, response.model_version, response.id, outputs, {}, place)
    return answer._replace(classified=bool(call.classes))
