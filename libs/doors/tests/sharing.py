"""`python -m libs.doors.tests.sharing GRPC HTTP`: a desk to be taken over."""

import asyncio
import sys

import grpc

from libs.contracts.protos import registry_pb2_grpc
from libs.doors.drain import Drain
from libs.doors.serve import grpc_door, http_app, http_door
from libs.doors.tests.desk import SERVICE, Desk


async def main(grpc_port: int, http_port: int) -> None:
    desk = Desk()
    drain = Drain(desk.ready, share_ports=True)

    def add(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_RegistryServicer_to_server(desk, server)

    app = http_app("desk", [(desk, SERVICE)], drain.ready)
    async with (
        grpc_door("127.0.0.1", grpc_port, add, [SERVICE], drain.ready, drain=drain),
        http_door("127.0.0.1", http_port, app, drain),
    ):
        sys.stdout.write("open\n")
        sys.stdout.flush()
        await drain.until_over()


asyncio.run(main(*map(int, sys.argv[1:])))
