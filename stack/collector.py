"""The embedded stack's trace store: takes spans over OTLP/gRPC, tells them over HTTP.

`python -m stack.collector --file traces.db --otlp-port 4317 --http-port 4318`
"""

import argparse
import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import msgspec
import uvloop
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from libs import telemetry
from libs.doors import Invalid, NotFound
from libs.doors.serve import grpc_door, http_app, http_door, until_stopped
from stack.ports import LOOPBACK
from stack.span_store import SpanStore
from stack.spans import Link, Span, orphans, tree

T = TypeVar("T")
SERVICE = trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"]
TRACE_ID_BYTES = 16
SPAN_ID_BYTES = 8
KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
STATUSES = ("unset", "ok", "error")
TIME_NS_MAX = (1 << 63) - 1
UNUSABLE = "a trace_id has 16 bytes, a span_id 8, not all zero; times are below 2^63 ns"
LISTED = 50


class Spans:
    """The store, on a thread of its own: SQLite takes one writer."""

    def __init__(self, path: Path) -> None:
        self.thread = ThreadPoolExecutor(1)
        self.store = self.thread.submit(SpanStore, path).result()

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    def close(self) -> None:
        self.thread.submit(self.store.close).result()
        self.thread.shutdown()


class TraceService(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, spans: Spans) -> None:
        self.spans = spans

    async def Export(  # noqa: N802 - gRPC names it
        self, request: trace_service_pb2.ExportTraceServiceRequest, _: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        received = list(spans_of(request))
        usable = [span for span in received if is_usable(span)]
        await self.spans.call(self.spans.store.add, usable)
        answer = trace_service_pb2.ExportTraceServiceResponse()
        if len(usable) < len(received):
            answer.partial_success.rejected_spans = len(received) - len(usable)
            answer.partial_success.error_message = UNUSABLE
        return answer


register: Callable[[TraceService, grpc.aio.Server], None] = (
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server
)


def spans_of(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        about = attributes_of(resource.resource.attributes)
        service = str(about.get("service.name", "unknown"))
        for scope in resource.scope_spans:
            for one in scope.spans:
                yield span_of(one, service)


def span_of(one: trace_pb2.Span, service: str) -> Span:
    return Span(
        trace_id=one.trace_id.hex(),
        span_id=one.span_id.hex(),
        parent_id=one.parent_span_id.hex(),
        service=service,
        name=one.name,
        kind=KINDS[one.kind] if one.kind < len(KINDS) else KINDS[0],
        start_ns=one.start_time_unix_nano,
        end_ns=one.end_time_unix_nano,
        status=STATUSES[one.status.code] if one.status.code < len(STATUSES) else STATUSES[0],
        status_message=one.status.message,
        attributes=attributes_of(one.attributes),
        events=[
            {"name": e.name, "time_ns": e.time_unix_nano, "attributes": attributes_of(e.attributes)}
            for e in one.events
        ],
        links=[Link(link.trace_id.hex(), link.span_id.hex()) for link in one.links],
    )


def attributes_of(pairs: Sequence[common_pb2.KeyValue]) -> dict[str, Any]:
    return {pair.key: value_of(pair.value) for pair in pairs}


def value_of(value: common_pb2.AnyValue) -> Any:
    match value.WhichOneof("value"):
        case None:
            return None
        case "array_value":
            return [value_of(item) for item in value.array_value.values]
        case "kvlist_value":
            return attributes_of(value.kvlist_value.values)
        case "bytes_value":
            return value.bytes_value.hex()
        case kind:
            return getattr(value, kind)


def is_usable(span: Span) -> bool:
    has_lengths = (
        len(span.trace_id) == 2 * TRACE_ID_BYTES and len(span.span_id) == 2 * SPAN_ID_BYTES
    )
    return has_lengths and int(span.trace_id, 16) != 0 and int(span.span_id, 16) != 0


def read_door(spans: Spans) -> list[Route]:
    """What the collector tells over HTTP."""
    store = spans.store

    async def trace(request: Request) -> Response:
        trace_id = request.path_params["trace_id"]
        return told(trace_id, await spans.call(store.trace, trace_id))

    async def story(request: Request) -> Response:
        trace_id = request.path_params["trace_id"]
        return told(trace_id, await spans.call(store.story, trace_id))

    async def traces(request: Request) -> Response:
        query = request.query_params
        attribute, value = query.get("attribute", ""), query.get("value", "")
        limit = number_of(query, "limit", LISTED)
        found = await spans.call(store.traces, attribute, value, limit)
        return json({"traces": found})

    async def orphaned(request: Request) -> Response:
        query = request.query_params
        since_ns, limit = number_of(query, "since_ns", 1), number_of(query, "limit", LISTED)
        return json({"spans": await spans.call(store.orphans, since_ns, limit)})

    async def services(_: Request) -> Response:
        return json({"services": await spans.call(store.services)})

    return [
        Route("/v1/traces", traces),
        Route("/v1/traces/{trace_id}", trace),
        Route("/v1/story/{trace_id}", story),
        Route("/v1/orphans", orphaned),
        Route("/v1/services", services),
    ]


def number_of(query: Mapping[str, str], name: str, default: int) -> int:
    text = query.get(name, "")
    if text and not (text.isascii() and text.isdigit() and int(text)):
        raise Invalid(f"{text!r} is not a number above 0", name)
    return int(text or default)


def told(trace_id: str, spans: list[Span]) -> Response:
    """Spans by start, the waterfall they make, and the ids of those without their parent."""
    if not any(span.trace_id == trace_id for span in spans):
        raise NotFound(f"no span of trace {trace_id!r} is stored", "trace_id")
    body = {
        "trace_id": trace_id,
        "traces": list(dict.fromkeys(span.trace_id for span in spans)),
        "spans": spans,
        "tree": tree(spans),
        "orphans": [span.span_id for span in orphans(spans)],
    }
    return json(body)


def json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


@contextlib.asynccontextmanager
async def serving(path: Path, host: str, otlp_port: int, http_port: int) -> Any:
    async def ready() -> bool:
        return True

    def add(server: grpc.aio.Server) -> None:
        register(TraceService(spans), server)

    with contextlib.closing(Spans(path)) as spans:
        app = http_app("leptonic traces", [], ready, read_door(spans))
        grpc_opened = grpc_door(host, otlp_port, add, [SERVICE], ready)
        async with grpc_opened as otlp, http_door(host, http_port, app) as http:
            yield otlp, http


async def main(path: Path, host: str, otlp_port: int, http_port: int) -> None:
    telemetry.identify("collector")
    async with serving(path, host, otlp_port, http_port):
        await until_stopped()


if __name__ == "__main__":
    telemetry.log_everything("collector")
    parser = argparse.ArgumentParser(prog="python -m stack.collector", description=__doc__)
    parser.add_argument("--file", type=Path, required=True, help="SQLite file")
    parser.add_argument("--host", default=LOOPBACK, help="address both doors listen on")
    parser.add_argument("--otlp-port", type=int, required=True, help="OTLP/gRPC in")
    parser.add_argument("--http-port", type=int, required=True, help="JSON out")
    given = parser.parse_args()
    uvloop.run(main(given.file, given.host, given.otlp_port, given.http_port))
