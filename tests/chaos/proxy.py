"""A network that can be cut: one TCP link for each pair of programs, in a process of its own.

A link that is cut forwards nothing and closes nothing, as a cable that was pulled: bytes under way
arrive when it is whole again, as TCP would send them again. New connections are accepted and hear
nothing.

`python -m tests.chaos.proxy <network.json>`; on the control port, a line with a JSON list of names
cuts every link from or to one of them, and mends all others.
"""

import asyncio
import contextlib
import sys
from pathlib import Path

import msgspec

from stack.ports import LOOPBACK

CHUNK_BYTES = 1 << 16
STRANGER = "stranger"
"""The publisher and the predictor: whoever is outside of the stack."""


class Link(msgspec.Struct, frozen=True):
    source: str
    target: str
    door: str
    """What the target's port is called in stack.json."""
    port: int
    """Where the source connects."""
    to: int
    """Where the target listens."""


class Plan(msgspec.Struct, frozen=True):
    """network.json."""

    control: int
    links: list[Link]

    def port(self, source: str, door: str) -> int:
        (found,) = (one.port for one in self.links if (one.source, one.door) == (source, door))
        return found


class Cable:
    """One link and whether it is whole now."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.whole = asyncio.Event()
        self.whole.set()

    def follow(self, cut: set[str]) -> None:
        if {self.link.source, self.link.target} & cut:
            self.whole.clear()
        else:
            self.whole.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await self.whole.wait()
            there, back = await asyncio.open_connection(LOOPBACK, self.link.to)
            with contextlib.closing(back):
                ways = [self.pump(reader, back), self.pump(there, writer)]
                tasks = [asyncio.create_task(way) for way in ways]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
        writer.close()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until one end closes, which the other learns only over a whole link."""
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK_BYTES):
                await self.whole.wait()
                writer.write(chunk)
                await writer.drain()
        await self.whole.wait()


class Network:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.cables = [Cable(link) for link in plan.links]

    async def control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while line := await reader.readline():
                cut = set(msgspec.json.decode(line, type=list[str]))
                for cable in self.cables:
                    cable.follow(cut)
                writer.write(b"ok\n")

    async def run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for cable in self.cables:
                opened = await asyncio.start_server(cable.serve, LOOPBACK, cable.link.port)
                await stack.enter_async_context(opened)
            control = await asyncio.start_server(self.control, LOOPBACK, self.plan.control)
            await stack.enter_async_context(control)
            await control.serve_forever()


async def cut(plan: Plan, names: set[str]) -> None:
    """From now on exactly these are cut off."""
    reader, writer = await asyncio.open_connection(LOOPBACK, plan.control)
    with contextlib.closing(writer):
        writer.write(msgspec.json.encode(sorted(names)) + b"\n")
        assert await reader.readline() == b"ok\n"


def load(file: Path) -> Plan:
    return msgspec.json.decode(file.read_bytes(), type=Plan)


if __name__ == "__main__":
    asyncio.run(Network(load(Path(sys.argv[1]))).run())
