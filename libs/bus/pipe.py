"""Many publishes at once, written straight to the broker's socket.

A publish by the NATS client costs 150 us of Python, most of it for an ack that is awaited alone:
a future, a timeout, a task. Here a batch is one write, and its acks are read as they come.
"""

import asyncio
import contextlib
import json
import re
import uuid
from collections.abc import Iterable, Sequence

import msgspec

from libs.bus import ID_HEADER, Outgoing
from libs.bus.wire import QUIET_S, split

CHUNK_BYTES = 1 << 18
SUBJECT = re.compile(r"[!-~]+")
HEADER = re.compile(r"[ -~]+")
"""What cannot end a line of the protocol."""


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Ack(msgspec.Struct):
    seq: int = 0
    error: msgspec.Raw | None = None


class Pipe:
    """A connection for batches, opened with the first one and again after it broke."""

    def __init__(self) -> None:
        self.inbox = f"_INBOX.{uuid.uuid4().hex}"
        self.number = 0
        """Of the last message: an ack that comes too late is none of the next batch."""
        self.turn = asyncio.Lock()
        self.streams: Streams | None = None
        self.rest = b""

    async def publish(
        self, address: tuple[str, int], token: str, messages: Sequence[Outgoing]
    ) -> list[Outgoing]:
        """Those of which it is not known that they are stored, in order."""
        async with self.turn:
            left, unfit = {}, []
            for one in messages:
                if fits(one):
                    self.number += 1
                    left[f"{self.inbox}.{self.number}"] = one
                else:
                    unfit.append(one)
            whole = False
            try:
                with contextlib.suppress(OSError):
                    await self.send(address, token, left)
                    whole = True
            finally:
                if not whole:
                    self.close()
            return [*left.values(), *unfit]

    async def send(self, address: tuple[str, int], token: str, left: dict[str, Outgoing]) -> None:
        """Takes away what was acked. Raises `OSError`."""
        reader, writer = self.streams or await self.open(address, token)
        writer.write(written(left.items()))
        async with asyncio.timeout(QUIET_S):
            await writer.drain()
        refused = 0
        while len(left) > refused:
            async with asyncio.timeout(QUIET_S):
                chunk = await reader.read(CHUNK_BYTES)
            if not chunk:
                raise ConnectionResetError(f"{address} hung up")
            heard = split(self.rest + chunk)
            self.rest = heard.rest
            writer.write(b"PONG\r\n" * heard.pings)
            for inbox, said in heard.messages:
                if msgspec.json.decode(said, type=Ack).error is None:
                    left.pop(inbox, None)
                else:
                    refused += inbox in left

    async def open(self, address: tuple[str, int], token: str) -> Streams:
        async with asyncio.timeout(QUIET_S):
            self.streams = reader, writer = await asyncio.open_connection(*address)
            await reader.readline()  # INFO
        hello = {"verbose": False, "pedantic": False, "headers": True, "lang": "python"}
        hello |= {"version": "leptonic"} | ({"auth_token": token} if token else {})
        writer.write(f"CONNECT {json.dumps(hello)}\r\nSUB {self.inbox}.* 1\r\n".encode())
        self.rest = b""
        return reader, writer

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


def fits(message: Outgoing) -> bool:
    """Whether it can be said in lines; the client of the bus says what is wrong with others."""
    headers = (text for pair in message.headers.items() for text in pair)
    return (
        SUBJECT.fullmatch(message.subject) is not None
        and HEADER.fullmatch(message.id) is not None
        and all(HEADER.fullmatch(text) for text in headers)
    )


def written(messages: Iterable[tuple[str, Outgoing]]) -> bytes:
    """(inbox, message), in order."""
    parts = []
    for inbox, (subject, payload, event_id, headers) in messages:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"NATS/1.0\r\n{ID_HEADER}: {event_id}\r\n{lines}\r\n"
        size = len(head) + len(payload)
        parts.append(f"HPUB {subject} {inbox} {len(head)} {size}\r\n{head}".encode("ascii"))
        parts.append(payload)
        parts.append(b"\r\n")
    return b"".join(parts)
