"""The native front: C++ threads do HTTP/2 and read and write ModelInfer; Python does the policy.

`leptonic_native` is compiled from native/ by scripts/native.sh; this is its thin other half. What
its thread has to say about the calls it does not answer itself comes over an eventfd.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from libs.contracts.artifacts import Tensor
from libs.contracts.pipeline import Batching
from services.inference import rpcs, tensors
from services.inference.front import Counts, Lane, Note, Sampling, ServerCall
from services.inference.rpcs import OF_TRANSPORT, PREFIX, WINDOW_BITS, inflated

EXTENSION = "leptonic_native"
UNSENT_BYTES_MAX = 1 << 20
"""Of a call: written, and not read by its client yet."""
US = 1000
"""In ns."""
CallId = tuple[int, int]
"""The connection, never twice the same; its stream."""


class NativeCall:
    """A `front.ServerCall`."""

    def __init__(
        self,
        front: "NativeFront",
        id: CallId,
        method: str,
        headers: Sequence[tuple[str, str]],
        peer: str,
        deadline_ns: int,
    ) -> None:
        self.front = front
        self.core = front.core
        self.id = id
        self.method = method
        self.encoding = dict(headers).get("grpc-encoding", "")
        self.metadata: Sequence[tuple[str, str]] = [
            pair for pair in headers if pair[0].encode() not in OF_TRANSPORT
        ]
        self.peer = peer
        self.deadline_ns = deadline_ns
        self.messages: deque[tuple[bytes, bool]] = deque()
        self.unsent_bytes = 0
        self.ended = self.over = False
        """The client has sent its last; the call has its status, or its client has gone."""
        self.changed = asyncio.Event()
        self.lost: Callable[[], None] | None = None

    async def read(self) -> bytes | None:
        while not self.messages:
            if self.over:
                raise asyncio.CancelledError
            if self.ended:
                return None
            await self.change()
        message, compressed = self.messages.popleft()
        self.core.taken(*self.id, len(message))
        if not compressed:
            return message
        return await asyncio.to_thread(inflated, message, WINDOW_BITS[self.encoding])

    async def write(self, message: bytes) -> None:
        if not self.over:
            self.core.write(*self.id, message)
            self.unsent_bytes += PREFIX.size + len(message)
        while not self.over and self.unsent_bytes > UNSENT_BYTES_MAX:
            await self.change()
        if self.over:
            raise asyncio.CancelledError

    def finish(self, code: int, text: str = "", trailing: Sequence[tuple[str, str]] = ()) -> None:
        if not self.over:
            self.over = True
            del self.front.calls[self.id]
            self.core.finish(*self.id, code, text, list(trailing))

    def on_gone(self, gone: Callable[[], None]) -> None:
        self.lost = gone

    def gone(self) -> None:
        if not self.over:
            self.over = True
            del self.front.calls[self.id]
            self.changed.set()
            if self.lost is not None:
                self.lost()

    async def change(self) -> None:
        self.changed.clear()
        await self.changed.wait()


class NativeBatcher:
    """A `front.Batcher`: the extension's own, told its limits by name."""

    def __init__(self, core: Any) -> None:
        self.core = core
        self.join = core.join
        self.leave = core.leave
        self.take = core.take
        self.close = core.close
        self.counts = core.counts

    def configure(self, limits: Batching, sampling: Sampling) -> None:
        self.core.configure(*sampling, **limits_of(limits))


class NativeFront:
    """A `front.Front`."""

    def __init__(self, on_call: Callable[[ServerCall], None], tokens: Collection[str]) -> None:
        self.on_call = on_call
        self.core = import_module(EXTENSION).Front(list(tokens), Note, Counts, rpcs.HELD_BYTES_MAX)
        self.port = 0
        self.calls: dict[CallId, NativeCall] = {}
        self.closed = asyncio.Event()

    async def listen(self, host: str, port: int, shared: bool) -> None:
        self.port = self.core.listen(host, port, shared)
        asyncio.get_running_loop().add_reader(self.core.fileno(), self.hear)

    def batcher(self, lane: Lane) -> NativeBatcher:
        inputs, outputs = map(typed, (lane.signature.inputs, lane.signature.outputs))
        return NativeBatcher(
            self.core.batcher(lane.model, lane.version, inputs, outputs, lane.batched, lane.opaque)
        )

    def route(self, model: str, shares: Mapping[str, int], batchers: Mapping[str, Any]) -> None:
        cores = {version: one.core for version, one in batchers.items()}
        self.core.route(model, list(shares.items()), cores)

    def say_goodbye(self) -> None:
        self.core.say_goodbye()

    async def close(self, patience_s: float) -> None:
        if not self.port:
            return
        self.core.close(patience_s)
        await self.closed.wait()
        asyncio.get_running_loop().remove_reader(self.core.fileno())
        for call in list(self.calls.values()):
            call.gone()

    @property
    def held(self) -> int:
        """Bytes of requests that are coming, or are neither answered nor read."""
        return int(self.core.gathered())

    def stages(self) -> dict[str, float]:
        """Microseconds that a request spends in each part of the front and its batchers."""
        return dict(self.core.stages())

    def hear(self) -> None:
        for kind, connection, stream, payload, headers, peer, number in self.core.events():
            which = (connection, stream)
            if kind == self.core.OPENED:
                call = NativeCall(self, which, payload, headers, peer, number)
                self.calls[which] = call
                self.on_call(call)
            elif kind == self.core.CLOSED:
                self.closed.set()
            elif which in self.calls:
                self.told(self.calls[which], kind, payload, number)

    def told(self, call: NativeCall, kind: int, payload: bytes, number: int) -> None:
        if kind == self.core.GONE:
            call.gone()
            return
        if kind == self.core.MESSAGE:
            call.messages.append((payload, bool(number)))
        elif kind == self.core.ENDED:
            call.ended = True
        else:
            call.unsent_bytes -= number
        call.changed.set()


def available() -> bool:
    return find_spec(EXTENSION) is not None


def typed(given: Sequence[Tensor]) -> list[tuple[str, str, list[int], Any]]:
    return [(one.name, one.datatype, one.shape, tensors.DTYPES[one.datatype]) for one in given]


def limits_of(limits: Batching) -> dict[str, Any]:
    return {
        "max_batch_size": limits.max_batch_size,
        "preferred_batch_size": list(limits.preferred_batch_size),
        "max_queue_delay_ns": limits.max_queue_delay_microseconds * US,
        "max_queue_size": limits.max_queue_size,
        "priority_levels": limits.priority_levels,
        "default_priority_level": limits.default_priority_level,
        "default_timeout_us": limits.default_timeout_microseconds,
        "allow_timeout_override": limits.allow_timeout_override,
        "delay_late": limits.timeout_action == "DELAY",
    }
