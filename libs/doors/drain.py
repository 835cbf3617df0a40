"""How a service leaves its doors without losing a request.

A newer process of it has opened the same ports by then (`share_ports`), or a balancer before it
stops choosing it (`drain_s`). Either way: not ready any more, nobody new, then nobody left. HTTP
connections are told to go with their next answer; gRPC ones at an age (`serve.AGE_MS`), or at once
where the door can say goodbye.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import NamedTuple

Ready = Callable[[], Awaitable[bool]]
HTTP_LEAVES_S = 6.0
"""Until clients have let go what they do not use (httpx: after 5 s)."""
GRPC_LEAVES_S = 20.0
"""Until the last connection has its age (3 s, give or take a tenth), on a machine that is late."""
HANDSHAKES_S = 0.1
"""Connections that were being opened are accepted in this time."""
POLL_S = 0.05
LISTENING, CONNECTED = "0A", "01"
SO_ATTACH_REUSEPORT_CBPF = 51
RETURN_CONSTANT = 0x06
TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")


class Socket(NamedTuple):
    state: str
    port: int
    queued: int
    """Of a listening one: connections that wait to be accepted."""
    descriptor: int | None
    """None for another process's."""


class Drain:
    """The end of one service's doors. They name their ports here.

    `can_succeed`, where it says more than `ready`: whether a running process may end for this one.
    """

    def __init__(
        self,
        ready: Ready,
        share_ports: bool = False,
        drain_s: float = 0.0,
        can_succeed: Ready | None = None,
    ) -> None:
        self.is_ready = ready
        self.can_succeed = can_succeed or ready
        self.share_ports = share_ports
        self.drain_s = drain_s
        self.ports: dict[int, float] = {}
        """Port -> how long those connected there are waited for."""
        self.goodbyes: list[Callable[[], None]] = []
        """Of doors that can tell who is connected to go elsewhere."""
        self.leaving = False

    async def ready(self) -> bool:
        return not self.leaving and await self.is_ready()

    async def until_answerable(self, port: int) -> None:
        """Before a door opens. Where another process answers, it goes on until this one can."""
        while self.follows(port) and not await self.can_succeed():  # noqa: ASYNC110 - a port tells no event
            await asyncio.sleep(POLL_S)

    def follows(self, port: int) -> bool:
        """Behind a balancer, another may answer on any port."""
        return self.drain_s > 0 or (self.share_ports and is_taken(port))

    async def until_over(self) -> None:
        """Returns once SIGTERM or SIGINT came and whoever was connected has gone."""
        await stopped().wait()
        self.leaving = True
        if any(is_taken(port) for port in self.ports):
            for port in self.ports:
                step_aside(port)
            self.say_goodbye()
            await self.emptied(HANDSHAKES_S)
        elif self.drain_s:
            self.say_goodbye()
            await self.emptied(self.drain_s)

    def say_goodbye(self) -> None:
        for goodbye in self.goodbyes:
            goodbye()

    async def emptied(self, least_s: float) -> None:
        began = monotonic()
        while (passed_s := monotonic() - began) < least_s or self.awaited(passed_s):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(POLL_S)

    def awaited(self, passed_s: float) -> bool:
        """Whether somebody is connected who may still leave by himself."""
        patient = {port for port, patience_s in self.ports.items() if passed_s < patience_s}
        own = [one for one in sockets() if one.port in patient and one.descriptor is not None]
        return any(one.state == CONNECTED or one.queued for one in own)


def stopped() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told


def sockets() -> Iterator[Socket]:
    """Every TCP socket of this network namespace."""
    lines = [line.split() for table in TABLES for line in lines_of(table)]
    own = own_descriptors()  # after the tables: what was queued in one may be accepted by now
    for _, local, _, state, queues, *_, inode in (line[:10] for line in lines):
        port, received = (int(one.rpartition(":")[2], 16) for one in (local, queues))
        yield Socket(state, port, received if state == LISTENING else 0, own.get(inode))


def lines_of(table: str) -> list[str]:
    try:
        return Path(table).read_text().splitlines()[1:]
    except FileNotFoundError:  # without IPv6
        return []


def own_descriptors() -> dict[str, int]:
    """Inode of a socket -> this process's descriptor of it."""
    found = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, as the listing itself is
            kind, _, inode = os.readlink(f"/proc/self/fd/{descriptor}").partition("socket:")
            if not kind:
                found[inode.strip("[]")] = int(descriptor)
    return found


def is_taken(port: int) -> bool:
    """Whether another process listens there."""
    return any(s.port == port and s.state == LISTENING and s.descriptor is None for s in sockets())


def step_aside(port: int) -> None:
    """From now on the kernel hands new connections to the process that came later.

    Those that share a port form a group, in the order in which they began to listen; a program
    given by any of them chooses by position. Closing instead would reset what the kernel has
    accepted for us and we have not. A program that names nobody, once we are gone, is ignored.
    """
    own = [one for one in sockets() if one.port == port and one.state == LISTENING]
    for one in own:
        if one.descriptor is not None:
            choose(one.descriptor, sum(other.descriptor is not None for other in own))


def choose(descriptor: int, position: int) -> None:
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", RETURN_CONSTANT, 0, 0, position))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    with socket.socket(fileno=os.dup(descriptor)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, program)
