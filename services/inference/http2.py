"""The server's side of HTTP/2 (RFC 9113) over cleartext TCP, as an asyncio protocol.

`Connection` reads frames out of what came with one call; what it says is written by its `Sender`.
What a request means is its `Stream`'s, made by the `Owner`.
"""

import asyncio
from collections.abc import Sequence
from time import monotonic
from typing import Any, Protocol, cast

from services.inference import frames
from services.inference.frames import (
    FRAME,
    FRAME_BYTES_MAX,
    FRAME_HEAD_BYTES,
    STREAM_MAX,
    Fault,
    Header,
    Heads,
    Malformed,
)
from services.inference.sender import Sender, Stream, reset, window_update

GOODBYE_S = 1.0
"""For a client to say that it knows."""


class Owner(Protocol):
    def head(self, headers: Sequence[Header]) -> Any:
        """What a request's headers say. Kept for the same bytes. Raises `Malformed`."""

    def open(self, connection: "Connection", id: int, head: Any) -> "Stream": ...

    def connected(self, connection: "Connection") -> None: ...

    def lost(self, connection: "Connection") -> None: ...


class Connection(Sender):
    def __init__(self, owner: Owner) -> None:
        super().__init__()
        self.owner = owner
        self.rest = b""
        self.is_settled = False
        """The preface and the first settings are here."""
        self.heads = Heads(owner.head)
        self.block: tuple[int, int, bytearray, int] | None = None
        """(stream, flags, bytes, frames) of headers that go on in CONTINUATION."""
        self.last = 0
        """The newest stream of the client."""
        self.taken = 0
        """Bytes that came since the client was told that it may send more."""
        self.resets_at_s = monotonic()
        self.handlers = (
            self.on_data,
            self.on_headers,
            self.on_priority,
            self.on_reset,
            self.on_settings,
            self.on_push,
            self.on_ping,
            self.on_goaway,
            self.on_window,
            self.on_continuation,
        )
        """By the frames' types."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        transport.set_write_buffer_limits(high=frames.WRITE_BYTES_HIGH)
        host, port = (transport.get_extra_info("peername") or ("", 0))[:2]
        self.peer = f"ipv4:{host}:{port}"
        self.out += (frames.HELLO, frames.OPEN)
        self.owner.connected(self)
        self.flush()

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        if self.rest:
            data = self.rest + data
        try:
            self.rest = data[self.read(data) :]
        except Fault as fault:
            self.fail(fault)
        self.flush()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        streams, self.streams = list(self.streams.values()), {}
        self.blocked.clear()
        for stream in streams:
            stream.gone()
        self.owner.lost(self)

    def read(self, data: bytes, at: int = 0) -> int:
        """How far it went: what follows is no whole frame yet."""
        if not self.is_settled:
            return self.opening(data)
        size, unpack, handlers = len(data), FRAME.unpack_from, self.handlers
        while size - at >= FRAME_HEAD_BYTES:
            word, flags, number = unpack(data, at)
            start = at + FRAME_HEAD_BYTES
            end = start + (word >> 8)
            if end - start > FRAME_BYTES_MAX:
                raise Fault(frames.FRAME_SIZE_ERROR, f"a frame of {end - start} bytes")
            if end > size:
                break
            kind = word & 255
            if self.block is not None and kind != frames.CONTINUATION:
                raise Fault(frames.PROTOCOL_ERROR, "headers are to go on")
            if kind < len(handlers):
                handlers[kind](flags, number & STREAM_MAX, data[start:end])
            at = end
        return at

    def opening(self, data: bytes) -> int:
        """The preface, then settings: nothing is read before the head of these is there."""
        preface = frames.PREFACE
        if data[: len(preface)] != preface[: len(data)]:
            raise Fault(frames.PROTOCOL_ERROR, "no HTTP/2")
        if len(data) < len(preface) + FRAME_HEAD_BYTES:
            return 0
        word, flags, _ = FRAME.unpack_from(data, len(preface))
        if word & 255 != frames.SETTINGS or flags & frames.ACK:
            raise Fault(frames.PROTOCOL_ERROR, "settings come first")
        self.is_settled = True
        return self.read(data, len(preface))

    def on_data(self, flags: int, id: int, payload: bytes) -> None:
        self.taken += len(payload)
        if self.taken > frames.CONNECTION_WINDOW:
            raise Fault(frames.FLOW_CONTROL_ERROR, "more than the connection's window")
        if self.taken >= frames.CONNECTION_WINDOW // 2:
            self.out.append(window_update(0, self.taken))
            self.taken = 0
        taken = len(payload)
        if flags & frames.PADDED:
            payload = frames.unpadded(flags, payload)
        stream = self.streams.get(id)
        if stream is None:
            if not 0 < id <= self.last:
                raise Fault(frames.PROTOCOL_ERROR, f"data on stream {id}, which is not open")
            return
        if stream.ended:
            self.cancel(stream, frames.STREAM_CLOSED)
            return
        stream.taken += taken
        if stream.taken > frames.STREAM_WINDOW:
            self.cancel(stream, frames.FLOW_CONTROL_ERROR)
            return
        if flags & frames.END_STREAM:
            stream.ended = True
        stream.received(payload)
        if stream.taken >= frames.STREAM_WINDOW // 2:
            self.credit(stream)

    def on_headers(self, flags: int, id: int, payload: bytes) -> None:
        if id % 2 == 0:
            raise Fault(frames.PROTOCOL_ERROR, f"headers on stream {id}")
        if flags & (frames.PADDED | frames.HAS_PRIORITY):
            payload = frames.unprioritised(flags, id, frames.unpadded(flags, payload))
        if flags & frames.END_HEADERS:
            self.opened(flags, id, payload)
        else:
            self.block = (id, flags, bytearray(payload), 0)

    def on_continuation(self, flags: int, id: int, payload: bytes) -> None:
        if self.block is None or self.block[0] != id:
            raise Fault(frames.PROTOCOL_ERROR, f"nothing goes on, on stream {id}")
        _, first, block, count = self.block
        block += payload
        if count >= frames.CONTINUATIONS_MAX or len(block) > frames.HEADER_BYTES_MAX:
            raise Fault(frames.ENHANCE_YOUR_CALM, f"headers of more than {len(block)} bytes")
        self.block = (id, first, block, count + 1)
        if flags & frames.END_HEADERS:
            self.block = None
            self.opened(first, id, bytes(block))

    def opened(self, flags: int, id: int, block: bytes) -> None:
        """A request, or the trailers of one, which say nothing to us."""
        if id <= self.last:
            self.heads.decoded(block)
            self.trailers(flags, id)
            return
        self.last = id
        try:
            head = self.heads.known.get(block) or self.heads.read(block)
        except Malformed:
            self.out.append(reset(id, frames.PROTOCOL_ERROR))
            return
        if id > self.last_taken:
            return
        if len(self.streams) >= frames.STREAMS_MAX:
            self.out.append(reset(id, frames.REFUSED_STREAM))
            return
        stream = self.streams[id] = self.owner.open(self, id, head)
        if flags & frames.END_STREAM:
            stream.ended = True
        stream.opened()

    def trailers(self, flags: int, id: int) -> None:
        stream = self.streams.get(id)
        if stream is None or stream.ended:
            raise Fault(frames.STREAM_CLOSED, f"headers on stream {id}, which is closed")
        if not flags & frames.END_STREAM:
            raise Fault(frames.PROTOCOL_ERROR, f"headers on stream {id} amidst its data")
        stream.ended = True
        stream.received(b"")

    def on_priority(self, flags: int, id: int, payload: bytes) -> None:
        if id == 0:
            raise Fault(frames.PROTOCOL_ERROR, "a priority of no stream")
        if len(payload) != frames.PRIORITY_BYTES:
            raise Fault(frames.FRAME_SIZE_ERROR, f"a priority of {len(payload)} bytes")

    def on_reset(self, flags: int, id: int, payload: bytes) -> None:
        if not 0 < id <= self.last:
            raise Fault(frames.PROTOCOL_ERROR, f"stream {id} is reset before it is open")
        if len(payload) != frames.WORD.size:
            raise Fault(frames.FRAME_SIZE_ERROR, f"a reset of {len(payload)} bytes")
        self.bear_reset()
        self.let_go(self.streams.get(id))

    def bear_reset(self) -> None:
        """Opening and resetting at once costs the client nothing (CVE-2023-44487)."""
        now_s = monotonic()
        regained = self.resets + (now_s - self.resets_at_s) * frames.RESETS_PER_S
        self.resets, self.resets_at_s = min(regained, frames.RESETS_MAX) - 1, now_s
        if self.resets < 0:
            raise Fault(frames.ENHANCE_YOUR_CALM, "too many streams are reset")

    def let_go(self, stream: "Stream | None") -> None:
        if stream is not None and self.forget(stream):
            stream.gone()

    def cancel(self, stream: "Stream", code: int) -> None:
        """For what the client did: it may make us reset no more streams than it may itself
        (CVE-2025-8671)."""
        self.out.append(reset(stream.id, code))
        self.let_go(stream)
        self.bear_reset()

    def on_settings(self, flags: int, id: int, payload: bytes) -> None:
        if id:
            raise Fault(frames.PROTOCOL_ERROR, "settings of a stream")
        if len(payload) % frames.SETTING.size or (flags & frames.ACK and payload):
            raise Fault(frames.FRAME_SIZE_ERROR, f"settings of {len(payload)} bytes")
        if flags & frames.ACK:
            return
        for name, value in frames.SETTING.iter_unpack(payload):
            self.set(name, value)
        self.out.append(frames.SETTINGS_ACK)
        self.wake()

    def set(self, name: int, value: int) -> None:
        if name == frames.INITIAL_WINDOW:
            if value > frames.WINDOW_MAX:
                raise Fault(frames.FLOW_CONTROL_ERROR, f"a window of {value} bytes")
            for stream in self.streams.values():
                stream.window += value - self.initial_window
            self.initial_window = value
        elif name == frames.FRAME_SIZE:
            if not FRAME_BYTES_MAX <= value < 1 << 24:
                raise Fault(frames.PROTOCOL_ERROR, f"frames of {value} bytes")
            self.frame_bytes = min(value, frames.FRAME_BYTES_SENT_MAX)
        elif name == frames.ENABLE_PUSH and value > 1:
            raise Fault(frames.PROTOCOL_ERROR, f"push is {value}")
        elif name == frames.TABLE_SIZE and value < frames.TABLE_DEFAULT:
            self.table_update = frames.TABLE_EMPTY

    def on_push(self, flags: int, id: int, payload: bytes) -> None:
        raise Fault(frames.PROTOCOL_ERROR, "a client that pushes")

    def on_ping(self, flags: int, id: int, payload: bytes) -> None:
        if id:
            raise Fault(frames.PROTOCOL_ERROR, "a ping of a stream")
        if len(payload) != len(frames.LEAVING):
            raise Fault(frames.FRAME_SIZE_ERROR, f"a ping of {len(payload)} bytes")
        if not flags & frames.ACK:
            self.out.append(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif payload == frames.LEAVING and self.leaving:
            self.take_no_more()

    def on_goaway(self, flags: int, id: int, payload: bytes) -> None:
        if id:
            raise Fault(frames.PROTOCOL_ERROR, "a stream says good-bye")

    def on_window(self, flags: int, id: int, payload: bytes) -> None:
        if len(payload) != frames.WORD.size:
            raise Fault(frames.FRAME_SIZE_ERROR, f"a window update of {len(payload)} bytes")
        more = frames.WORD.unpack(payload)[0] & STREAM_MAX
        stream = self.streams.get(id)
        if id > self.last or (id == 0 and not more):
            raise Fault(frames.PROTOCOL_ERROR, f"a window of stream {id} opens by {more}")
        if id == 0:
            self.window += more
            if self.window > frames.WINDOW_MAX:
                raise Fault(frames.FLOW_CONTROL_ERROR, f"a window of {self.window} bytes")
        elif stream is not None:
            stream.window += more
            if not more:
                self.cancel(stream, frames.PROTOCOL_ERROR)
            elif stream.window > frames.WINDOW_MAX:
                self.cancel(stream, frames.FLOW_CONTROL_ERROR)
        if self.blocked:
            self.wake()

    def fail(self, fault: Fault) -> None:
        text = str(fault).encode()
        said = frames.WORD.pack(self.last) + frames.WORD.pack(fault.code) + text
        self.out.append(frames.frame(frames.GOAWAY, 0, 0, said))
        self.flush()
        self.hang_up()

    def cut(self) -> None:
        assert self.transport is not None
        self.transport.abort()

    def leave(self) -> None:
        """The client is to open another connection; what it sends until it knows is answered."""
        if not self.leaving:
            self.leaving = True
            said = frames.WORD.pack(STREAM_MAX) + frames.WORD.pack(frames.NO_ERROR)
            self.out.append(frames.frame(frames.GOAWAY, 0, 0, said))
            self.out.append(frames.frame(frames.PING, 0, 0, frames.LEAVING))
            self.loop.call_later(GOODBYE_S, self.take_no_more)
            self.wake()

    def take_no_more(self) -> None:
        """The client knows: whatever it sent before is here."""
        if self.last_taken == STREAM_MAX:
            self.last_taken = self.last
            said = frames.WORD.pack(self.last) + frames.WORD.pack(frames.NO_ERROR)
            self.out.append(frames.frame(frames.GOAWAY, 0, 0, said))
            self.wake()
