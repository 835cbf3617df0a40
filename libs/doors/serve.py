"""Opens and drains the two doors of a service, with health on both."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

import grpc
import uvicorn
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from libs import telemetry
from libs.doors import Refused
from libs.doors.drain import GRPC_LEAVES_S, HTTP_LEAVES_S, Drain, Ready, stopped
from libs.doors.gateway import on_no_route, on_refused, openapi, routes
from libs.doors.metrics import CountedCall, CountedRequests, count_unmatched

MESSAGE_BYTES_MAX = 64 << 20
DRAIN_S = 4.0
"""For each door; one after the other they stay within the 10 s a service has to end."""
READY_POLL_S = 1.0
CANCEL_AGAIN_S = 0.5
AGE_MS = 3000
"""Of a gRPC connection: its client opens another, and loses no request. Ending the server instead
cancels what arrives while its good-bye is on the way."""
RECONNECT_MS_MAX = 1000
IDLE_S = 75
"""Of an HTTP connection; clients let go first (httpx: after 5 s), else their next request may
meet our close."""


class Refusals(grpc.aio.ServerInterceptor):
    """Continues the caller's trace, turns `Refused` into its status, and counts.

    A method in `own_span` (`/package.Service/Method`) opens its span itself.
    """

    def __init__(self, own_span: Collection[str] = ()) -> None:
        self.own_span = frozenset(own_span)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None:
            count_unmatched()
        if handler is None or handler.unary_unary is None or details.method.startswith("/grpc."):
            return handler
        parent = dict(details.invocation_metadata or ()).get("traceparent", "")
        method, name = handler.unary_unary, details.method.lstrip("/")

        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with telemetry.span(name, kind=telemetry.SpanKind.SERVER, parent=parent) as span:
                try:
                    with CountedCall(name):
                        return await method(request, context)
                except Refused as error:
                    telemetry.mark_failed(span, str(error))
                    await context.abort(error.code, str(error))

        async def answer_untraced(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                with CountedCall(name):
                    return await method(request, context)
            except Refused as error:
                await context.abort(error.code, str(error))

        return grpc.unary_unary_rpc_method_handler(
            answer_untraced if details.method in self.own_span else answer,
            handler.request_deserializer,
            handler.response_serializer,
        )


def reuse(shared: bool) -> list[tuple[str, int]]:
    """A port in use is an error unless replicas are meant to share it."""
    return [("grpc.so_reuseport", 1 if shared else 0)]


@contextlib.asynccontextmanager
async def grpc_door(
    host: str,
    port: int,
    add: Callable[[grpc.aio.Server], None],
    services: Sequence[ServiceDescriptor],
    ready: Ready,
    own_span: Collection[str] = (),
    drain: Drain | None = None,
) -> AsyncIterator[int]:
    """Serves gRPC with health and reflection; yields the port. Drains when the block ends.

    `add` registers the servicers, `own_span` is for `Refusals`. Raises `OSError` when the port is
    in use.
    """
    options = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_connection_age_ms", AGE_MS),
        *reuse(shared=await joined(drain, port, GRPC_LEAVES_S)),
    ]
    server = grpc.aio.server(interceptors=[Refusals(own_span)], options=options)
    add(server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [service.full_name for service in services]
    reflection.enable_server_reflection(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server
    )
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise OSError(f"port {port} on {host} is in use or not ours to open") from error
    await server.start()
    watch = asyncio.create_task(tell_health(checks, names, ready))
    try:
        yield bound
    finally:
        watch.cancel()
        await server.stop(DRAIN_S)


def channel_to(address: str) -> grpc.aio.Channel:
    """To another service's gRPC door, which may be away: gRPC alone would wait up to 2 minutes
    before it looks again."""
    return grpc.aio.insecure_channel(
        address, options=[("grpc.max_reconnect_backoff_ms", RECONNECT_MS_MAX)]
    )


async def tell_health(checks: Any, names: list[str], ready: Ready) -> None:
    states = health_pb2.HealthCheckResponse
    while True:
        state = states.SERVING if await ready() else states.NOT_SERVING
        for name in ["", *names]:
            await checks.set(name, state)
        await asyncio.sleep(READY_POLL_S)


def http_app(
    title: str,
    apis: Sequence[tuple[Any, ServiceDescriptor]],
    ready: Ready,
    extra: Sequence[Route] = (),
    document: Mapping[str, Any] | None = None,
) -> Starlette:
    """The platform API of these (servicer, service) pairs, OpenAPI, health and metrics.

    `document`: the OpenAPI document where it is not that of these services.
    """
    document = document or openapi(title, [service for _, service in apis])

    async def live(_: Request) -> Response:
        return JSONResponse({"live": True})

    async def is_ready(_: Request) -> Response:
        state = await ready()
        return JSONResponse({"ready": state}, status_code=200 if state else 503)

    async def described(_: Request) -> Response:
        return JSONResponse(document)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    own = [Route("/health/live", live), Route("/health/ready", is_ready)]
    own += [Route("/openapi.json", described), Route("/metrics", metrics)]
    api = [one for servicer, service in apis for one in routes(servicer, service)]
    return Starlette(
        routes=[*own, *extra, *api],
        exception_handlers={Refused: on_refused, HTTPException: on_no_route},
        middleware=[Middleware(CountedRequests)],
    )


async def joined(drain: Drain | None, port: int, patience_s: float) -> bool:
    """Whether the door shares its port; where another process has it, once this one can answer."""
    if drain is None:
        return False
    await drain.until_answerable(port)
    drain.ports[port] = patience_s
    return drain.share_ports


class Parting:
    """Once its service leaves, an app says with each answer that the connection is over."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def part(message: Message) -> None:
            if self.drain.leaving and message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive, part)


@contextlib.asynccontextmanager
async def http_door(
    host: str, port: int, app: Starlette, drain: Drain | None = None
) -> AsyncIterator[int]:
    """Serves HTTP; yields the port. Drains when the block ends.

    Raises `OSError` when the port is in use.
    """
    shared = await joined(drain, port, HTTP_LEAVES_S)
    config = uvicorn.Config(
        Parting(app, drain) if drain else app,
        timeout_keep_alive=IDLE_S,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(DRAIN_S),
    )
    with contextlib.closing(listening(host, port, shared)) as listener:
        server = uvicorn.Server(config)
        task = asyncio.create_task(server._serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


def listening(host: str, port: int, shared: bool) -> socket.socket:
    listener = socket.create_server((host, port), backlog=1024, reuse_port=shared)
    listener.setblocking(False)
    return listener


async def until_stopped() -> None:
    """Returns on SIGTERM or SIGINT."""
    await stopped().wait()


@contextlib.asynccontextmanager
async def background(*jobs: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs these beside the block; one that fails ends the service, so that it is restarted."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(job) for job in jobs]
        try:
            yield
        finally:
            await cancelled(tasks)


async def cancelled(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancels until all are done: `asyncio.wait_for` of Python 3.11 loses a cancellation that
    comes together with its result."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
