"""What a door does on its way out, piece by piece."""

import asyncio
import socket
import sys
from asyncio.subprocess import PIPE
from typing import Any

import grpc
import httpx

from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.doors.drain import CONNECTED, Drain, is_taken, sockets, step_aside
from libs.doors.serve import grpc_door, http_app, http_door
from libs.doors.tests.desk import SERVICE, Desk
from stack.testing import eventually

PORT = 0
CALLERS = 40
"""The kernel gives about every other one to either process that shares a port: 2^-40 for none."""
NEWER = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=1024, reuse_port=True):
    print("listens", flush=True)
    sys.stdin.read()
"""


async def test_new_connections_go_to_the_process_that_came_later() -> None:
    with socket.create_server(("127.0.0.1", PORT), backlog=1024, reuse_port=True) as older:
        port = older.getsockname()[1]
        newer = [sys.executable, "-c", NEWER, str(port)]
        process = await asyncio.create_subprocess_exec(*newer, stdin=PIPE, stdout=PIPE)
        assert process.stdout is not None
        await process.stdout.readline()
        assert is_taken(port)
        step_aside(port)
        callers = [socket.create_connection(("127.0.0.1", port)) for _ in range(CALLERS)]
        (own,) = [one for one in sockets() if one.descriptor == older.fileno()]
        for caller in callers:
            caller.close()
        await process.communicate(b"")
    assert own.queued == 0


def test_who_is_connected_or_waits_to_be_is_waited_for() -> None:
    drain = Drain(Desk().ready)
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        port = listener.getsockname()[1]
        drain.ports[port] = 5.0
        assert not drain.awaited(0.0)
        with socket.create_connection(("127.0.0.1", port)) as caller:
            assert drain.awaited(0.0), "it waits to be accepted"
            accepted, _ = listener.accept()
            assert drain.awaited(4.9)
            assert not drain.awaited(5.0), "patience ends"
            caller.shutdown(socket.SHUT_RDWR)
            accepted.close()
        assert not drain.awaited(0.0)


async def test_an_http_answer_says_that_the_door_closes() -> None:
    drain = Drain(Desk().ready)
    app = http_app("desk", [], drain.ready)
    async with (
        http_door("127.0.0.1", PORT, app, drain) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert "connection" not in (await client.get("/health/ready")).headers
        drain.leaving = True
        told = await client.get("/health/ready")
    assert told.headers["connection"] == "close"
    assert told.status_code == 503


async def test_a_grpc_connection_is_told_to_go_at_its_age() -> None:
    def add(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_RegistryServicer_to_server(Desk(), server)

    door = grpc_door("127.0.0.1", PORT, add, [SERVICE], Desk().ready)
    async with door as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = registry_pb2_grpc.RegistryStub(channel)
        await stub.ListModels(pb.ListModelsRequest(project="p"))

        def connections() -> int:
            return sum(one.port == port and one.state == CONNECTED for one in sockets())

        assert connections() == 1
        await eventually(lambda: connections() == 0)
        await stub.ListModels(pb.ListModelsRequest(project="p"))
