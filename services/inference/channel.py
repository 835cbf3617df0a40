"""Messages between the service and a worker: no pickle, no parsing of what could be anything.

A small message travels inside its packet, a larger one as shared memory whose descriptor does.
Both sides use this file.
"""

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

INLINE_BYTES_MAX = 64 << 10
"""Two copies through the kernel; above it, making and mapping shared memory costs less."""
HEADER = struct.Struct("<IQ")
"""Length of the head, length of the whole payload."""
ALIGNMENT = 64
LENGTH = struct.Struct("<I")
STRINGS = "BYTES"
Array = NDArray[Any]
Arrays = dict[str, Array]


class Place(NamedTuple):
    name: str
    kind: str
    """numpy's (`<f4`), or `STRINGS`: each with its length before it."""
    shape: list[int]
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
    """One end of a pair of `SOCK_SEQPACKET` sockets. Anybody may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sending = Lock()
        self.packet = bytearray(HEADER.size + INLINE_BYTES_MAX)

    def send(self, message: Message, arrays: Arrays | None = None) -> None:
        """Raises `OSError` when the other side is gone."""
        parts: list[Any] = []
        if arrays is not None:
            message.tensors = list(laid_out(arrays, parts))
        head = ENCODE(message)
        parts[:0] = [head, bytes(-len(head) % ALIGNMENT)]
        size = sum(part.nbytes if isinstance(part, np.ndarray) else len(part) for part in parts)
        header = HEADER.pack(len(head), size)
        if size <= INLINE_BYTES_MAX:
            with self.sending:
                self.sock.sendall(b"".join([header, *parts]))
        else:
            self.send_shared(header, parts)

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
        try:
            count, ancillary, _, _ = self.sock.recvmsg_into([self.packet], socket.CMSG_SPACE(4))
        except ConnectionResetError:
            return None
        if count == 0:
            return None
        head, size = HEADER.unpack_from(self.packet)
        payload: Any
        if ancillary:
            payload = mapped(struct.unpack("i", ancillary[0][2])[0], size)
        else:
            payload = memoryview(self.packet)[HEADER.size : count].tobytes()
        message = DECODE(memoryview(payload)[:head])
        start = head + -head % ALIGNMENT
        return message, {
            one.name: taken_out(one, payload, start, own=bool(ancillary))
            for one in message.tensors or ()
        }

    def close(self) -> None:
        self.sock.close()


def laid_out(arrays: Arrays, parts: list[Any]) -> Iterator[Place]:
    """Appends to `parts` what lies at the places."""
    start = 0
    for name, array in arrays.items():
        kind = STRINGS if array.dtype.kind in "OSU" else array.dtype.str
        content = packed(array.reshape(-1)) if kind == STRINGS else np.ascontiguousarray(array)
        size = content.nbytes if isinstance(content, np.ndarray) else len(content)
        if size:
            parts += [content, bytes(-size % ALIGNMENT)]
        yield Place(name, kind, list(array.shape), start, size)
        start += size + -size % ALIGNMENT


def mapped(shared: int, size: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    try:
        return mmap.mmap(shared, size, flags=flags)
    finally:
        os.close(shared)


def taken_out(place: Place, payload: Any, start: int, own: bool) -> Array:
    start += place.start
    if place.kind == STRINGS:
        content = memoryview(payload)[start : start + place.size]
        array = np.empty(int(np.prod(place.shape)), object)
        array[:] = list(unpacked(content))
        return array.reshape(place.shape)
    kind = np.dtype(place.kind)
    array = np.frombuffer(payload, kind, place.size // kind.itemsize, start).reshape(place.shape)
    return array if own else array.copy()


def packed(elements: Iterable[Any]) -> bytes:
    encoded = [one if isinstance(one, bytes) else str(one).encode() for one in elements]
    return b"".join(LENGTH.pack(len(one)) + one for one in encoded)


def unpacked(content: memoryview) -> Iterator[bytes]:
    start = 0
    while start < len(content):
        (length,) = LENGTH.unpack_from(content, start)
        start += LENGTH.size + length
        yield bytes(content[start - length : start])
