"""The front in Python: HTTP/2 on the service's event loop, where the native one is missing.

What it costs is Python objects and hops, so a plain ModelInfer has as few as can be: its message is
looked up, joins its batcher, and comes back with its whole batch in one call on the loop.
"""

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from services.inference import frames, router, rpcs, wire
from services.inference.frames import Header
from services.inference.front import Lane, ServerCall
from services.inference.http2 import Connection
from services.inference.python_batcher import Answered, PythonBatcher
from services.inference.rpcs import Head, Rpc

BACKLOG = 1024
FORMS_MAX = 1024
TRY_AGAIN = (("retry-after", "1"),)
BEGIN = struct.Struct(f">IBI{len(rpcs.OPENING)}sIBI")
BEGIN_WORD = len(rpcs.OPENING) << 8 | frames.HEADERS
END = struct.Struct(f">IBI{len(rpcs.ENDING)}s")
END_WORD = len(rpcs.ENDING) << 8 | frames.HEADERS
END_FLAGS = frames.END_HEADERS | frames.END_STREAM
Arrival = tuple[Rpc, bytes, PythonBatcher, wire.Fit, wire.Ask, str, Sequence[bytes | memoryview]]
Batchers = Mapping[str, PythonBatcher]


class Route:
    """Who answers for a model."""

    def __init__(self, shares: Mapping[str, int], batchers: Batchers, position: int) -> None:
        self.batchers = dict(batchers)
        self.turns = turns(shares, batchers)
        self.position = position

    def next(self) -> PythonBatcher | None:
        if not self.turns:
            return None
        self.position += 1
        return self.turns[self.position % router.SLOTS]


def turns(shares: Mapping[str, int], batchers: Batchers) -> list[PythonBatcher]:
    """Whose turn it is at each position; it comes round after as many as there are slots."""
    if not any(shares.values()):
        return []
    return [batchers[router.choose(shares, position)] for position in range(router.SLOTS)]


class Form(NamedTuple):
    """The one DATA frame of an answer, around its id and its contents."""

    word: int
    """Its length and type."""
    size: int
    lead: bytes
    tail: bytes
    tags: Sequence[bytes]
    """Of the contents but the first."""


class Returns:
    """Brings the answers of one lane back to the loop: `python_batcher.Delivery`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, lane: Lane) -> None:
        self.loop = loop
        self.lane = lane
        self.shapes: Sequence[tuple[int, ...]] = ()
        self.forms: dict[tuple[tuple[int, ...], int, int], Form] = {}

    def answered(self, answers: Sequence[Answered], shapes: Sequence[tuple[int, ...]]) -> None:
        self.loop.call_soon_threadsafe(self.deliver, answers, shapes)

    def failed(self, replies: Sequence[Any], code: int, text: str) -> None:
        self.loop.call_soon_threadsafe(self.refuse, replies, code, text)

    def refuse(self, rpcs: Sequence[Rpc], code: int, text: str) -> None:
        for rpc in rpcs:
            rpc.finish(code, text)

    def deliver(self, answers: Sequence[Answered], shapes: Sequence[tuple[int, ...]]) -> None:
        if shapes != self.shapes or len(self.forms) > FORMS_MAX:
            self.shapes = shapes
            self.forms.clear()
        touched = set()
        for rpc, request_id, place, rows, contents in answers:
            if rpc.is_over:
                continue
            connection, name, outputs = rpc.connection, request_id.encode(), rpc.outputs
            form = self.forms.get((outputs, rows, len(name)))
            if form is None:
                form = self.form(outputs, rows, len(name), contents)
            if place or not rpc.ended or not connection.has_room(rpc, form.size):
                self.write(rpc, request_id, place, rows, contents)
                continue
            rpc.let_go()
            stream = rpc.id
            out = connection.out
            out += (
                BEGIN.pack(
                    BEGIN_WORD, frames.END_HEADERS, stream, rpcs.OPENING, form.word, 0, stream
                ),
                form.lead,
                name,
                form.tail,
                contents[outputs[0]],
            )
            for tag, output in zip(form.tags, outputs[1:], strict=True):
                out += (tag, contents[output])
            out.append(END.pack(END_WORD, END_FLAGS, stream, rpcs.ENDING))
            connection.sent(rpc, form.size)
            touched.add(connection)
        for connection in touched:
            connection.flush()

    def form(
        self, outputs: tuple[int, ...], rows: int, name_bytes: int, contents: Sequence[bytes]
    ) -> Form:
        reply = wire.reply_of(self.lane, outputs, rows, self.shapes)
        tags = [wire.field(wire.RAW_OUTPUTS, len(contents[index])) for index in outputs]
        lead = reply.lead + wire.field(wire.ID, name_bytes)
        tail = reply.tail + tags[0]
        size = len(lead) + name_bytes + len(tail) + sum(map(len, tags[1:]))
        size += sum(len(contents[index]) for index in outputs)
        whole = rpcs.PREFIX.size + size
        lead = rpcs.PREFIX.pack(0, size) + lead
        form = Form(whole << 8 | frames.DATA, whole, lead, tail, tags[1:])
        self.forms[outputs, rows, name_bytes] = form
        return form

    def write(self, rpc: Rpc, id: str, place: str, rows: int, contents: Sequence[bytes]) -> None:
        """An answer of any size, at any pace."""
        reply = wire.reply_of(self.lane, rpc.outputs, rows, self.shapes)
        parts = wire.written(reply, id, place, [contents[index] for index in rpc.outputs])
        size = sum(map(len, parts))
        small = b"".join(parts[:-1])
        rpc.send([rpcs.PREFIX.pack(0, size) + small, parts[-1]])
        rpc.finish(0)


class PythonFront:
    """A `front.Front`."""

    def __init__(self, on_call: Callable[[ServerCall], None], tokens: Collection[str]) -> None:
        self.on_call = on_call
        self.tokens = [token.encode() for token in tokens]
        self.loop = asyncio.get_running_loop()
        self.reader = wire.Reader()
        self.routes: dict[str, Route] = {}
        self.connections: set[Connection] = set()
        self.emptied = asyncio.Event()
        self.is_leaving = False
        self.arrivals: list[Arrival] = []
        self.held = 0
        self.port = 0
        self.server: asyncio.Server | None = None

    async def listen(self, host: str, port: int, shared: bool) -> None:
        self.server = await self.loop.create_server(
            lambda: Connection(self), host, port, reuse_port=shared, backlog=BACKLOG
        )
        self.port = self.server.sockets[0].getsockname()[1]

    def batcher(self, lane: Lane) -> PythonBatcher:
        return PythonBatcher(lane, Returns(self.loop, lane))

    def route(self, model: str, shares: Mapping[str, int], batchers: Mapping[str, Any]) -> None:
        known = self.routes.pop(model, None)
        if batchers:
            self.routes[model] = Route(shares, batchers, known.position if known else 0)
        self.reader.forget()

    def ask(self, rpc: Rpc, message: bytes) -> bool:
        if not rpc.head.is_plain:
            return False
        read = self.reader.read(message)
        route = self.routes.get(read.ask.model) if read else None
        if read is None or route is None:
            return False
        ask, request_id, raws = read
        batcher = route.batchers.get(ask.version) if ask.version else route.next()
        if batcher is None:
            return False
        fit = ask.fits[batcher] if batcher in ask.fits else ask.fit(batcher, batcher.lane)
        if fit is None or fit.rows > batcher.limits.max_batch_size:
            return False
        rpc.outputs = fit.outputs
        if not self.arrivals:
            self.loop.call_soon(self.join_all)
        self.arrivals.append((rpc, message, batcher, fit, ask, request_id, raws))
        return True

    def join_all(self) -> None:
        """Whoever came in this round of the loop joins in one go, so that they share a batch: the
        first wakes a runner, which comes to its turn when the loop has none."""
        arrivals, self.arrivals = self.arrivals, []
        for rpc, message, batcher, fit, ask, request_id, raws in arrivals:
            if rpc.is_over:
                continue
            if fit.rows > batcher.limits.max_batch_size:  # lowered meanwhile: Python says so
                rpc.leave_to_others(message)
                continue
            ticket = batcher.join_raw(
                [raws[index] for index in fit.order],
                fit.shapes,
                fit.rows,
                rpc,
                request_id,
                rpc.head.traceparent,
                rpc.deadline_ns,
                ask.timeout_us,
                ask.priority,
            )
            if ticket > 0:
                rpc.leave = (batcher, ticket)
            elif ticket == 0:
                rpc.finish(*batcher.refusal(ticket), TRY_AGAIN)
            else:  # closed since the route was read: Python knows who answers now
                rpc.leave_to_others(message)

    def head(self, headers: Sequence[Header]) -> Head:
        return rpcs.head_of(headers, self.tokens)

    def open(self, connection: Connection, id: int, head: Head) -> Rpc:
        return Rpc(connection, id, head, self)

    def connected(self, connection: Connection) -> None:
        self.connections.add(connection)
        if self.is_leaving:
            connection.leave()

    def lost(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self.emptied.set()

    def say_goodbye(self) -> None:
        self.is_leaving = True
        for connection in self.connections:
            connection.leave()

    async def close_door(self) -> None:
        """Who is in the kernel's queue comes in: closing would reset them. The loop looks once a
        round; so the last look is our own, and nothing but closing comes after it."""
        assert self.server is not None
        doors = [socket.socket(fileno=os.dup(one.fileno())) for one in self.server.sockets]
        self.server.close()
        came = [one for door in doors for one in accepted(door)]
        for one in came:
            await self.loop.connect_accepted_socket(lambda: Connection(self), one)

    async def close(self, patience_s: float) -> None:
        await self.close_door()
        self.say_goodbye()
        try:
            async with asyncio.timeout(patience_s):
                while self.connections:
                    self.emptied.clear()
                    await self.emptied.wait()
        except TimeoutError:
            for connection in list(self.connections):
                connection.cut()


def accepted(door: socket.socket) -> list[socket.socket]:
    """All who are there; then it is closed."""
    came = []
    door.setblocking(False)
    with door, contextlib.suppress(BlockingIOError):
        while True:
            came.append(door.accept()[0])
    return came
