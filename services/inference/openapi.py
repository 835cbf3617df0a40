"""Every operation of the Open Inference Protocol over HTTP, as a table.

The routes are made from it, and so is the OpenAPI document.
"""

import re
from collections.abc import Collection
from typing import Annotated, Any, NamedTuple

import msgspec
from google.protobuf.descriptor import Descriptor

from libs.contracts.protos import model_config_pb2 as config
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference import controls
from services.inference.bodies import BINARY, HEADER_LENGTH, JSON, InferRequest, InferResponse
from services.inference.messages import schema_of

EVENTS = "text/event-stream"
PLACEHOLDER = re.compile(r"\{(\w+)\}")
VERSIONED = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
SERVER = oip.ServerMetadataResponse.DESCRIPTOR
STATISTICS = oip.ModelStatisticsResponse.DESCRIPTOR
TEXT: dict[str, Any] = {"type": "string"}
OBJECT: dict[str, Any] = {"type": "object"}
LEVEL = {"enum": [controls.OFF, controls.TIMESTAMPS]}
RATE = {"type": "string", "pattern": "^[1-9][0-9]{0,8}$"}
COUNT = {"type": "string", "pattern": "^(-1|0|[1-9][0-9]{0,8})$"}


def setting(one: dict[str, Any]) -> dict[str, Any]:
    """Itself, a list of it, or null to take it back."""
    listed = {"type": "array", "items": one, "maxItems": 1}
    return {"anyOf": [one, listed, {"type": "null"}]}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


TRACE: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"anyOf": [TEXT, {"type": "array", "items": TEXT}]},
}
TRACED = closed(
    {"trace_level": setting(LEVEL), "trace_rate": setting(RATE), "trace_count": setting(COUNT)}
    | {name: setting({"enum": [value]}) for name, value in controls.FIXED.items()}
)
LOGGED = closed(
    {name: {"type": "boolean"} for name in controls.LEVELS}
    | {name: {"enum": [value]} for name, value in controls.LOG_FIXED.items()}
    | {"log_verbose_level": {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1}}
)
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
I64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]


class Live(msgspec.Struct):
    live: bool


class Ready(msgspec.Struct):
    ready: bool


class ModelReady(msgspec.Struct):
    name: str
    ready: bool


class Error(msgspec.Struct):
    error: str


class IndexRequest(msgspec.Struct):
    ready: bool = False


class ControlRequest(msgspec.Struct):
    """`config`: a ModelConfig in JSON; `file:1/model.onnx` and the like: base64."""

    parameters: dict[str, bool | I64 | str] = {}


class Registration(msgspec.Struct):
    """Part of a POSIX shared memory object."""

    key: str
    byte_size: Size
    offset: Size = 0


class Handle(msgspec.Struct):
    b64: str


class CudaRegistration(msgspec.Struct):
    raw_handle: Handle
    byte_size: Size
    device_id: Size = 0


REGIONS = {
    "system": oip.SystemSharedMemoryStatusResponse.RegionStatus.DESCRIPTOR,
    "cuda": oip.CudaSharedMemoryStatusResponse.RegionStatus.DESCRIPTOR,
}
REGISTRATIONS = {"system": Registration, "cuda": CudaRegistration}


class Operation(NamedTuple):
    verb: str
    path: str
    handler: str
    """Method of `Rest`."""
    says: str
    answer: Any = None
    """A struct, a message's descriptor, a list of one, or a schema; None for an empty body."""
    takes: Any = None
    """Likewise; a body that may be left out, unless `statuses` say it runs a model."""
    statuses: Collection[int] = ()
    """Of an `Error`, beside those of every operation."""
    kind: str = JSON
    """Content type of the answer."""


REASONS = {
    400: "the request is wrong, and how",
    401: "no token, or not a known one",
    404: "no such model, version or region",
    409: "it is there already",
    413: "the body is too large",
    415: "a Content-Encoding other than gzip and deflate",
    500: "the model failed",
    501: "not served here",
    503: "not now: the queue is full, the request waited too long, or nothing is loaded",
}
NAMED = (400, 404, 503)
"""A model is looked for."""
SENT = (400, 413, 415)
"""A body is read."""
RUN = (*NAMED, 413, 415, 500, 501)
"""A model is run."""
HEALTH = "/v2/health/"
"""Answered without a token."""


def operations() -> list[Operation]:
    found = [
        Operation("GET", "/v2", "server", "The server's name, version, extensions", SERVER),
        Operation("GET", "/v2/", "server", "The same", SERVER),
        Operation("GET", f"{HEALTH}live", "live", "The process answers", Live),
        Operation(
            "GET", f"{HEALTH}ready", "is_ready", "Every model it should serve is there", Ready
        ),
        Operation("GET", "/v2/models/stats", "statistics", "Counts of every model", STATISTICS),
    ]
    for path in VERSIONED:
        found += of_model(path)
    return [*found, *of_repository(), *of_settings(), *of_memory("system"), *of_memory("cuda")]


def of_model(path: str) -> list[Operation]:
    def get(ending: str, handler: str, says: str, answer: Any) -> Operation:
        return Operation("GET", path + ending, handler, says, answer, statuses=NAMED)

    def run(ending: str, handler: str, says: str, answer: Any, takes: Any, kind: str) -> Operation:
        return Operation("POST", path + ending, handler, says, answer, takes, RUN, kind)

    return [
        get("", "metadata", "Its inputs and outputs", oip.ModelMetadataResponse.DESCRIPTOR),
        get("/ready", "model_ready", "It can be asked", ModelReady),
        get("/config", "config", "Its configuration", config.ModelConfig.DESCRIPTOR),
        get("/stats", "statistics", "Its counts", STATISTICS),
        run("/infer", "infer", "Its answer to these tensors", InferResponse, InferRequest, JSON),
        run("/generate", "generate", "One answer, flat", OBJECT, OBJECT, JSON),
        run("/generate_stream", "generate_stream", "Its answers, as events", TEXT, OBJECT, EVENTS),
    ]


def of_repository() -> list[Operation]:
    def post(path: str, handler: str, says: str, answer: Any, takes: Any) -> Operation:
        statuses = (*SENT, 404, 409, 503) if "{" in path else SENT
        return Operation("POST", f"/v2/repository/{path}", handler, says, answer, takes, statuses)

    index = [oip.RepositoryIndexResponse.ModelIndex.DESCRIPTOR]
    return [
        post("index", "index", "Every version, and its state", index, IndexRequest),
        post("models/{model}/load", "load", "Loads it, or loads it again", None, ControlRequest),
        post("models/{model}/unload", "unload", "Serves it no more", None, ControlRequest),
    ]


def of_settings() -> list[Operation]:
    found = []
    for path in ("/v2/trace/setting", "/v2/models/{model}/trace/setting"):
        missing = NAMED if "{" in path else ()
        found += [
            Operation("GET", path, "trace", "What is traced", TRACE, None, missing),
            Operation("POST", path, "trace", "Traces so", TRACE, TRACED, {*SENT, *missing}),
        ]
    return [
        *found,
        Operation("GET", "/v2/logging", "logging", "What is logged", LOGGED),
        Operation("POST", "/v2/logging", "logging", "Logs so", LOGGED, LOGGED, SENT),
    ]


def of_memory(kind: str) -> list[Operation]:
    root, takes, regions = f"/v2/{kind}sharedmemory", REGISTRATIONS[kind], [REGIONS[kind]]
    one = f"{root}/region/{{region}}"
    register = {"system": (*SENT, 409, 503), "cuda": SENT}[kind]
    return [
        Operation("GET", f"{root}/status", f"{kind}_status", "Every region", regions),
        Operation("GET", f"{one}/status", f"{kind}_status", "A region", regions, None, (404,)),
        Operation("POST", f"{one}/register", f"{kind}_register", "Takes it", None, takes, register),
        Operation("POST", f"{one}/unregister", f"{kind}_unregister", "Lets go of it"),
        Operation("POST", f"{root}/unregister", f"{kind}_unregister", "Lets go of all"),
    ]


def document(asks_for_token: bool) -> dict[str, Any]:
    """OpenAPI 3.1."""
    known: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for one in operations():
        paths.setdefault(one.path, {})[one.verb.lower()] = described(one, asks_for_token, known)
    components: dict[str, Any] = {"schemas": known}
    if asks_for_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Open Inference Protocol", "version": "v2"},
        "paths": paths,
        "components": components,
    }


def described(one: Operation, asks_for_token: bool, known: dict[str, Any]) -> dict[str, Any]:
    guarded = asks_for_token and not one.path.startswith(HEALTH)
    statuses = sorted({*one.statuses, 401} if guarded else one.statuses)
    responses = {"200": content("ok", one.answer, one.kind, known)}
    if one.answer is InferResponse:
        responses["200"]["content"][BINARY] = {"schema": {}}
        responses["200"]["headers"] = {HEADER_LENGTH: {"schema": {"type": "integer"}}}
    if one.path == f"{HEALTH}ready":
        responses["503"] = content("not ready", Ready, JSON, known)
    responses |= {str(code): content(REASONS[code], Error, JSON, known) for code in statuses}
    if one.statuses == RUN:
        responses["503"]["headers"] = {"Retry-After": {"schema": {"type": "integer"}}}
    found: dict[str, Any] = {
        "operationId": operation_id(one),
        "summary": one.says,
        "parameters": parameters(one),
        "responses": responses,
    }
    if one.takes is not None:
        body = content("", one.takes, JSON, known)
        if one.takes is InferRequest:
            body["content"][BINARY] = {"schema": {}}
        found["requestBody"] = {"content": body["content"], "required": one.statuses == RUN}
    return found | ({"security": [{"token": []}]} if guarded else {})


def operation_id(one: Operation) -> str:
    words = re.findall(r"\w+", one.path.replace("/v2/", "/", 1)) or ["server"]
    return "_".join([one.verb.lower(), *words, *(["slash"] if one.path == "/v2/" else [])])


def parameters(one: Operation) -> list[dict[str, Any]]:
    named = [
        {"name": name, "in": "path", "required": True, "schema": TEXT}
        for name in PLACEHOLDER.findall(one.path)
    ]
    if one.takes is not InferRequest:
        return named
    length = {"type": "integer", "minimum": 0}
    says = "bytes of the JSON, where binary tensors follow it"
    return [*named, {"name": HEADER_LENGTH, "in": "header", "description": says, "schema": length}]


def content(says: str, shape: Any, kind: str, known: dict[str, Any]) -> dict[str, Any]:
    if shape is None:
        return {"description": says}
    return {"description": says, "content": {kind: {"schema": schema(shape, known)}}}


def schema(shape: Any, known: dict[str, Any]) -> dict[str, Any]:
    if isinstance(shape, list):
        return {"type": "array", "items": schema(shape[0], known)}
    if isinstance(shape, dict):
        return shape
    if isinstance(shape, Descriptor):
        return schema_of(shape, known)
    (reference,), found = msgspec.json.schema_components(
        [shape], ref_template="#/components/schemas/{name}"
    )
    known |= found
    return reference
