"""Messages between the service and a worker: no pickle, no parsing of what could be anything.

A small message travels inside its packet, a larger one as shared memory whose descriptor does.
Both sides use this file.
"""

import math
import mmap
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

INLINE_BYTES_MAX = 160 << 10
"""150 KB took 0.5 ms there and back in packets and 1.3 ms in shared memory, whose pages are made
anew; a packet cannot be larger than what a socket may hold, 208 KiB as Linux comes."""
HEADER = struct.Struct("<QQ")
"""Length of the head, length of the whole payload."""
ALIGNMENT = 64
PADDING = [bytes(size) for size in range(ALIGNMENT)]
DESCRIPTOR = socket.CMSG_SPACE(4)
LENGTH = struct.Struct("<I")
STRINGS = "BYTES"
Array = NDArray[Any]
Arrays = dict[str, Array]


class Place(NamedTuple):
    name: str
    kind: str
    """numpy's (`<f4`), or `STRINGS`: each with its length before it."""
    shape: tuple[int, ...]
    start: int
    size: int


class Message(msgspec.Struct, array_like=True):
    id: int = 0
    last: bool = True
    """No more of this id."""
    error: str | None = None
    text: str = ""
    tensors: list[Place] | None = None


ENCODE = msgspec.msgpack.Encoder().encode
DECODE = msgspec.msgpack.Decoder(Message).decode


class Channel:
    """One end of a pair of `SOCK_SEQPACKET` sockets.

    The locks are for `close`, too: a descriptor closed under a thread that uses it may be another
    file's by then.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sending = Lock()
        self.receiving = Lock()
        self.packet = bytearray(HEADER.size + INLINE_BYTES_MAX)

    def close(self) -> None:
        """Of a socket that was shut down, so that nobody waits in it."""
        with self.sending, self.receiving:
            self.sock.close()

    def send(self, message: Message, arrays: Arrays | None = None) -> None:
        """Raises `OSError` when the other side is gone."""
        parts: list[Any] = [b"", b""]
        size = 0
        if arrays is not None:
            message.tensors, size = laid_out(arrays, parts)
        parts[0] = head = ENCODE(message)
        parts[1] = PADDING[-len(head) % ALIGNMENT]
        size += len(head) + len(parts[1])
        header = HEADER.pack(len(head), size)
        if size > INLINE_BYTES_MAX:
            self.send_shared(header, parts)
            return
        packet = b"".join([header, *parts])
        with self.sending:
            self.sock.sendall(packet)

    def send_shared(self, header: bytes, parts: list[Any]) -> None:
        shared = os.memfd_create("batch", os.MFD_CLOEXEC)
        try:
            for part in parts:
                left = memoryview(part).cast("B") if len(part) else b""
                while len(left):
                    left = left[os.write(shared, left) :]
            with self.sending:
                socket.send_fds(self.sock, [header], [shared])
        finally:
            os.close(shared)

    def receive(self) -> tuple[Message, Arrays] | None:
        """None when the other side is gone. Arrays are the receiver's own, writable."""
        with self.receiving:
            if self.sock.fileno() < 0:
                return None
            try:
                count, ancillary, _, _ = self.sock.recvmsg_into([self.packet], DESCRIPTOR)
            except ConnectionResetError:
                return None
            if count == 0:
                return None
            return taken_apart(self.packet, ancillary)


def taken_apart(packet: bytearray, ancillary: Any) -> tuple[Message, Arrays]:
    head, size = HEADER.unpack_from(packet)
    payload: Any = packet
    start = HEADER.size
    if ancillary:
        payload, start = mapped(struct.unpack("i", ancillary[0][2])[0], size), 0
    message = DECODE(memoryview(payload)[start : start + head])
    start += head + -head % ALIGNMENT
    arrays = {one.name: taken_out(one, payload, start) for one in message.tensors or ()}
    if not ancillary:
        arrays = {name: array.copy() for name, array in arrays.items()}
    return message, arrays


def laid_out(arrays: Arrays, parts: list[Any]) -> tuple[list[Place], int]:
    """Appends to `parts` what lies at the places, and says how much that is."""
    places: list[Place] = []
    start = 0
    for name, array in arrays.items():
        kind = array.dtype.str
        content: Any = array
        if kind[1] in "OSU":
            kind, content = STRINGS, packed(array.reshape(-1))
        elif not array.flags.c_contiguous:
            content = np.ascontiguousarray(array)
        size = len(content) if kind is STRINGS else content.nbytes
        places.append(Place(name, kind, array.shape, start, size))
        if size:
            parts += (content, PADDING[-size % ALIGNMENT])
        start += size + -size % ALIGNMENT
    return places, start


def mapped(shared: int, size: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    try:
        return mmap.mmap(shared, size, flags=flags)
    finally:
        os.close(shared)


def taken_out(place: Place, payload: Any, start: int) -> Array:
    start += place.start
    if place.kind != STRINGS:
        return np.ndarray(place.shape, place.kind, payload, start)
    content = memoryview(payload)[start : start + place.size]
    array = np.empty(math.prod(place.shape), object)
    array[:] = list(unpacked(content))
    return array.reshape(place.shape)


def packed(elements: Iterable[Any]) -> bytes:
    encoded = [one if isinstance(one, bytes) else str(one).encode() for one in elements]
    return b"".join(LENGTH.pack(len(one)) + one for one in encoded)


def unpacked(content: memoryview) -> Iterator[bytes]:
    start = 0
    while start < len(content):
        (length,) = LENGTH.unpack_from(content, start)
        start += LENGTH.size + length
        yield bytes(content[start - length : start])
