"""How a service leaves its doors without losing a request.

A newer process of it has opened the same ports by then (`share_ports`), or a balancer before it
stops choosing it (`drain_s`). Either way: not ready any more, nobody new, then nobody left. gRPC
connections are told to go at an age (`serve.AGE_MS`), HTTP ones with their next answer.
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
LEAVE_S = 6.0
"""Until the last gRPC connection has its age (5 s, give or take a tenth), and HTTP clients have let
go what they do not use (httpx: after 5 s)."""
HANDSHAKES_S = 0.1
"""Connections that were being opened are accepted in this time."""
NOTICED_S = 2.0
"""Until a balancer's next health checks; it asks every half second."""
POLL_S = 0.05
LISTENING, CONNECTED = "0A", "01"
SO_ATTACH_REUSEPORT_CBPF = 51
RETURN_CONSTANT = 0x06
TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")


class Socket(NamedTuple):
    state: str
    port: int
    descriptor: int | None
    """None for another process's."""


class Drain:
    """The end of one service's doors. They name their ports here."""

    def __init__(self, ready: Ready, share_ports: bool = False, drain_s: float = 0.0) -> None:
        self.is_ready = ready
        self.share_ports = share_ports
        self.drain_s = drain_s
        self.ports: set[int] = set()
        self.leaving = False

    async def ready(self) -> bool:
        return not self.leaving and await self.is_ready()

    async def until_answerable(self, port: int) -> None:
        """Before a door opens. Where another process answers, it goes on until this one can."""
        while self.share_ports and is_taken(port) and not await self.is_ready():  # noqa: ASYNC110 - a port tells no event
            await asyncio.sleep(POLL_S)

    async def until_over(self) -> None:
        """Returns once SIGTERM or SIGINT came and whoever was connected has gone."""
        await stopped().wait()
        self.leaving = True
        if any(is_taken(port) for port in self.ports):
            for port in self.ports:
                step_aside(port)
            await self.emptied(HANDSHAKES_S, LEAVE_S)
        else:
            await self.emptied(NOTICED_S, self.drain_s)

    async def emptied(self, least_s: float, most_s: float) -> None:
        began = monotonic()
        while (passed_s := monotonic() - began) < most_s:
            if passed_s >= least_s and not self.connected():
                return
            await asyncio.sleep(POLL_S)

    def connected(self) -> bool:
        return any(
            one.port in self.ports and one.state == CONNECTED and one.descriptor is not None
            for one in sockets()
        )


def stopped() -> asyncio.Event:
    """Set by SIGTERM or SIGINT."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told


def sockets() -> Iterator[Socket]:
    """Every TCP socket of this network namespace."""
    own = own_descriptors()
    for table in TABLES:
        with contextlib.suppress(FileNotFoundError):  # without IPv6
            for line in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                yield Socket(state, int(local.rpartition(":")[2], 16), own.get(inode))


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
