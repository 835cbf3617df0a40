"""Broadcasts, read straight from the broker's socket.

Five thousand nodes that speak twice a second cost the NATS client 40 us a message, of which it
drops what it cannot keep up with; split here they cost 2 us. The protocol is four lines of text:
https://docs.nats.io/reference/reference-protocols/nats-protocol
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import NamedTuple

CHUNK_BYTES = 1 << 18
QUIET_S = 2.0
"""Without a word; then it is asked whether it is there."""
MESSAGE, PING, ERROR = b"MSG ", b"PING", b"-ERR"


class Heard(NamedTuple):
    messages: list[tuple[str, bytes]]
    """(subject, payload)"""
    pings: int
    rest: bytes
    """The beginning of what has not come yet."""


async def listen(
    address: tuple[str, int], token: str, subject: str
) -> AsyncIterator[tuple[str, bytes]]:
    """(subject, payload) until the connection is gone or silent: then it raises `OSError`."""
    async with asyncio.timeout(QUIET_S):
        reader, writer = await asyncio.open_connection(*address)
    try:
        async with asyncio.timeout(QUIET_S):
            await reader.readline()  # INFO
        hello = {"verbose": False, "pedantic": False, "lang": "python", "version": "leptonic"}
        said = json.dumps({**hello, "auth_token": token} if token else hello)
        writer.write(f"CONNECT {said}\r\nSUB {subject} 1\r\nPING\r\n".encode())
        buffer = b""
        while chunk := await something(reader, writer):
            heard = split(buffer + chunk)
            buffer = heard.rest
            writer.write(b"PONG\r\n" * heard.pings)
            for message in heard.messages:
                yield message
    finally:
        writer.close()
    raise ConnectionResetError(f"{address} hung up")


async def something(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Raises `TimeoutError` when the server does not even answer."""
    try:
        async with asyncio.timeout(QUIET_S):
            return await reader.read(CHUNK_BYTES)
    except TimeoutError:
        writer.write(b"PING\r\n")
    async with asyncio.timeout(QUIET_S):
        return await reader.read(CHUNK_BYTES)


def split(data: bytes) -> Heard:
    """What is complete in it. Raises `ConnectionRefusedError` with what the server complains of."""
    messages, pings, at = [], 0, 0
    while (end := data.find(b"\r\n", at)) >= 0:
        if data.startswith(MESSAGE, at):
            fields = data[at:end].split(b" ")
            begin, size = end + 2, int(fields[-1])
            if begin + size + 2 > len(data):
                break
            messages.append((fields[1].decode(), data[begin : begin + size]))
            at = begin + size + 2
            continue
        if data.startswith(ERROR, at):
            raise ConnectionRefusedError(data[at:end].decode(errors="replace"))
        pings += data.startswith(PING, at)
        at = end + 2
    return Heard(messages, pings, data[at:])
