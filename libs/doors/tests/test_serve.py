"""Doors on real ports: health, refusals, traces, a port in use, and draining."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.doors import NotFound
from libs.doors.serve import background, grpc_door, http_app, http_door
from libs.doors.tests.desk import SERVICE, Desk
from stack.testing import eventually

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = f"00-{TRACE}-00f067aa0ba902b7-01"
LIST = "/v1/projects/p/models"


@contextlib.asynccontextmanager
async def both_doors(desk: Desk) -> AsyncIterator[tuple[grpc.aio.Channel, httpx.AsyncClient]]:
    def add(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_RegistryServicer_to_server(desk, server)

    app = http_app("desk", [(desk, SERVICE)], desk.ready)
    async with (
        grpc_door("127.0.0.1", 0, add, [SERVICE], desk.ready) as grpc_port,
        http_door("127.0.0.1", 0, app) as http_port,
        grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}") as http,
    ):
        yield channel, http


def models(channel: grpc.aio.Channel, **options: Any) -> Coroutine[Any, Any, Any]:
    stub: Any = registry_pb2_grpc.RegistryStub(channel)

    async def call() -> Any:
        return await stub.ListModels(pb.ListModelsRequest(project="p"), **options)

    return call()


async def test_a_refusal_is_a_status_on_both() -> None:
    desk = Desk()
    desk.refusal = NotFound("no such model", "model")
    async with both_doors(desk) as (channel, http):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await models(channel)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert refused.value.details() == "model: no such model"
        assert (await http.get(LIST)).status_code == 404


async def test_the_callers_trace_continues_over_both() -> None:
    desk = Desk()
    async with both_doors(desk) as (channel, http):
        await models(channel, metadata=(("traceparent", CALLER),))
        assert desk.traceparent.split("-")[1] == TRACE
        assert desk.traceparent != CALLER, "in a span of its own"
        desk.traceparent = ""
        await http.get(LIST, headers={"traceparent": CALLER})
        assert desk.traceparent.split("-")[1] == TRACE
        await http.get(LIST)
        assert desk.traceparent.split("-")[1] not in (TRACE, "")


async def test_health_follows_readiness() -> None:
    desk = Desk()
    async with both_doors(desk) as (channel, _):
        checks: Any = health_pb2_grpc.HealthStub(channel)

        async def state(name: str) -> str:
            answer = await checks.Check(health_pb2.HealthCheckRequest(service=name))
            return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

        for name in ("", SERVICE.full_name):
            assert await state(name) == "SERVING"
        desk.is_ready = False

        async def not_serving() -> bool:
            return {await state(""), await state(SERVICE.full_name)} == {"NOT_SERVING"}

        await eventually(not_serving)


@pytest.mark.parametrize("door", ["grpc", "http"])
async def test_a_port_in_use_is_an_error(door: str) -> None:
    desk = Desk()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        opened: Any = (
            grpc_door("127.0.0.1", port, lambda _: None, [SERVICE], desk.ready)
            if door == "grpc"
            else http_door("127.0.0.1", port, http_app("desk", [], desk.ready))
        )
        with pytest.raises(OSError, match=r"in use"):
            await opened.__aenter__()


async def test_what_was_asked_before_the_end_is_answered() -> None:
    """The doors close while a request on each is being worked on."""
    desk = Desk()
    desk.may_answer.clear()
    closing = contextlib.AsyncExitStack()
    app = http_app("desk", [(desk, SERVICE)], desk.ready)

    def add(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_RegistryServicer_to_server(desk, server)

    grpc_port = await closing.enter_async_context(
        grpc_door("127.0.0.1", 0, add, [SERVICE], desk.ready)
    )
    http_port = await closing.enter_async_context(http_door("127.0.0.1", 0, app))
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}") as http,
    ):
        first = asyncio.create_task(models(channel))
        await desk.asked.wait()
        desk.asked.clear()
        second = asyncio.create_task(http.get(LIST))
        await desk.asked.wait()
        closed = asyncio.create_task(closing.aclose())
        await eventually(lambda: refused(http_port))
        desk.may_answer.set()
        async with asyncio.timeout(10):
            await closed
        assert await first == pb.ListModelsResponse()
        assert (await second).status_code == 200


async def refused(port: int) -> bool:
    """Or reset, as who comes in the very moment in which the door closes."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await writer.wait_closed()
    except ConnectionError:
        return True
    return False


async def test_a_background_job_that_fails_ends_the_service() -> None:
    async def fail() -> None:
        raise OSError("gone")

    async def serve() -> None:
        async with background(fail()):
            await asyncio.Event().wait()

    with pytest.raises(ExceptionGroup) as ended:
        async with asyncio.timeout(5):
            await serve()
    assert isinstance(ended.value.exceptions[0], OSError)


async def test_background_jobs_end_with_the_block() -> None:
    ended = asyncio.Event()

    async def job() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with background(job()):
        await asyncio.sleep(0)
    assert ended.is_set()
