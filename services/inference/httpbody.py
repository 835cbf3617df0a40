"""Bodies over HTTP: read within bounds, decompressed, decoded; sent as the client takes them."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from libs.doors import Exhausted
from libs.doors.serve import MESSAGE_BYTES_MAX
from services.inference import compression
from services.inference.aside import aside
from services.inference.bodies import BINARY, HEADER_LENGTH, JSON, Body, decoded
from services.inference.compression import TooLarge

HELD_BYTES_MAX = 1 << 30
"""Of bodies that are not all there, of all clients together."""
S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")


class Coming:
    held = 0
    """Bytes of all bodies that are not all there."""


COMING = Coming()


async def body_of(request: Request) -> bytes:
    """Raises `Refused` past `MESSAGE_BYTES_MAX`, before it is all read or decompressed, and when
    too much of others is on its way."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            COMING.held += len(chunk)
            if len(body) > MESSAGE_BYTES_MAX:
                raise TooLarge(f"more than {MESSAGE_BYTES_MAX} bytes", "body")
            if COMING.held > HELD_BYTES_MAX:
                raise Exhausted(f"{COMING.held} bytes of bodies are on their way already")
    finally:
        COMING.held -= len(body)
    coding = request.headers.get("content-encoding", "")
    if not coding:
        return bytes(body)
    return await asyncio.to_thread(compression.decompressed, bytes(body), coding, MESSAGE_BYTES_MAX)


async def struct_of(request: Request, kind: type[S]) -> S:
    """An empty body is an empty object."""
    found: S = decoded(await body_of(request) or b"{}", kind)
    return found


async def object_of(request: Request, kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = decoded(await body_of(request) or b"{}", kind)
    return found


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; once the client has gone, it is cancelled. Raises `ClientDisconnect`."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def sent(request: Request, body: Body) -> Response:
    headers = {HEADER_LENGTH: str(body.header_length)} if body.header_length else {}
    kind = BINARY if body.header_length else JSON
    payload = body.payload
    coding = compression.coding_for(request.headers.get("accept-encoding", ""), len(payload))
    if coding:
        headers |= {"Content-Encoding": coding, "Vary": "Accept-Encoding"}
        payload = await aside(len(payload), compression.compressed, payload, coding)
    return Response(payload, media_type=kind, headers=headers)
