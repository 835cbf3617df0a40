"""A request on its way to another replica, over the door that clients use."""

from collections.abc import Sequence
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
from libs.doors.serve import MESSAGE_BYTES_MAX, RECONNECT_MS_MAX
from services.inference import protocol, tensors
from services.inference.calls import Answer, Call
from services.inference.protocol import FORWARDED
from services.inference.server import Unsupported
from services.inference.tensors import Given

NS = 1e9
PATIENCE_S = 60.0
"""Of a request without a deadline."""
OPTIONS = [
    ("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
]
REFUSALS: dict[grpc.StatusCode, type[Refused]] = {
    kind.code: kind
    for kind in (DeadlineExceeded, Exhausted, Internal, Invalid, NotFound, Unavailable, Unsupported)
}


class Forwarder:
    """One channel to each replica that was ever asked."""

    def __init__(self, node: str, tokens: Sequence[str]) -> None:
        self.own = [(FORWARDED, node)]
        if tokens:
            self.own.append(("authorization", f"Bearer {tokens[0]}"))
        self.channels: dict[str, grpc.aio.Channel] = {}

    async def close(self) -> None:
        for channel in self.channels.values():
            await channel.close()

    async def infer(self, address: str, call: Call) -> Answer:
        """Raises `Refused`, as the other replica did."""
        if address not in self.channels:
            self.channels[address] = grpc.aio.insecure_channel(address, options=OPTIONS)
        stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(self.channels[address])
        left_s = (call.deadline_ns - monotonic_ns()) / NS if call.deadline_ns else PATIENCE_S
        metadata = [*self.own, (TRACE_HEADER, call.traceparent)]
        try:
            response = await stub.ModelInfer(
                request_of(call), timeout=max(0.001, left_s), metadata=metadata
            )
        except grpc.aio.AioRpcError as error:
            kind = REFUSALS.get(error.code(), Internal)
            raise kind(error.details() or error.code().name) from error
        return answer_of(response)


def request_of(call: Call) -> oip.ModelInferRequest:
    """As it came, whatever door it came through."""
    request = oip.ModelInferRequest(model_name=call.model, model_version=call.version, id=call.id)
    for name, value in call.parameters.items():
        protocol.set_parameter(request.parameters[name], value)
    for given in call.given:
        request.inputs.add(name=given.name, datatype=given.datatype, shape=given.shape)
        request.raw_input_contents.append(raw_of(call.model, given))
    for name in call.outputs:
        request.outputs.add(name=name)
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


def answer_of(response: oip.ModelInferResponse) -> Answer:
    outputs = []
    for one, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        shape = list(one.shape)
        given = Given(one.name, one.datatype, shape, raw=raw)
        array = tensors.from_raw(response.model_name, given, raw, text=False)
        outputs.append((Tensor(one.name, one.datatype, shape), array))
    place = response.parameters[TRACE_HEADER].string_param if response.parameters else ""
    return Answer(response.model_name, response.model_version, response.id, outputs, {}, place)
