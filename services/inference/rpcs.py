"""gRPC on a stream of HTTP/2: what its headers say, its messages, and how it ends."""

import asyncio
import hmac
import re
import struct
import zlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from time import monotonic_ns
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote, unquote

from services.inference import frames
from services.inference.frames import Header, Malformed
from services.inference.http2 import Connection
from services.inference.sender import Stream

MESSAGE_BYTES_MAX = 64 << 20
HELD_BYTES_MAX = 1 << 30
"""Of requests that came in several pieces, of all clients together."""
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
HEALTH = "/grpc.health.v1.Health/"
PREFIX = struct.Struct(">BI")
"""Of a message: whether it is compressed, its length."""
UNITS_NS = {
    "H": 3600 * 10**9,
    "M": 60 * 10**9,
    "S": 10**9,
    "m": 10**6,
    "u": 10**3,
    "n": 1,
}
TEXT_BYTES_MAX = 8000
"""Of a status's text as it is sent: clients take 8 KiB of headers, some no more."""
HALF_ESCAPED = re.compile("%[0-9A-F]?$")
TIMEOUT = re.compile(r"(\d{1,8})([HMSmun])", re.ASCII)
WINDOW_BITS = {"gzip": 31, "deflate": 15}
"""As zlib names the formats."""
INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAUTHENTICATED = 3, 8, 12, 13, 16
TOKEN_NEEDED = "send the metadata 'authorization: Bearer <token>'"  # noqa: S105 - what is said
PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")
OF_TRANSPORT = frozenset(
    (b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding")
)
FORBIDDEN = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade")
)
PSEUDO = frozenset((b":method", b":path", b":scheme", b":authority"))
CONTENT_TYPE = (b"content-type", b"application/grpc")
STATUS_200 = b"\x88"
"""`:status 200` is in the table that everybody has."""
OPENING = STATUS_200 + frames.block([CONTENT_TYPE])
ENDING = frames.block([(b"grpc-status", b"0")])


class Head(NamedTuple):
    """What the headers of a request say."""

    method: str
    metadata: Sequence[tuple[str, str]]
    timeout_ns: int
    encoding: str
    traceparent: str
    is_plain: bool
    """A ModelInfer whose answer may be given without anybody else."""
    refusal: bytes
    """The header block that answers it at once; else empty."""


def head_of(headers: Sequence[Header], tokens: Collection[bytes]) -> Head:
    """Raises `Malformed`."""
    pseudo, fields = sorted_out(headers)
    known = dict(fields)
    method = pseudo[b":path"].decode("latin-1")
    encoding = known.get(b"grpc-encoding", b"identity").decode("latin-1")
    timeout = known.get(b"grpc-timeout", b"").decode("latin-1")
    found = TIMEOUT.fullmatch(timeout)
    return Head(
        method=method,
        metadata=tuple(
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in fields
            if name not in OF_TRANSPORT
        ),
        timeout_ns=max(1, int(found[1]) * UNITS_NS[found[2]]) if found else 0,
        encoding=encoding,
        traceparent=known.get(b"traceparent", b"").decode("latin-1"),
        is_plain=method == MODEL_INFER and encoding == "identity",
        refusal=refusal_of(pseudo, known, tokens),
    )


def sorted_out(headers: Sequence[Header]) -> tuple[dict[bytes, bytes], list[Header]]:
    """Pseudo-headers, which come first and once each, and the others."""
    pseudo: dict[bytes, bytes] = {}
    fields: list[Header] = []
    for name, value in headers:
        if name.startswith(b":"):
            if fields or name in pseudo or name not in PSEUDO:
                raise Malformed(f"{name!r} is out of place")
            pseudo[name] = value
        elif (
            name != name.lower()
            or name in FORBIDDEN
            or (name, value != b"trailers") == (b"te", True)
        ):
            raise Malformed(f"{name!r} has no meaning here")
        else:
            fields.append((name, value))
    if not pseudo.keys() >= {b":method", b":path", b":scheme"}:
        raise Malformed("a request names its method, path and scheme")
    return pseudo, fields


def refusal_of(
    pseudo: dict[bytes, bytes], known: dict[bytes, bytes], tokens: Collection[bytes]
) -> bytes:
    kind, encoding = known.get(b"content-type", b""), known.get(b"grpc-encoding", b"identity")
    timeout = known.get(b"grpc-timeout", b"0n").decode("latin-1")
    if pseudo[b":method"] != b"POST":
        return frames.block([(b":status", b"405"), (b"allow", b"POST")])
    if kind != b"application/grpc" and not kind.startswith(
        (b"application/grpc+", b"application/grpc;")
    ):
        return frames.block([(b":status", b"415")])
    is_open = pseudo[b":path"].startswith(HEALTH.encode())
    if tokens and not is_open and not is_token(known.get(b"authorization", b""), tokens):
        return at_once(UNAUTHENTICATED, TOKEN_NEEDED)
    if TIMEOUT.fullmatch(timeout) is None:
        return at_once(INTERNAL, f"grpc-timeout is {timeout!r}")
    if encoding != b"identity" and encoding.decode("latin-1") not in WINDOW_BITS:
        text = f"messages may be compressed by gzip or deflate, not by {encoding!r}"
        return at_once(UNIMPLEMENTED, text, [("grpc-accept-encoding", "identity,gzip,deflate")])
    return b""


def is_token(given: bytes, tokens: Collection[bytes]) -> bool:
    """Each is compared, in a time that says nothing about them."""
    scheme, _, token = given.partition(b" ")
    same = [hmac.compare_digest(token, one) for one in tokens]
    return scheme.lower() == b"bearer" and any(same)


def at_once(code: int, text: str, trailing: Sequence[tuple[str, str]] = ()) -> bytes:
    """An answer without messages."""
    return OPENING + ended(code, text, trailing)


def ended(code: int, text: str, trailing: Sequence[tuple[str, str]]) -> bytes:
    if not (code or text or trailing):
        return ENDING
    headers = [("grpc-status", str(code))]
    if text:
        headers.append(("grpc-message", said(text)))
    return frames.block([(name.encode(), value.encode()) for name, value in (*headers, *trailing)])


def said(text: str) -> str:
    """As a header may carry it; what is too long is cut between two characters."""
    whole = quote(text[:TEXT_BYTES_MAX], safe=PRINTABLE)
    if len(whole) <= TEXT_BYTES_MAX:
        return whole
    cut = HALF_ESCAPED.sub("", whole[:TEXT_BYTES_MAX])
    return quote(unquote(cut, errors="ignore"), safe=PRINTABLE)


class Desk(Protocol):
    """Where requests go."""

    held: int
    """Bytes of requests that came in several pieces and are not over."""

    def ask(self, rpc: "Rpc", message: bytes) -> bool:
        """A plain ModelInfer. False when it is for somebody else."""

    def on_call(self, rpc: "Rpc", /) -> None: ...


class Rpc(Stream):
    """A `front.ServerCall`, once `on_call` has it."""

    __slots__ = (
        "deadline_ns",
        "desk",
        "head",
        "held",
        "is_handed",
        "is_open",
        "is_over",
        "leave",
        "lost",
        "messages",
        "metadata",
        "method",
        "outputs",
        "partial",
        "peer",
        "reader",
        "writer",
    )

    def __init__(self, connection: Connection, id: int, head: Head, desk: Desk) -> None:
        super().__init__(connection, id)
        self.head = head
        self.desk = desk
        self.deadline_ns = monotonic_ns() + head.timeout_ns if head.timeout_ns else 0
        self.is_handed = self.is_open = self.is_over = False
        """With `on_call`; answered with headers; answered with a status, or nobody is there."""
        self.held = 0
        self.partial: bytearray | None = None
        self.messages: deque[tuple[int, bytes]] = deque()
        self.reader: asyncio.Future[None] | None = None
        self.writer: asyncio.Future[None] | None = None
        self.lost: Callable[[], None] | None = None
        self.leave: tuple[Any, int] | None = None
        """The batcher it waits in, and its ticket."""
        self.outputs: tuple[int, ...] = ()

    def opened(self) -> None:
        if self.head.refusal:
            self.is_over = True
            self.connection.end(self, self.head.refusal)
        elif self.ended or not self.head.is_plain:
            self.hand_over()

    def hand_over(self) -> None:
        self.is_handed = True
        self.method, self.metadata = self.head.method, self.head.metadata
        self.peer = self.connection.peer
        self.desk.on_call(self)

    def leave_to_others(self, message: bytes) -> None:
        self.messages.clear()
        self.messages.append((0, message))
        self.hand_over()

    def received(self, payload: bytes) -> None:
        if self.partial is None and len(payload) >= PREFIX.size:
            flag, length = PREFIX.unpack_from(payload)
            if length + PREFIX.size == len(payload):
                self.came(flag, payload[PREFIX.size :])
                return
        if payload:
            self.gather(payload)
        if self.ended:
            self.came_all()

    def came(self, flag: int, message: bytes) -> None:
        """A message in one piece; perhaps the last."""
        if flag == 0 and self.ended and not (self.is_handed or self.messages):
            if not self.desk.ask(self, message):
                self.leave_to_others(message)
            return
        self.take(flag, message)
        if self.ended:
            self.came_all()

    def gather(self, payload: bytes) -> None:
        partial = self.partial
        if partial is None:
            partial = self.partial = bytearray()
        self.desk.held += len(payload)
        self.held += len(payload)
        partial += payload
        while len(partial) >= PREFIX.size and not self.is_over:
            flag, length = PREFIX.unpack_from(partial)
            if length > MESSAGE_BYTES_MAX:
                self.finish(RESOURCE_EXHAUSTED, too_large(length))
                return
            end = PREFIX.size + length
            if len(partial) < end:
                break
            with memoryview(partial) as view:
                message = bytes(view[PREFIX.size : end])
            del partial[:end]
            self.take(flag, message)
        if self.desk.held > HELD_BYTES_MAX and not self.is_over:
            self.finish(
                RESOURCE_EXHAUSTED, f"{self.desk.held} bytes of large requests wait already"
            )

    def take(self, flag: int, message: bytes) -> None:
        if flag > 1 or (flag and self.head.encoding not in WINDOW_BITS):
            text = f"a message is marked {flag}, and its grpc-encoding is {self.head.encoding}"
            self.finish(INTERNAL, text)
            return
        self.messages.append((flag, message))
        self.wake(self.reader)

    def came_all(self) -> None:
        if self.is_over:
            return
        if self.partial:
            self.finish(INTERNAL, f"the last message ends after {len(self.partial)} bytes")
        elif self.is_handed:
            self.wake(self.reader)
        elif not self.is_asked():
            self.hand_over()

    def is_asked(self) -> bool:
        """Whether it is answered without anybody else."""
        if len(self.messages) != 1 or self.messages[0][0]:
            return False
        return self.desk.ask(self, self.messages[0][1])

    def may_send_more(self) -> bool:
        return not (self.is_handed and self.messages)

    async def read(self) -> bytes | None:
        while not self.messages:
            if self.is_over:
                raise asyncio.CancelledError
            if self.ended:
                return None
            self.reader = self.connection.loop.create_future()
            await self.reader
        flag, message = self.messages.popleft()
        self.release(min(self.held, PREFIX.size + len(message)))
        self.connection.credit(self)
        if not flag:
            return message
        return await asyncio.to_thread(inflated, message, WINDOW_BITS[self.head.encoding])

    async def write(self, message: bytes) -> None:
        if self.is_over:
            raise asyncio.CancelledError
        self.send([PREFIX.pack(0, len(message)), message])
        while self.outbox:
            self.writer = self.connection.loop.create_future()
            await self.writer

    def send(self, parts: Sequence[bytes]) -> None:
        if not self.is_open:
            self.is_open = True
            self.connection.headers(self.id, OPENING)
        self.connection.data(self, parts)

    def finish(self, code: int, text: str = "", trailing: Sequence[tuple[str, str]] = ()) -> None:
        if self.is_over:
            return
        self.let_go()
        self.lost = None
        said = ended(code, text, trailing)
        self.connection.end(self, said if self.is_open else OPENING + said)

    def let_go(self) -> None:
        self.is_over = True
        self.release(self.held)
        self.partial = None
        self.messages.clear()

    def release(self, size: int) -> None:
        self.held -= size
        self.desk.held -= size

    def on_gone(self, gone: Callable[[], None]) -> None:
        self.lost = gone

    def gone(self) -> None:
        for waiter in (self.reader, self.writer):
            if waiter is not None:
                waiter.cancel()
        if self.is_over:
            return
        self.let_go()
        if self.leave is not None:
            batcher, ticket = self.leave
            batcher.leave(ticket)
        if self.lost is not None:
            self.lost()

    def drained(self) -> None:
        self.wake(self.writer)

    def wake(self, waiter: asyncio.Future[None] | None) -> None:
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def inflated(message: bytes, window_bits: int) -> bytes:
    """Raises `ValueError`."""
    stream = zlib.decompressobj(window_bits)
    try:
        found = stream.decompress(message, MESSAGE_BYTES_MAX + 1)
    except zlib.error as error:
        raise ValueError(f"a message of {len(message)} bytes is not compressed: {error}") from error
    if len(found) > MESSAGE_BYTES_MAX:
        raise ValueError(too_large(len(found)))
    if not stream.eof:
        raise ValueError(f"a compressed message of {len(message)} bytes is cut short")
    return found


def too_large(length: int) -> str:
    return f"message of {length} bytes: at most {MESSAGE_BYTES_MAX} are taken"
