"""The Open Inference Protocol over HTTP: JSON, and the binary tensor extension both ways."""

from collections.abc import Sequence
from typing import Any

import grpc
import msgspec
from google.protobuf import json_format
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from libs.bus import TRACE_HEADER
from libs.contracts.artifacts import Tensor
from libs.doors import Exhausted, Invalid, NotFound, Refused
from libs.doors.drain import Ready
from libs.doors.serve import MESSAGE_BYTES_MAX
from services.inference import tensors
from services.inference.endpoints import PLATFORM, Answer, Call, Endpoints
from services.inference.server import EXTENSIONS, MICROSECONDS, SERVER_VERSION, statistics_of
from services.inference.tensors import Array, Given

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"


class InputTensor(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class OutputTensor(msgspec.Struct, frozen=True):
    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct, frozen=True):
    inputs: list[InputTensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[OutputTensor] = []

    def wants_binary(self, output: str) -> bool:
        """As said for this output, else for the request."""
        default = self.parameters.get("binary_data_output", False)
        said = {one.name: one.parameters.get("binary_data", default) for one in self.outputs}
        return bool(said.get(output, default))


class Rest:
    def __init__(self, endpoints: Endpoints, name: str, ready: Ready) -> None:
        self.endpoints = endpoints
        self.name = name
        self.ready = ready

    def routes(self) -> list[Route]:
        model = "/v2/models/{model}"
        version = model + "/versions/{version}"
        shared = [
            Route("/v2", self.server),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.is_ready),
            Route("/v2/models/stats", self.statistics),
            Route("/v2/repository/index", self.index, methods=["POST"]),
        ]
        for path in (model, version):
            shared += [
                Route(path, self.metadata),
                Route(f"{path}/ready", self.model_ready),
                Route(f"{path}/stats", self.statistics),
                Route(f"{path}/infer", self.infer, methods=["POST"]),
            ]
        return shared

    async def server(self, _: Request) -> Response:
        described = {"name": self.name, "version": SERVER_VERSION, "extensions": EXTENSIONS}
        return JSONResponse(described)

    async def live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def is_ready(self, _: Request) -> Response:
        ready = await self.ready()
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def metadata(self, request: Request) -> Response:
        name, version = place_of(request)
        versions, served = self.endpoints.described(name, version)
        signature = served.model.signature
        return JSONResponse(
            {
                "name": name,
                "versions": versions,
                "platform": PLATFORM,
                "inputs": msgspec.to_builtins(signature.inputs),
                "outputs": msgspec.to_builtins(signature.outputs),
            }
        )

    async def model_ready(self, request: Request) -> Response:
        name, version = place_of(request)
        if not self.endpoints.is_ready(name, version):
            raise NotFound(f"Request for unknown model: '{name}' is not ready")
        return JSONResponse({"name": name, "ready": True})

    async def statistics(self, request: Request) -> Response:
        """The gRPC message in protobuf JSON, with its 64-bit integers as numbers."""
        found = self.endpoints.versions(*place_of(request))
        rows = [
            json_format.MessageToDict(
                statistics_of(one),
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
            for one in found
        ]
        return JSONResponse({"model_stats": [numbered(row) for row in rows]})

    async def index(self, request: Request) -> Response:
        body = decoded(await body_of(request) or b"{}", dict[str, Any])
        rows = self.endpoints.index(bool(body.get("ready", False)))
        names = ("name", "version", "state", "reason")
        return JSONResponse([dict(zip(names, row, strict=True)) for row in rows])

    async def infer(self, request: Request) -> Response:
        try:
            body = await body_of(request)
            wanted, given = parsed(body, request.headers.get(HEADER_LENGTH))
            answer = await self.endpoints.infer(call_of(request, wanted, given))
        except Exhausted as error:
            return JSONResponse({"error": str(error), "code": error.code.name}, status_code=503)
        return response_of(answer, wanted)


def place_of(request: Request) -> tuple[str, str]:
    return request.path_params.get("model", ""), request.path_params.get("version", "")


async def body_of(request: Request) -> bytes:
    """Raises `Refused` past `MESSAGE_BYTES_MAX`, before it is all read."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Invalid(f"{encoding} is not supported, send the body as it is", "Content-Encoding")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MESSAGE_BYTES_MAX:
            raise TooLarge(f"more than {MESSAGE_BYTES_MAX} bytes", "body")
    return bytes(body)


class TooLarge(Refused):
    code = grpc.StatusCode.INVALID_ARGUMENT

    @property
    def http_status(self) -> int:
        return 413


def parsed(body: bytes, header_length: str | None) -> tuple[InferRequest, list[Given]]:
    """A request and its tensors; after the JSON come the binary ones in the order of the inputs."""
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit()) or int(header_length) > length:
            raise Invalid(f"{header_length!r} of a body of {length} bytes", HEADER_LENGTH)
        length = int(header_length)
    request = decoded(body[:length], InferRequest)
    given, position = [], length
    for tensor in request.inputs:
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            given.append(Given(tensor.name, tensor.datatype, tensor.shape, values=tensor.data))
            continue
        if not isinstance(size, int) or not 0 <= size <= len(body) - position:
            raise Invalid(
                f"input '{tensor.name}' says binary_data_size {size}, "
                f"{len(body) - position} bytes are left"
            )
        raw = body[position : position + size]
        given.append(Given(tensor.name, tensor.datatype, tensor.shape, raw=raw))
        position += size
    if position != len(body):
        raise Invalid(f"{len(body) - position} bytes after the last binary input", "body")
    return request, given


def decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Invalid(f"failed to parse the request JSON: {error}", "body") from error


def call_of(request: Request, wanted: InferRequest, given: Sequence[Given]) -> Call:
    name, version = place_of(request)
    timeout = wanted.parameters.get("timeout")
    return Call(
        model=name,
        version=version,
        id=wanted.id,
        given=given,
        outputs=[output.name for output in wanted.outputs],
        timeout_s=timeout / MICROSECONDS if isinstance(timeout, int) and timeout > 0 else None,
        traceparent=request.headers.get(TRACE_HEADER, ""),
    )


def response_of(answer: Answer, wanted: InferRequest) -> Response:
    outputs, buffers = [], []
    for tensor, array in answer.outputs:
        described: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": array.shape,
        }
        if wanted.wants_binary(tensor.name):
            buffers.append(tensors.to_raw(tensor.datatype, array))
            described["parameters"] = {"binary_data_size": len(buffers[-1])}
        else:
            described["data"] = json_values(tensor, array)
        outputs.append(described)
    header = msgspec.json.encode(
        {
            "model_name": answer.model,
            "model_version": str(answer.number),
            "id": answer.id,
            "parameters": {TRACE_HEADER: answer.traceparent} if answer.traceparent else {},
            "outputs": outputs,
        }
    )
    if not buffers:
        return Response(header, media_type="application/json")
    headers = {HEADER_LENGTH: str(len(header))}
    return Response(header + b"".join(buffers), media_type=BINARY, headers=headers)


def json_values(tensor: Tensor, array: Array) -> list[Any]:
    if tensor.datatype != "BYTES":
        return tensors.to_values(tensor.datatype, array)
    return [one.decode(errors="replace") for one in tensors.to_values(tensor.datatype, array)]


def numbered(value: Any) -> Any:
    """Protobuf JSON writes 64-bit integers as strings; the protocol over HTTP as numbers."""
    if isinstance(value, dict):
        kept = ("name", "version")
        return {n: one if n in kept else numbered(one) for n, one in value.items()}
    if isinstance(value, list):
        return [numbered(one) for one in value]
    return int(value) if isinstance(value, str) else value
