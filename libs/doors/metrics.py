"""Rate, errors and duration of what is asked at the doors, as Prometheus reads it at `/metrics`.

The labels are bounded: a method is a route's template, never a path, and whatever no route takes is
`unmatched`.
"""

import asyncio
import functools
from time import perf_counter
from typing import Any

import grpc
from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs import telemetry
from libs.doors import Refused

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


def count_unmatched() -> None:
    count("grpc", UNMATCHED, grpc.StatusCode.UNIMPLEMENTED.name, perf_counter())


class CountedCall:
    """Counts one unary call: the block that answers it.

    No interceptor of its own: grpc.aio spends some 40 us a call on each (an echo takes 450).
    """

    __slots__ = ("began", "method")

    def __init__(self, method: str) -> None:
        self.method = method

    def __enter__(self) -> None:
        self.began = perf_counter()

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        count("grpc", self.method, code_of(error).name, self.began)


def code_of(error: BaseException | None) -> grpc.StatusCode:
    if error is None:
        return grpc.StatusCode.OK
    if isinstance(error, Refused):
        return error.code
    left = isinstance(error, asyncio.CancelledError)
    return grpc.StatusCode.CANCELLED if left else grpc.StatusCode.UNKNOWN


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
