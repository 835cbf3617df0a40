"""A process hands its doors over to another while it is asked: nobody is refused."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.doors.drain import Drain, is_taken, sockets
from libs.doors.serve import http_app, http_door
from libs.doors.tests.desk import SERVICE, Desk
from stack import ports
from stack.testing import eventually

ROOT = Path(__file__).resolve().parents[3]
LIST = "/v1/projects/p/models"
ENDS_S = 30.0
KEPT = 8
"""Connections of each protocol: without its good-bye about one request of each is lost."""
Process = asyncio.subprocess.Process


@contextlib.asynccontextmanager
async def desk(grpc_port: int, http_port: int) -> AsyncIterator[Process]:
    """Its doors are open when the block begins."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "libs.doors.tests.sharing", str(grpc_port), str(http_port)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"open\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Callers:
    """Each asks without pause, and tries nothing twice; on kept and on new connections."""

    def __init__(self, grpc_port: int, http_port: int) -> None:
        self.address = f"127.0.0.1:{grpc_port}"
        self.url = f"http://127.0.0.1:{http_port}"
        self.answered = 0
        self.ended = False

    async def ask(self, call: Callable[[], Coroutine[Any, Any, object]]) -> None:
        while not self.ended:
            await call()
            self.answered += 1

    async def kept_grpc(self) -> None:
        async with self.channel() as channel:
            await self.ask(lambda: listed(channel))

    async def new_grpc(self) -> None:
        async def call() -> None:
            async with self.channel() as channel:
                await listed(channel)

        await self.ask(call)

    async def kept_http(self) -> None:
        async with httpx.AsyncClient(base_url=self.url) as client:
            await self.ask(lambda: got(client))

    async def new_http(self) -> None:
        async def call() -> None:
            async with httpx.AsyncClient(base_url=self.url) as client:
                await got(client)

        await self.ask(call)

    def channel(self) -> grpc.aio.Channel:
        own = [("grpc.use_local_subchannel_pool", 1)]
        return grpc.aio.insecure_channel(self.address, options=own)


async def listed(channel: grpc.aio.Channel) -> None:
    stub: Any = registry_pb2_grpc.RegistryStub(channel)
    await stub.ListModels(pb.ListModelsRequest(project="p"))


async def got(client: httpx.AsyncClient) -> None:
    (await client.get(LIST)).raise_for_status()


async def test_nobody_is_refused_while_a_newer_process_takes_over() -> None:
    doors = ports.free(2)
    callers = Callers(*doors)
    kept = (callers.kept_grpc, callers.kept_http) * KEPT
    async with contextlib.AsyncExitStack() as stack:
        old = await stack.enter_async_context(desk(*doors))
        async with asyncio.TaskGroup() as group:
            for kind in (*kept, callers.new_grpc, callers.new_http):
                group.create_task(kind())
            await eventually(lambda: callers.answered > 100)
            await stack.enter_async_context(desk(*doors))
            old.terminate()
            async with asyncio.timeout(ENDS_S):
                assert await old.wait() == 0
            seen = callers.answered
            await eventually(lambda: callers.answered > seen + 100)
            callers.ended = True


async def test_who_takes_over_opens_once_it_can_answer() -> None:
    doors = ports.free(2)
    late = Desk()
    late.is_ready = False
    drain = Drain(late.ready, share_ports=True)
    app = http_app("desk", [(late, SERVICE)], drain.ready)
    async with desk(*doors):
        opening: Any = http_door("127.0.0.1", doors[1], app, drain)
        opened = asyncio.create_task(opening.__aenter__())
        await eventually(lambda: is_taken(doors[1]))
        assert not opened.done()
        late.is_ready = True
        assert await opened == doors[1]
        await opening.__aexit__(None, None, None)


async def test_a_strangers_port_is_not_shared() -> None:
    """It did not say that it shares."""
    drain = Drain(Desk().ready, share_ports=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            await http_door(
                "127.0.0.1", port, http_app("desk", [], drain.ready), drain
            ).__aenter__()


async def test_a_process_knows_its_own_sockets() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        (found,) = [one for one in sockets() if one.port == port]
        assert found.descriptor == listener.fileno()
        assert not is_taken(port)
