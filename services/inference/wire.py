"""ModelInfer on the wire, read and written without protobuf objects where requests repeat.

Clients repeat themselves: what comes before the raw contents is the same bytes from one request to
the next, but for the id. A request whose bytes were read before costs a slice and a look-up; the
others are read by protobuf once. What is anything but plain is nobody's business here (None).
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from google.protobuf.message import DecodeError

from libs.contracts.protos import open_inference_pb2 as oip
from services.inference import domain, tensors
from services.inference.front import Lane

LENGTH_DELIMITED = 2
MODEL_NAME, MODEL_VERSION, ID, PARAMETERS, INPUTS, OUTPUTS, RAWS = range(1, 8)
RAW_OUTPUTS = 6
FIELDS_MAX = 256
"""At the top of a message that is read here."""
HEAD_BYTES_MAX = 4096
"""Of a message before its raw contents, to be remembered."""
PLACES_MAX = 4
"""For messages of one length; each is tried."""
REMEMBERED_MAX = 1024
BIG_BYTES = 1 << 16
"""From here on contents are not copied out of their message."""
INT64_MAX = (1 << 63) - 1
TRACEPARENT = "traceparent"
EMPTY_FINAL = "triton_enable_empty_final_response"
Span = tuple[int, int]


class Fit(NamedTuple):
    """How a request goes into a lane."""

    order: tuple[int, ...]
    """Of its raw contents, as the signature names the inputs."""
    shapes: tuple[tuple[int, ...], ...]
    """With the rows."""
    rows: int
    outputs: tuple[int, ...]
    """Those asked for, by their place in the signature."""


class Ask:
    """Everything in a request but its id and its contents."""

    def __init__(
        self, request: oip.ModelInferRequest, raws: Sequence[Span], message: bytes
    ) -> None:
        self.model: str = request.model_name
        self.version: str = request.model_version
        self.names = tuple(one.name for one in request.inputs)
        self.datatypes = tuple(one.datatype for one in request.inputs)
        self.shapes = tuple(tuple(one.shape) for one in request.inputs)
        self.outputs = tuple(one.name for one in request.outputs)
        self.timeout_us: int = request.parameters["timeout"].int64_param
        priority = request.parameters["priority"]
        self.priority: int = priority.uint64_param or priority.int64_param
        self.raws = tuple(raws)
        ends = [end for _, end in raws]
        starts = [start for start, _ in raws]
        self.between = tuple(
            (end, start, message[end:start]) for end, start in zip(ends, starts[1:], strict=False)
        )
        """The tags and lengths of all contents but the first."""
        self.fits: dict[Hashable, Fit | None] = {}
        """By who asked."""

    def fit(self, key: Hashable, lane: Lane) -> Fit | None:
        """Whether and how it goes into the lane; kept for `key`."""
        found = self.fits[key] = self.fitted(lane)
        return found

    def fitted(self, lane: Lane) -> Fit | None:
        signature = lane.signature
        takes = [tensor.name for tensor in signature.inputs]
        gives = [tensor.name for tensor in signature.outputs]
        is_plain = (
            not lane.opaque
            and bool(takes)
            and sorted(self.names) == sorted(takes)
            and len(set(self.outputs)) == len(self.outputs)
            and set(self.outputs) <= set(gives)
            and not any(
                tensor.datatype == "BYTES" for tensor in (*signature.inputs, *signature.outputs)
            )
        )
        if not is_plain:
            return None
        order = tuple(self.names.index(name) for name in takes)
        shapes = tuple(self.shapes[index] for index in order)
        for index, tensor, shape in zip(order, signature.inputs, shapes, strict=True):
            if self.datatypes[index] != tensor.datatype or not fits(tensor.shape, shape):
                return None
            start, stop = self.raws[index]
            if math.prod(shape) * tensors.DTYPES[tensor.datatype].itemsize != stop - start:
                return None
        rows = 1
        if lane.batched:
            if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
                return None
            rows = shapes[0][0]
        outputs = tuple(gives.index(name) for name in self.outputs or gives)
        return Fit(order, shapes, rows, outputs)


class Read(NamedTuple):
    ask: Ask
    id: str
    raws: Sequence[bytes | memoryview]
    """In the order of the message."""


class Place:
    """Where the id lies and the contents begin in messages of one length, and what these ask."""

    def __init__(self, id: Span, head_end: int) -> None:
        self.id_start, self.id_end = id
        self.head_end = head_end
        self.asks: dict[bytes, Ask] = {}


class Reader:
    """Remembers what requests asked. For one thread."""

    def __init__(self) -> None:
        self.places: dict[int, list[Place]] = {}
        self.remembered = 0

    def forget(self) -> None:
        self.places.clear()
        self.remembered = 0

    def read(self, message: bytes) -> Read | None:
        for place in self.places.get(len(message), ()):
            ask = place.asks.get(message[: place.id_start] + message[place.id_end : place.head_end])
            if ask is not None and is_between(ask, message):
                return read_as(ask, message, place.id_start, place.id_end)
        return self.learn(message)

    def learn(self, message: bytes) -> Read | None:
        found = outline(message)
        if found is None:
            return None
        name, raws, head_end = found
        ask = asked(message, raws, head_end)
        if ask is None:
            return None
        self.remember(message, ask, name)
        return read_as(ask, message, *name)

    def remember(self, message: bytes, ask: Ask, id: Span) -> None:
        head_end = ask.raws[0][0]
        if head_end > HEAD_BYTES_MAX:
            return
        if self.remembered >= REMEMBERED_MAX:
            self.forget()
        self.remembered += 1
        places = self.places.setdefault(len(message), [])
        known = next(
            (one for one in places if (one.id_start, one.id_end, one.head_end) == (*id, head_end)),
            None,
        )
        if known is None:
            known = Place(id, head_end)
            places.append(known)
            del places[:-PLACES_MAX]
        known.asks[message[: id[0]] + message[id[1] : head_end]] = ask


def is_between(ask: Ask, message: bytes) -> bool:
    for end, start, tag in ask.between:  # noqa: SIM110 - nearly always none
        if message[end:start] != tag:
            return False
    return True


def read_as(ask: Ask, message: bytes, id_start: int, id_end: int) -> Read | None:
    """None when its id is none."""
    name = ""
    if id_end > id_start:
        try:
            name = message[id_start:id_end].decode()
        except UnicodeDecodeError:
            return None
        if not domain.is_id(name):
            return None
    if len(message) >= BIG_BYTES:
        view = memoryview(message)
        return Read(ask, name, [view[start:stop] for start, stop in ask.raws])
    return Read(ask, name, [message[start:stop] for start, stop in ask.raws])


def fits(wanted: Sequence[int], shape: Sequence[int]) -> bool:
    return len(wanted) == len(shape) and all(
        got >= 1 and want in (-1, got) for want, got in zip(wanted, shape, strict=True)
    )


def outline(message: bytes) -> tuple[Span, list[Span], int] | None:
    """(the id, the raw contents, where these begin with their tag) of a message in the usual order:
    contents last, at least one, at most one id."""
    at, head_end, name = 0, 0, (0, 0)
    raws: list[Span] = []
    for _ in range(FIELDS_MAX):
        if at == len(message):
            return (name, raws, head_end) if raws else None
        number, wire = message[at] >> 3, message[at] & 7
        length, start = varint(message, at + 1)
        end = start + length
        known = MODEL_NAME <= number <= RAWS and wire == LENGTH_DELIMITED
        if not known or length < 0 or end > len(message) or (raws and number != RAWS):
            return None
        if number == ID:
            if name[1]:
                return None
            name = (start, end)
        elif number == RAWS:
            head_end = head_end or at
            raws.append((start, end))
        at = end
    return None


def varint(message: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends); a value of -1 is none."""
    value = 0
    for index, byte in enumerate(message[at : at + 5]):
        value |= (byte & 127) << 7 * index
        if byte < 128:
            return value, at + index + 1
    return -1, at


def asked(message: bytes, raws: Sequence[Span], head_end: int) -> Ask | None:
    try:
        request = oip.ModelInferRequest.FromString(message[:head_end])
    except DecodeError:
        return None
    return Ask(request, raws, message) if is_plain(request, len(raws)) else None


def is_plain(request: oip.ModelInferRequest, raws: int) -> bool:
    return (
        len(request.inputs) == raws
        and not any(one.parameters or one.HasField("contents") for one in request.inputs)
        and not any(one.parameters for one in request.outputs)
        and all(is_known(name, value) for name, value in request.parameters.items())
    )


def is_known(name: str, value: oip.InferParameter) -> bool:
    kind = value.WhichOneof("parameter_choice")
    if name == "timeout":
        return kind == "int64_param" and value.int64_param >= 0
    if name == "priority":
        chosen = value.uint64_param if kind == "uint64_param" else value.int64_param
        return kind in ("uint64_param", "int64_param") and 0 <= chosen <= INT64_MAX
    return name == EMPTY_FINAL and kind == "bool_param"


class Reply(NamedTuple):
    """The response to requests of one shape: constants, with the id and the contents between."""

    lead: bytes
    """Up to the id's tag."""
    tail: bytes
    """From behind the id (and the traceparent) to the first output's contents' tag."""


def reply_of(
    lane: Lane, outputs: Sequence[int], rows: int, shapes: Sequence[Sequence[int]]
) -> Reply:
    """`shapes` as of `Delivery.answered`."""
    lead = oip.ModelInferResponse(model_name=lane.model, model_version=lane.version)
    tail = oip.ModelInferResponse()
    for index in outputs:
        tensor = lane.signature.outputs[index]
        shape = (rows, *shapes[index]) if lane.batched else shapes[index]
        tail.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
    return Reply(lead.SerializeToString(), tail.SerializeToString())


def traced(place: str) -> bytes:
    one = oip.ModelInferResponse()
    one.parameters[TRACEPARENT].string_param = place
    return one.SerializeToString()


def field(number: int, length: int) -> bytes:
    """The tag of a length-delimited field and its length."""
    found = bytearray([number << 3 | LENGTH_DELIMITED])
    while length > 127:
        found.append(length & 127 | 128)
        length >>= 7
    found.append(length)
    return bytes(found)


def written(reply: Reply, id: str, place: str, contents: Sequence[bytes]) -> list[bytes]:
    """A response in pieces."""
    text = id.encode()
    parts = [reply.lead, field(ID, len(text)), text, traced(place) if place else b"", reply.tail]
    for content in contents:
        parts += (field(RAW_OUTPUTS, len(content)), content)
    return parts
