"""Hosts generated servicers on a front: what grpc.aio's server and its interceptors do elsewhere.

A front hands over a `ServerCall`; here it gets its handler, its trace, its count and its status.
"""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from time import monotonic_ns
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from libs import telemetry
from libs.doors import DeadlineExceeded, Exhausted, Internal, Invalid, Refused, Unavailable
from libs.doors.drain import Ready
from libs.doors.metrics import CountedCall, count_unmatched
from libs.doors.serve import cancelled, tell_health
from services.inference.front import ServerCall

WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION_V1 = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
NS = 1e9
RETRY_AFTER_S = "1"
log = logging.getLogger(__name__)


class Aborted(Refused):
    """Ended with a status of the servicer's own."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code


class Context:
    """What a servicer may ask and set of its call, as `grpc.aio.ServicerContext` names it."""

    def __init__(self, call: ServerCall, serialise: Callable[[Any], bytes]) -> None:
        self.call = call
        self.serialise = serialise
        self.status = grpc.StatusCode.OK
        self.text = ""
        self.trailing: Sequence[tuple[str, str]] = ()
        self.gone = False

    def invocation_metadata(self) -> Sequence[tuple[str, str]]:
        return self.call.metadata

    def peer(self) -> str:
        return self.call.peer

    def time_remaining(self) -> float | None:
        """Seconds; None without a deadline."""
        if not self.call.deadline_ns:
            return None
        return max(0.0, (self.call.deadline_ns - monotonic_ns()) / NS)

    def cancelled(self) -> bool:
        return self.gone

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = code

    def set_details(self, details: str) -> None:
        self.text = details

    def set_trailing_metadata(self, trailing: Sequence[tuple[str, str]]) -> None:
        self.trailing = trailing

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.trailing = trailing_metadata or self.trailing
        raise Aborted(code, details)

    async def write(self, message: Any) -> None:
        await self.call.write(self.serialise(message))


class Host:
    """Method -> handler; looks to the generated `add_XServicer_to_server` like a server.

    A method in `own_span` (`/package.Service/Method`) opens its span itself.
    """

    def __init__(self, own_span: Collection[str] = ()) -> None:
        self.own_span = frozenset(own_span)
        self.handlers: dict[str, Any] = {}
        self.running: dict[asyncio.Task[None], str] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Generated code says the same once more with `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def host(self, call: ServerCall) -> None:
        """A front's `on_call`."""
        handler = self.handlers.get(call.method)
        if handler is None:
            count_unmatched()
            call.finish(grpc.StatusCode.UNIMPLEMENTED.value[0], f"unknown method {call.method}")
            return
        context = Context(call, handler.response_serializer)
        task = asyncio.create_task(self.answer(context, handler))
        self.running[task] = call.method
        task.add_done_callback(self.running.pop)

        def leave() -> None:
            context.gone = True
            task.cancel()

        call.on_gone(leave)

    async def answer(self, context: Context, handler: Any) -> None:
        """Whatever happens, the call gets one status."""
        call = context.call
        try:
            with self.observed(call):
                await in_time(context, handler)
        except Refused as error:
            if isinstance(error, Exhausted):
                context.trailing = (*context.trailing, ("retry-after", RETRY_AFTER_S))
            call.finish(error.code.value[0], str(error), context.trailing)
        except asyncio.CancelledError:
            call.finish(Unavailable.code.value[0], "the server is leaving", context.trailing)
            raise
        else:
            call.finish(context.status.value[0], context.text, context.trailing)

    @contextlib.contextmanager
    def observed(self, call: ServerCall) -> Iterator[None]:
        """Counted, and part of the caller's trace. Health and reflection are neither."""
        if call.method.startswith("/grpc."):
            yield
            return
        name = call.method.lstrip("/")
        if call.method in self.own_span:
            with CountedCall(name):
                yield
            return
        parent = dict(call.metadata).get("traceparent", "")
        with (
            telemetry.span(name, kind=telemetry.SpanKind.SERVER, parent=parent),
            CountedCall(name),
        ):
            yield

    async def end(self, method: str = "") -> None:
        """Ends the running calls of a method, or all of them, as UNAVAILABLE."""
        await cancelled([task for task, name in self.running.items() if method in ("", name)])


async def in_time(context: Context, handler: Any) -> None:
    """Raises `Refused`; an exception that is none is a bug: logged and told."""
    try:
        async with asyncio.timeout(context.time_remaining()) as limit:
            await run(context, handler)
    except Refused:
        raise
    except Exception as error:
        if limit.expired():
            raise DeadlineExceeded(f"the deadline of {context.call.method} has passed") from error
        if context.status is not grpc.StatusCode.OK:
            raise Aborted(context.status, context.text) from error
        log.exception("%s failed", context.call.method)
        raise Internal(f"Unexpected {type(error)}: {error}") from error


async def run(context: Context, handler: Any) -> None:
    call, decode = context.call, handler.request_deserializer
    if handler.request_streaming:
        given = received(call, decode)
    else:
        given = await message_of(call, decode)
        if given is None:
            raise Invalid("no message came")
    answer = method_of(handler)(given, context)
    if inspect.isasyncgen(answer):
        async with contextlib.aclosing(answer):
            async for one in answer:
                await context.write(one)
        return
    if inspect.isawaitable(answer):
        answer = await answer
    if not handler.response_streaming and context.status is grpc.StatusCode.OK:
        await context.write(answer)


def method_of(handler: Any) -> Callable[[Any, Context], Any]:
    """A coroutine, an async generator, or a function that does not block."""
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    found: Callable[[Any, Context], Any] = next(method for method in kinds if method is not None)
    return found


async def received(call: ServerCall, decode: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    while (message := await message_of(call, decode)) is not None:
        yield message


async def message_of(call: ServerCall, decode: Callable[[bytes], Any]) -> Any:
    """None after the last."""
    message = await call.read()
    if message is None:
        return None
    try:
        return decode(message)
    except Exception as error:
        raise Invalid(f"{len(message)} bytes are no message of {call.method}") from error


@contextlib.asynccontextmanager
async def health_and_reflection(
    host: Host, services: Sequence[ServiceDescriptor], ready: Ready
) -> AsyncIterator[None]:
    """Answers both until the block ends."""
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, host)
    names = [service.full_name for service in services]
    known = reflection.aio.ReflectionServicer(
        [*names, health.SERVICE_NAME, reflection.SERVICE_NAME]
    )
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(known, host)
    host.handlers[REFLECTION_V1] = host.handlers[f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"]
    watch = asyncio.create_task(tell_health(checks, names, ready))
    try:
        yield
    finally:
        await cancelled([watch])
