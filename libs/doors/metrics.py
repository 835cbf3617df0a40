"""Rate, errors and duration of what is asked at the doors, as Prometheus reads it at `/metrics`.

The labels are bounded: a method is a route's template, never a path, and whatever no route takes is
`unmatched`. One request costs 2 us (children are looked up in a dict): ModelInfer takes 300.
"""

import asyncio
import functools
from time import perf_counter
from typing import Any

import grpc
from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs import telemetry

UNMATCHED = "unmatched"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
REQUESTS = Counter(
    "leptonic_requests", "Requests answered, by status", ["service", "door", "method", "code"]
)
DURATION = Histogram(
    "leptonic_request_seconds",
    "From a request taken to its answer",
    ["service", "door", "method"],
    buckets=SECONDS,
)
counter = functools.cache(REQUESTS.labels)
histogram = functools.cache(DURATION.labels)


def count(door: str, method: str, code: str, began: float) -> None:
    """`began`: of `perf_counter`."""
    service = telemetry.service()
    counter(service, door, method, code).inc()
    histogram(service, door, method).observe(perf_counter() - began)


class CountedCalls(grpc.aio.ServerInterceptor):
    """Counts unary calls; goes first, so that it sees what the others made of a refusal."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            count("grpc", UNMATCHED, grpc.StatusCode.UNIMPLEMENTED.name, perf_counter())
        if handler is None or handler.unary_unary is None or details.method.startswith("/grpc."):
            return handler
        answer, method = handler.unary_unary, details.method.lstrip("/")

        async def counted(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            began, code = perf_counter(), grpc.StatusCode.UNKNOWN
            try:
                response = await answer(request, context)
                code = grpc.StatusCode.OK
            except grpc.aio.AbortError:
                code = context.code()
                raise
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED
                raise
            finally:
                count("grpc", method, code.name, began)
            return response

        return grpc.unary_unary_rpc_method_handler(
            counted, handler.request_deserializer, handler.response_serializer
        )


class CountedRequests:
    """Counts what goes through an HTTP application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, code = perf_counter(), "500"

        async def noting(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            count("http", method_of(scope), code, began)


def method_of(scope: Scope) -> str:
    """`GET /v1/models/{name}`."""
    route, verb = scope.get("route"), scope["method"]
    return f"{verb} {route.path}" if route and verb in route.methods else UNMATCHED
