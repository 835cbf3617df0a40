"""The platform API over HTTP JSON: the same servicer that answers gRPC, by its `google.api.http`.

One contract, two doors: paths, queries and bodies follow the proto annotations, messages the
protobuf JSON mapping, and the OpenAPI document is made from the same descriptors.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from google.api import annotations_pb2
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from libs import telemetry
from libs.doors import Exhausted, Invalid, Refused

BODY_BYTES_MAX = 64 << 20
PLACEHOLDER = re.compile(r"\{(\w+)\}")
JSON_TYPES = {
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_DOUBLE: {"type": "number"},
    FieldDescriptor.TYPE_INT32: {"type": "integer"},
    FieldDescriptor.TYPE_INT64: {"type": "string", "format": "int64"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
}


def rule_of(method: MethodDescriptor) -> tuple[str, str]:
    """(HTTP verb, path) of a method."""
    rule = method.GetOptions().Extensions[annotations_pb2.http]  # type: ignore[attr-defined]
    verb = rule.WhichOneof("pattern")
    return verb.upper(), getattr(rule, verb)


def routes(servicer: Any, service: ServiceDescriptor) -> list[Route]:
    """One route a method."""
    return [route(getattr(servicer, method.name), method) for method in service.methods]


def route(call: Callable[..., Awaitable[Message]], method: MethodDescriptor) -> Route:
    verb, path = rule_of(method)
    kind = GetMessageClass(method.input_type)

    async def endpoint(request: Request) -> Response:
        parent = request.headers.get("traceparent", "")
        with telemetry.span(f"{verb} {path}", kind=telemetry.SpanKind.SERVER, parent=parent):
            body = await body_of(request) if verb != "GET" else {}
            fields = {**body, **request.query_params, **request.path_params}
            return json_of(await call(message_of(kind, fields), None))

    return Route(path, endpoint, methods=[verb])


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object of a request; an empty body is an empty object."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES_MAX:
            raise Exhausted(f"at most {BODY_BYTES_MAX} bytes", "body")
    if not body:
        return {}
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"a JSON object, but: {error}", "body") from error


def message_of(kind: type[Message], fields: dict[str, Any]) -> Message:
    """One field after the other, so that a refusal names the one that is wrong."""
    message = kind()
    known = {name for f in kind.DESCRIPTOR.fields for name in (f.name, f.json_name)}
    for name, value in fields.items():
        if name not in known:
            own = ", ".join(field.name for field in kind.DESCRIPTOR.fields)
            raise Invalid(f"no such field: one of {own}", name)
        try:
            json_format.ParseDict({name: value}, message)
        except json_format.ParseError as error:
            raise Invalid(str(error), name) from error
    return message


def json_of(message: Message) -> Response:
    body = json_format.MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return Response(body, media_type="application/json")


async def on_refused(_: Request, error: Exception) -> Response:
    """The HTTP form of every refusal: `{"error": ..., "code": ..., "field": ...}`."""
    assert isinstance(error, Refused)
    body = {"error": str(error), "code": error.code.name, "field": error.field}
    return JSONResponse(body, status_code=error.http_status)


async def on_no_route(_: Request, error: Exception) -> Response:
    """An unknown path, or a verb it does not take, as JSON like every other error."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def openapi(title: str, services: list[ServiceDescriptor]) -> dict[str, Any]:
    """OpenAPI 3.1 of every method of these services."""
    paths: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for service in services:
        for method in service.methods:
            verb, path = rule_of(method)
            paths.setdefault(path, {})[verb.lower()] = operation(service, method, verb, path)
            collect(method.input_type, schemas)
            collect(method.output_type, schemas)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": "v1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def operation(
    service: ServiceDescriptor, method: MethodDescriptor, verb: str, path: str
) -> dict[str, Any]:
    in_path = PLACEHOLDER.findall(path)
    parameters = [
        {"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in in_path
    ]
    described: dict[str, Any] = {
        "operationId": f"{service.name}.{method.name}",
        "parameters": parameters,
        "responses": {
            "200": {"description": "ok", "content": reference(method.output_type)},
            "default": {"description": 'refused: {"error", "code", "field"}'},
        },
    }
    if verb == "GET":
        parameters += [
            {"name": f.name, "in": "query", "schema": schema_of(f)}
            for f in method.input_type.fields
            if f.name not in in_path
        ]
    else:
        described["requestBody"] = {"content": reference(method.input_type)}
    return described


def reference(message: Any) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{message.name}"}}}


def collect(message: Any, schemas: dict[str, Any]) -> None:
    """Adds a message's schema and those of its fields."""
    if message.name in schemas or message.full_name.startswith("google."):
        return
    schemas[message.name] = {"type": "object", "properties": {}}
    for field in message.fields:
        schemas[message.name]["properties"][field.name] = schema_of(field)
        if field.message_type and not field.message_type.GetOptions().map_entry:
            collect(field.message_type, schemas)


def schema_of(field: FieldDescriptor) -> dict[str, Any]:
    if field.message_type and field.message_type.GetOptions().map_entry:
        value = field.message_type.fields_by_name["value"]
        return {"type": "object", "additionalProperties": schema_of(value)}
    if field.message_type is None:
        one: dict[str, Any] = dict(JSON_TYPES[field.type])
    elif field.message_type.full_name.startswith("google."):
        one = {}
    else:
        one = {"$ref": f"#/components/schemas/{field.message_type.name}"}
    return {"type": "array", "items": one} if field.is_repeated else one
