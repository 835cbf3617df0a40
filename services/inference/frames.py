"""The frames and the header blocks of HTTP/2 (RFC 9113, RFC 7541), as bytes."""

import struct
from collections.abc import Callable, Sequence
from typing import Any

from hpack import Decoder, HPACKError
from hpack.table import HeaderTable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME = struct.Struct(">IBI")
"""Length (24 bits) and type (8), flags, stream."""
FRAME_HEAD_BYTES = 9
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL = 5, 6, 7, 8
COMPRESSION_ERROR, ENHANCE_YOUR_CALM = 9, 11
TABLE_SIZE, ENABLE_PUSH, STREAMS, INITIAL_WINDOW, FRAME_SIZE, LIST_SIZE = range(1, 7)

STREAM_MAX = (1 << 31) - 1
WINDOW_MAX = (1 << 31) - 1
WINDOW_DEFAULT = 65535
FRAME_BYTES_MAX = 16384
"""Of a frame's payload that we take: the protocol's least."""
FRAME_BYTES_SENT_MAX = 1 << 16
TABLE_DEFAULT = 4096
PRIORITY_BYTES = 5
HEADER_BYTES_MAX = 64 << 10
ENTRY_BYTES = 32
"""What a header counts beside its bytes, as HPACK has it."""
CONTINUATIONS_MAX = 32
STREAMS_MAX = 1024
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 1 << 24
HEADS_MAX = 256
"""Header blocks remembered of a connection."""
HEAD_BYTES_MAX = 1024
WRITE_BYTES_HIGH = 1 << 18
"""Not yet taken by the client: more, and nothing is read from it."""
TURN_BYTES = 1 << 18
"""Of one message written before others have their turn."""
RESETS_MAX = 1000
"""In a burst; each answered request gives one back, and each second `RESETS_PER_S`."""
RESETS_PER_S = 100
HELLO = struct.pack(
    ">IBI" + "HI" * 3, 18 << 8 | SETTINGS, 0, 0,
    STREAMS, STREAMS_MAX, INITIAL_WINDOW, STREAM_WINDOW, LIST_SIZE, HEADER_BYTES_MAX,
)  # fmt: skip
OPEN = struct.pack(">IBII", 4 << 8 | WINDOW_UPDATE, 0, 0, CONNECTION_WINDOW - WINDOW_DEFAULT)
"""The connection's window, which no setting sets."""
SETTING = struct.Struct(">HI")
WORD = struct.Struct(">I")
TABLE_EMPTY = b"\x20"
"""A header block begins with it: the table has no room."""
SETTINGS_ACK = FRAME.pack(SETTINGS, ACK, 0)
LEAVING = b"leaving!"
Header = tuple[bytes, bytes]


class Fault(Exception):
    """The client broke the protocol: the connection ends."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Malformed(Exception):
    """A request that is none: its stream ends."""


class Table(HeaderTable):
    """Knows whether it has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)

    def _shrink(self) -> None:
        self.changes += 1
        super()._shrink()


class Heads:
    """Header blocks -> what they say. A block that changed nothing in the table is remembered until
    another changes it: clients that repeat themselves send the same few bytes."""

    def __init__(self, meaning: Callable[[Sequence[Header]], Any]) -> None:
        self.meaning = meaning
        self.table = Table()
        self.decoder = Decoder(HEADER_BYTES_MAX)
        self.decoder.header_table = self.table
        self.known: dict[bytes, Any] = {}

    def read(self, block: bytes) -> Any:
        """Raises `Malformed` and `Fault`."""
        before = self.table.changes
        head = self.meaning(self.decoded(block))
        if self.table.changes == before and len(block) <= HEAD_BYTES_MAX:
            self.known[block] = head
        return head

    def decoded(self, block: bytes) -> list[Header]:
        """Raises `Fault`."""
        before = self.table.changes
        try:
            found, start = self.indexed(block)
            rest = self.decoder.decode(block[start:], True) if start < len(block) else ()
            found += [(bytes(name), bytes(value)) for name, value in rest]
        except HPACKError as error:
            raise Fault(COMPRESSION_ERROR, str(error)) from error
        if self.table.changes != before or len(self.known) >= HEADS_MAX:
            self.known.clear()
        return found

    def indexed(self, block: bytes) -> tuple[list[Header], int]:
        """(what leads a block and is one byte each, where the rest begins): nearly all of a request
        whose client names another deadline or trace each time."""
        found: list[Header] = []
        size = 0
        for at, byte in enumerate(block):
            if not 0x80 < byte < 0xFF:
                return found, at
            name, value = self.table.get_by_index(byte & 0x7F)
            size += len(name) + len(value) + ENTRY_BYTES
            if size > HEADER_BYTES_MAX:
                raise Fault(ENHANCE_YOUR_CALM, f"headers of more than {HEADER_BYTES_MAX} bytes")
            found.append((bytes(name), bytes(value)))
        return found, len(block)


def frame(kind: int, flags: int, id: int, payload: bytes) -> bytes:
    return FRAME.pack(len(payload) << 8 | kind, flags, id) + payload


def block(headers: Sequence[Header]) -> bytes:
    """Literals that nobody indexes: they mean the same whatever else was sent."""
    parts: list[bytes] = []
    for name, value in headers:
        parts += (b"\x00", length(len(name)), name, length(len(value)), value)
    return b"".join(parts)


def length(size: int) -> bytes:
    """An integer with a prefix of 7 bits."""
    if size < 127:
        return bytes([size])
    found = bytearray([127])
    size -= 127
    while size > 127:
        found.append(size & 127 | 128)
        size >>= 7
    found.append(size)
    return bytes(found)


def unpadded(flags: int, payload: bytes) -> bytes:
    """Of DATA and HEADERS, without what stands around the content."""
    if flags & PADDED:
        if not payload or payload[0] >= len(payload):
            raise Fault(PROTOCOL_ERROR, "more padding than payload")
        payload = payload[1 : len(payload) - payload[0]]
    return payload


def unprioritised(flags: int, id: int, payload: bytes) -> bytes:
    if flags & HAS_PRIORITY:
        if len(payload) < PRIORITY_BYTES:
            raise Fault(FRAME_SIZE_ERROR, "half a priority")
        if int.from_bytes(payload[:4], "big") & STREAM_MAX == id:
            raise Fault(PROTOCOL_ERROR, "a stream that depends on itself")
        payload = payload[PRIORITY_BYTES:]
    return payload
