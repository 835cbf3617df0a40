"""Nodes that only speak: what their agents would say, written straight to the bus's socket.

Ten thousand heartbeats a second by a client of the bus would cost more than what is measured.
"""

import asyncio
import contextlib
import json
from typing import Any
from urllib.parse import urlparse

BEAT_S = 0.5
SLICES = 10
HELLO = b'CONNECT {"verbose":false,"pedantic":false}\r\n'


class Fleet:
    """`count` nodes, alive for as long as the block lasts."""

    def __init__(self, nats_url: str, count: int, cpu_milli: int) -> None:
        self.address = urlparse(nats_url)
        self.beats = {f"n{number:05}": beat(f"n{number:05}", cpu_milli) for number in range(count)}

    async def __aenter__(self) -> "Fleet":
        host, port = self.address.hostname, self.address.port
        self.reader, self.writer = await asyncio.open_connection(host, port)
        self.writer.write(HELLO)
        self.tasks = [asyncio.create_task(self.speak()), asyncio.create_task(self.listen())]
        return self

    async def __aexit__(self, *_: Any) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def speak(self) -> None:
        while True:
            said = list(self.beats.values())
            for part in range(SLICES):
                self.writer.write(b"".join(said[part::SLICES]))
                await asyncio.sleep(BEAT_S / SLICES)

    async def listen(self) -> None:
        while line := await self.reader.readline():
            if line.startswith(b"PING"):
                self.writer.write(b"PONG\r\n")


def beat(node: str, cpu_milli: int) -> bytes:
    capacity = {"cpu_milli": cpu_milli, "memory_mib": 1 << 20, "gpu_milli": 0}
    said = {"node": node, "incarnation": "1", "kinds": ["train"], "capacity": capacity}
    payload = json.dumps({**said, "running": [], "health": "Healthy"}).encode()
    return b"PUB heartbeats.%b %d\r\n%b\r\n" % (node.encode(), len(payload), payload)
