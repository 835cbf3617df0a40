"""The batcher of the Python front: the queue of one served version, between threads.

`PythonBatcher(lane, delivery)` is a `front.Batcher`. The front's own requests join by `join_raw`
with their bytes, and come back by `Delivery`, once a batch: so that the front is woken once a
batch, not once a request.
"""

import threading
import time
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import msgspec
import numpy as np

from libs.contracts.artifacts import Tensor
from libs.contracts.pipeline import Batching
from services.inference import sampling, tensors
from services.inference.front import (
    Batch,
    Counts,
    Lane,
    Note,
    Sampling,
    Waiter,
    full_text,
    leaving_text,
)
from services.inference.line import Line
from services.inference.tally import Tally
from services.inference.tensors import Array, Arrays

NS = 1e9
MS = 1_000_000
"""In ns."""
NEVER = 1 << 63
DEADLINE_EXCEEDED = 4
RESOURCE_EXHAUSTED = 8
UNAVAILABLE = 14

Reply = Any
"""The front's own object of a request; handed back as it is."""
Raw = bytes | memoryview
Answered = tuple[Reply, str, str, int, tuple[bytes, ...]]
"""A request that joined by `join_raw`: its reply, its id (the client's own, else 32 hex digits),
the traceparent of its own span ("" when it is not traced), its rows, and these rows of each output
in the order of the signature."""


class Delivery(Protocol):
    """Where a batch's answers go. Called on a runner's thread."""

    def answered(self, answers: Sequence[Answered], shapes: Sequence[tuple[int, ...]]) -> None:
        """`shapes`: of each output in the order of the signature; where the lane is batched the
        shape of one row, to be led by the request's rows, else the whole shape."""

    def failed(self, replies: Sequence[Reply], code: int, text: str) -> None:
        """All with the same error: a batch that failed, or whose time was over."""


class Request(msgspec.Struct, gc=False, eq=False):
    """From Python with `arrays` and a `waiter`, or from the front with `raws` and a `reply`."""

    rows: int
    id: str
    parent: str
    arrays: Arrays | None = None
    waiter: Waiter | None = None
    raws: Sequence[Raw] = ()
    shapes: Sequence[Sequence[int]] = ()
    reply: Reply = None
    arrived_ns: int = 0
    traced: bool = False
    logged: bool = False
    place: str = ""


class PythonBatch:
    """A `front.Batch`."""

    def __init__(self, home: "PythonBatcher", requests: list[Request], taken_ns: int) -> None:
        self.home = home
        self.requests = requests
        self.taken_ns = taken_ns
        self.stops = list(accumulate(request.rows for request in requests))
        self.rows, self.size = self.stops[-1], len(requests)
        self.noted = {
            index: self.note(request, self.stops[index])
            for index, request in enumerate(requests)
            if request.traced or request.logged
        }
        self.notes: Sequence[Note] = list(self.noted.values())
        self.asked_ns = self.gathered_ns = taken_ns
        self.is_over = False

    def note(self, request: Request, stop: int) -> Note:
        return Note(
            id=request.id,
            parent=request.parent,
            place=request.place,
            logged=request.logged,
            start=stop - request.rows,
            stop=stop,
            arrived_ns=request.arrived_ns,
            taken_ns=self.taken_ns,
        )

    def inputs(self) -> Arrays:
        self.asked_ns = time.monotonic_ns()
        takes = self.home.lane.signature.inputs
        if len(self.requests) > 1 and all(request.arrays is None for request in self.requests):
            gathered = {tensor.name: self.joined(i, tensor) for i, tensor in enumerate(takes)}
        else:
            parts = [arrays_of(request, takes) for request in self.requests]
            gathered = parts[0] if len(parts) == 1 else concatenated(parts)
        self.gathered_ns = time.monotonic_ns()
        return gathered

    def joined(self, index: int, tensor: Tensor) -> Array:
        """Bytes are cheaper to join than arrays: one array a batch, not one a request."""
        raw = b"".join([request.raws[index] for request in self.requests])
        return array_of(tensor.datatype, (self.rows, *self.requests[0].shapes[index][1:]), raw)

    def answer(self, outputs: Arrays) -> None:
        assert not self.is_over
        inferred_ns = time.monotonic_ns()
        arrays = self.home.checked(outputs, self.rows)
        pieces = self.encoded(arrays) if any(r.waiter is None for r in self.requests) else []
        self.is_over = True
        encoded_ns = time.monotonic_ns()
        spent_ns = (
            self.gathered_ns - self.asked_ns,
            inferred_ns - self.gathered_ns,
            encoded_ns - inferred_ns,
        )
        self.home.count(self.requests, self.rows, self.taken_ns, spent_ns)
        if pieces:
            self.deliver(arrays, pieces)
        self.tell(outputs)

    def encoded(self, arrays: Sequence[Array]) -> list[tuple[bytes, ...]]:
        """Each request's rows of each output."""
        starts = [0, *self.stops]
        columns = []
        for tensor, array in zip(self.home.lane.signature.outputs, arrays, strict=True):
            whole = tensors.to_raw(tensor.datatype, array)
            row = len(whole) // self.rows
            columns.append(
                [whole[a * row : b * row] for a, b in zip(starts, self.stops, strict=False)]
            )
        return list(zip(*columns, strict=True))

    def deliver(self, arrays: Sequence[Array], pieces: Sequence[tuple[bytes, ...]]) -> None:
        assert self.home.delivery is not None
        lead = 1 if self.home.lane.batched else 0
        answers = [
            (request.reply, request.id, request.place, request.rows, piece)
            for request, piece in zip(self.requests, pieces, strict=True)
            if request.waiter is None
        ]
        self.home.delivery.answered(answers, [array.shape[lead:] for array in arrays])

    def tell(self, outputs: Arrays) -> None:
        for index, request in enumerate(self.requests):
            if request.waiter is not None:
                stop = self.stops[index]
                request.waiter.answered(
                    outputs, stop - request.rows, stop, self.rows, self.noted.get(index)
                )

    def fail(self, code: int, text: str) -> None:
        assert not self.is_over
        self.is_over = True
        self.home.over(self.size)
        self.home.fail(self.requests, code, text)

    def split(self) -> list[Batch]:
        assert not self.is_over
        self.is_over = True
        self.home.parted(self.size)
        return [PythonBatch(self.home, [request], self.taken_ns) for request in self.requests]


class PythonBatcher:
    """A `front.Batcher`. Without `delivery` nobody joins by `join_raw`."""

    def __init__(self, lane: Lane, delivery: Delivery | None = None) -> None:
        self.lane = lane
        self.delivery = delivery
        self.names = [tensor.name for tensor in lane.signature.inputs]
        inputs = lane.signature.inputs
        self.is_alike = not lane.batched or all(min(t.shape[1:], default=1) > 0 for t in inputs)
        """Any requests may share a batch."""
        self.limits = within(Batching(), lane)
        self.line = Line(self.limits)
        self.requests: dict[int, Request] = {}
        """Those in line, by ticket."""
        self.tickets = 0
        self.sampler = sampling.Sampler()
        self.tally = Tally()
        self.closed = False
        self.lock = threading.Lock()
        """Of everything here and in what it holds."""
        self.changed = threading.Condition(self.lock)
        self.idle = 0
        """Runners that look again when `changed` says so."""
        self.look_ns = NEVER
        """One of the idle looks again by then, without being told."""

    def configure(self, limits: Batching, sampling: Sampling) -> None:
        with self.lock:
            self.limits = within(limits, self.lane)
            self.line.configure(self.limits)
            self.sampler.configure(sampling)
            self.changed.notify()

    def join(
        self,
        inputs: Arrays,
        rows: int,
        waiter: Waiter,
        id: str = "",
        traceparent: str = "",
        deadline_ns: int = 0,
        timeout_us: int = 0,
        priority: int = 0,
    ) -> int:
        kind = () if self.is_alike else tuple(inputs[name].shape[1:] for name in self.names)
        request = Request(rows, id, traceparent, arrays=inputs, waiter=waiter)
        return self.enter(request, kind, deadline_ns, timeout_us, priority)

    def join_raw(
        self,
        raws: Sequence[Raw],
        shapes: Sequence[Sequence[int]],
        rows: int,
        reply: Reply,
        id: str = "",
        traceparent: str = "",
        deadline_ns: int = 0,
        timeout_us: int = 0,
        priority: int = 0,
    ) -> int:
        """`raws` and `shapes` (with their rows) are in the order of the signature and fit it.

        A ticket as of `join`. `reply` comes back by `Delivery`, once, unless its ticket leaves.
        """
        kind = () if self.is_alike else tuple(tuple(shape[1:]) for shape in shapes)
        request = Request(rows, id, traceparent, raws=raws, shapes=shapes, reply=reply)
        return self.enter(request, kind, deadline_ns, timeout_us, priority)

    def enter(
        self, request: Request, kind: Hashable, deadline_ns: int, timeout_us: int, priority: int
    ) -> int:
        with self.lock:
            if self.closed:
                return -1
            now_ns, ticket, rows = time.monotonic_ns(), self.tickets + 1, request.rows
            if not self.line.join(ticket, rows, kind, now_ns, deadline_ns, timeout_us, priority):
                self.tally.failed(RESOURCE_EXHAUSTED, 1, 0)
                return 0
            self.tickets = ticket
            self.requests[ticket] = request
            request.arrived_ns = now_ns
            request.traced, request.logged = self.sampler.arrived(request.parent, now_ns)
            if self.idle and now_ns + self.line.wait_ns(now_ns) < self.look_ns:
                self.changed.notify()
        return ticket

    def refusal(self, ticket: int) -> tuple[int, str]:
        """(code, text) for a ticket of 0 or -1."""
        if ticket:
            return UNAVAILABLE, leaving_text(self.name)
        return RESOURCE_EXHAUSTED, full_text(self.name, f"{self.line.waiting} requests")

    @property
    def name(self) -> str:
        return f"model '{self.lane.model}' version {self.lane.version}"

    def leave(self, ticket: int) -> None:
        with self.lock:
            if self.requests.pop(ticket, None) is not None:
                self.line.leave(ticket)
                self.changed.notify()

    def take(self) -> PythonBatch | None:
        while True:
            with self.lock:
                now_ns = time.monotonic_ns()
                turn = self.line.take(now_ns, self.idle + 1)
                late = [(self.requests.pop(key), by_client) for key, by_client in turn.late]
                batch = [self.requests.pop(key) for key in turn.batch]
                if not batch and not late:
                    if self.closed and not self.line.waiting:
                        return None
                    self.rest(now_ns, turn.wait_ns)
                    continue
                if self.idle and self.line.waiting:
                    self.changed.notify()
            for request, by_client in late:
                self.tell_late(request, by_client, now_ns)
            if batch:
                return PythonBatch(self, named(batch), now_ns)

    def rest(self, now_ns: int, wait_ns: int) -> None:
        """Until something changed, at most so long; 0: as long as it takes."""
        self.idle += 1
        if wait_ns:
            self.look_ns = min(self.look_ns, now_ns + wait_ns)
        self.changed.wait(wait_ns / NS if wait_ns else None)
        self.look_ns = NEVER
        self.idle -= 1

    def tell_late(self, request: Request, by_client: bool, now_ns: int) -> None:
        waited_ms = (now_ns - request.arrived_ns) // MS
        if by_client:
            text = f"{self.name}: waited {waited_ms} ms for its turn"
            self.fail([request], DEADLINE_EXCEEDED, text)
        else:
            self.fail([request], UNAVAILABLE, "Request timeout expired")

    def over(self, requests: int) -> None:
        with self.lock:
            self.line.over(requests)

    def parted(self, parts: int) -> None:
        with self.lock:
            self.line.parted(parts)

    def fail(self, requests: Sequence[Request], code: int, text: str) -> None:
        now_ns = time.monotonic_ns()
        with self.lock:
            self.tally.failed(code, len(requests), sum(now_ns - r.arrived_ns for r in requests))
        replies = [request.reply for request in requests if request.waiter is None]
        if replies:
            assert self.delivery is not None
            self.delivery.failed(replies, code, text)
        for request in requests:
            if request.waiter is not None:
                request.waiter.failed(code, text)

    def checked(self, outputs: Arrays, rows: int) -> list[Array]:
        """In the order of the signature. Raises `ValueError`."""
        return [
            checked(outputs, tensor, rows if self.lane.batched else None)
            for tensor in self.lane.signature.outputs
        ]

    def count(
        self, requests: Sequence[Request], rows: int, taken_ns: int, spent_ns: tuple[int, int, int]
    ) -> None:
        """Before anybody is told: who has an answer finds it in the statistics."""
        with self.lock:
            arrived_ns = [request.arrived_ns for request in requests]
            ended_ns = self.tally.answered(arrived_ns, rows, taken_ns, spent_ns)
            self.line.over(len(requests))
            self.line.answered(len(requests), ended_ns - taken_ns, ended_ns)

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.changed.notify_all()

    def counts(self) -> Counts:
        with self.lock:
            return self.tally.counts(self.line.waiting)


def within(limits: Batching, lane: Lane) -> Batching:
    """Where rows have no meaning each request runs alone."""
    if lane.batched:
        return limits
    return msgspec.structs.replace(limits, max_batch_size=1, preferred_batch_size=())


def named(requests: list[Request]) -> list[Request]:
    """With an id each, and a place in its trace for those that are traced."""
    for request, new in zip(requests, sampling.ids(len(requests)), strict=True):
        request.id = request.id or new
        if request.traced:
            request.place = sampling.place_under(request.parent)
    return requests


def arrays_of(request: Request, takes: Sequence[Tensor]) -> Arrays:
    if request.arrays is not None:
        return request.arrays
    given = zip(takes, request.shapes, request.raws, strict=True)
    return {tensor.name: array_of(tensor.datatype, shape, raw) for tensor, shape, raw in given}


def array_of(datatype: str, shape: Sequence[int], raw: Raw) -> Array:
    """Without a copy, unless the bytes lie where no array of theirs may start."""
    if datatype == "BOOL":
        return np.frombuffer(raw, np.uint8).astype(np.bool_).reshape(shape)
    return np.require(np.frombuffer(raw, tensors.DTYPES[datatype]).reshape(shape), requirements="A")


def concatenated(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def checked(outputs: Arrays, tensor: Tensor, rows: int | None) -> Array:
    array = outputs.get(tensor.name)
    if array is None:
        raise ValueError(f"output '{tensor.name}' is missing")
    if rows is not None and (array.ndim == 0 or array.shape[0] != rows):
        raise ValueError(f"output '{tensor.name}' has shape {list(array.shape)} for {rows} rows")
    dtype = tensors.DTYPES[tensor.datatype]
    if array.dtype != dtype and not (tensor.datatype == "BYTES" and array.dtype.kind in "SU"):
        raise ValueError(f"output '{tensor.name}' has {array.dtype}, its signature {dtype}")
    return array
