"""What a connection of HTTP/2 writes: as much as the client takes, in as few writes as can be."""

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from services.inference import frames
from services.inference.frames import FRAME, FRAME_BYTES_MAX, STREAM_MAX

LINGER_S = 5.0
"""Of a connection that is over, for what was written to it last."""


class Stream(ABC):
    """One request. What is said on it is written by `Connection`."""

    __slots__ = ("connection", "ended", "id", "outbox", "tail", "taken", "window")

    def __init__(self, connection: "Sender", id: int) -> None:
        self.connection = connection
        self.id = id
        self.window = connection.initial_window
        self.taken = 0
        """Bytes that came since the client was told that it may send more."""
        self.ended = False
        """The client has said everything."""
        self.outbox: deque[memoryview] | None = None
        """What the windows, or a client that does not read, hold back."""
        self.tail = b""
        """The last header block, to follow the outbox."""

    @abstractmethod
    def opened(self) -> None:
        """The head is here; perhaps the client has `ended` with it."""

    @abstractmethod
    def received(self, payload: bytes) -> None:
        """Data; perhaps the client has `ended` with it."""

    @abstractmethod
    def gone(self) -> None:
        """The client has cancelled or vanished."""

    @abstractmethod
    def drained(self) -> None:
        """The outbox is empty again."""

    @abstractmethod
    def may_send_more(self) -> bool:
        """Whether the client may: not while what it has sent is not taken up."""


class Sender(asyncio.Protocol):
    """The half of a connection that writes; reading is `http2.Connection`'s."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.peer = ""
        self.streams: dict[int, Stream] = {}
        self.leaving = self.closed = self.paused = False
        """It is said that it ends; it has; the client does not read."""
        self.last_taken = STREAM_MAX
        """None after it is taken any more."""
        self.window = self.initial_window = frames.WINDOW_DEFAULT
        self.frame_bytes = FRAME_BYTES_MAX
        """Of a frame that the client takes."""
        self.table_update = b""
        """To come before the next header block: the client keeps a smaller table."""
        self.blocked: dict[int, Stream] = {}
        """With an outbox, in turn."""
        self.out: list[bytes | memoryview] = []
        self.is_waking = False
        self.resets = float(frames.RESETS_MAX)
        """Streams the client may reset still."""

    def pause_writing(self) -> None:
        assert self.transport is not None
        self.paused = True
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        assert self.transport is not None
        self.paused = False
        self.transport.resume_reading()
        self.wake()

    def credit(self, stream: "Stream") -> None:
        """Tells the client that it may send more, unless what came is not taken up."""
        if stream.taken and not stream.ended and stream.may_send_more():
            self.out.append(window_update(stream.id, stream.taken))
            stream.taken = 0
            self.wake()

    def headers(self, id: int, block: bytes, ends: bool = False) -> None:
        """Small ones only: they go in one frame."""
        block, self.table_update = self.table_update + block, b""
        flags = frames.END_HEADERS | (frames.END_STREAM if ends else 0)
        self.out.append(frames.frame(frames.HEADERS, flags, id, block))
        self.wake()

    def data(self, stream: "Stream", parts: Sequence[bytes | memoryview]) -> None:
        """In frames as large as the client takes, as far as it lets us now."""
        if stream.outbox is None:
            stream.outbox = deque()
        stream.outbox.extend(memoryview(part) for part in parts if part)
        self.pump(stream)
        self.wake()

    def end(self, stream: "Stream", block: bytes) -> None:
        """The last header block; after what is in the outbox."""
        if stream.outbox:
            stream.tail = block
            return
        self.headers(stream.id, block, ends=True)
        if not stream.ended:
            self.out.append(reset(stream.id, frames.NO_ERROR))
        self.resets = min(self.resets + 1, frames.RESETS_MAX)
        self.forget(stream)

    def has_room(self, stream: "Stream", size: int) -> bool:
        """For an answer of one DATA frame, now."""
        return (
            size <= self.window
            and size <= stream.window
            and size <= self.frame_bytes
            and not (self.paused or self.table_update)
        )

    def sent(self, stream: "Stream", size: int) -> None:
        """Such an answer, which was put into `out` with its headers."""
        self.window -= size
        self.resets = min(self.resets + 1, frames.RESETS_MAX)
        self.forget(stream)

    def pump(self, stream: "Stream") -> None:
        outbox, left = stream.outbox, frames.TURN_BYTES
        assert outbox is not None
        while outbox and left > 0:
            room = min(self.window, stream.window, self.frame_bytes)
            if room <= 0 or self.paused:
                break
            part = outbox.popleft()
            if len(part) > room:
                outbox.appendleft(part[room:])
                part = part[:room]
            self.out += (FRAME.pack(len(part) << 8, 0, stream.id), part)
            left -= len(part)
            self.window -= len(part)
            stream.window -= len(part)
        self.blocked.pop(stream.id, None)
        if outbox:
            self.blocked[stream.id] = stream
        elif stream.tail:
            self.end(stream, stream.tail)
        else:
            stream.drained()

    def resume(self) -> None:
        """Everybody held back has a turn."""
        for stream in list(self.blocked.values()):
            self.pump(stream)

    def wake(self) -> None:
        """Writes once this round of the loop is over."""
        if not self.is_waking:
            self.is_waking = True
            self.loop.call_soon(self.awake)

    def awake(self) -> None:
        self.is_waking = False
        if self.closed:
            return
        if not self.paused:
            self.resume()
        self.flush()
        blocked = self.blocked.values()
        if not self.paused and any(min(self.window, one.window) > 0 for one in blocked):
            self.wake()

    def flush(self) -> None:
        assert self.transport is not None
        if self.out and not self.closed:
            out, self.out = self.out, []
            self.transport.write(b"".join(out))
        if self.leaving and not self.streams and self.last_taken != STREAM_MAX:
            self.hang_up()

    def forget(self, stream: "Stream") -> bool:
        """False when it is closed already."""
        self.blocked.pop(stream.id, None)
        known = self.streams.pop(stream.id, None) is not None
        if self.leaving and not self.streams:
            self.wake()
        return known

    def hang_up(self) -> None:
        assert self.transport is not None
        self.closed = True
        self.transport.close()
        self.loop.call_later(LINGER_S, self.transport.abort)


def reset(id: int, code: int) -> bytes:
    return frames.frame(frames.RST_STREAM, 0, id, frames.WORD.pack(code))


def window_update(id: int, more: int) -> bytes:
    return frames.frame(frames.WINDOW_UPDATE, 0, id, frames.WORD.pack(more))
