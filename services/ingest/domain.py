"""What may land: the limits, which messages are new, and what is wrong with a record."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from libs.contracts.pipeline import Field

RECORD_BYTES_MAX = 1 << 20
"""One record, as JSON; also one string of an Arrow record."""
BATCH_MESSAGES_MAX = 256
BATCH_BYTES_MAX = 64 << 20
MESSAGE_BYTES_EXPECTED_MIN = 1 << 20
SHOWN_MAX = 40
INTEGERS = {
    "uint8": (0, 2**8 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
}
FLOATS = {"float32": 3.4028234663852886e38, "float64": 1.7976931348623157e308}
"""The largest finite value of each."""


class Place(msgspec.Struct, frozen=True):
    """Where records go."""

    project: str
    dataset: str

    @property
    def subject(self) -> str:
        return f"records.{self.project}.{self.dataset}"


class Problem(msgspec.Struct, frozen=True):
    """Why a record cannot land; `field` is "" when it is the record as a whole."""

    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}" if self.field else self.reason


class Refused(msgspec.Struct, frozen=True):
    """One record that did not land, with its bytes as they came."""

    index: int
    """Position in its message or body."""
    problem: Problem
    payload: bytes
    records: int = 1
    """More than one where a whole table is refused for its columns."""

    @property
    def reason(self) -> str:
        return f"record {self.index}: {self.problem}"


class Message(Protocol):
    """What of a delivery decides whether it is new."""

    @property
    def sequence(self) -> int: ...
    @property
    def stored_at_ns(self) -> int: ...


def place_of(subject: str) -> Place | None:
    """None where the subject is not `records.<project>.<dataset>`."""
    tokens = subject.split(".")
    return Place(tokens[1], tokens[2]) if len(tokens) == 3 else None


def key_of(message: Message) -> tuple[int, int]:
    """A message's identity: a stream made anew counts from 1 again, but not at the same time."""
    return message.sequence, message.stored_at_ns


def part_key(place: Place, digest: str) -> str:
    return f"parts/{place.project}/{place.dataset}/{digest}.parquet"


def fetch_limit(messages: int, held_bytes: int, largest_bytes: int) -> int:
    """How many messages to ask for, when so many are held and the largest lately was so large.

    0 when the batch is full. A size that jumps by more than `MESSAGE_BYTES_EXPECTED_MIN` can
    overshoot `BATCH_BYTES_MAX` by one fetch.
    """
    room = BATCH_BYTES_MAX - held_bytes
    if room <= 0:
        return 0
    expected = max(largest_bytes, MESSAGE_BYTES_EXPECTED_MIN)
    return min(BATCH_MESSAGES_MAX - messages, max(1, room // expected))


def sort_messages(
    ids: Mapping[tuple[int, int], str], landed: set[tuple[int, int]], ids_landed: set[str]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(fresh, duplicates) among messages in stream order; what has landed is in neither.

    `ids` maps a message to its message id, "" for none. A duplicate carries an id that an
    earlier message of the dataset carried.
    """
    fresh: list[tuple[int, int]] = []
    duplicates: list[tuple[int, int]] = []
    seen = set(ids_landed)
    for key, msg_id in ids.items():
        if key in landed:
            continue
        if msg_id and msg_id in seen:
            duplicates.append(key)
            continue
        seen.add(msg_id)
        fresh.append(key)
    return fresh, duplicates


def explain(record: Any, schema: Mapping[str, Field], *, flat: bool = False) -> Problem | None:
    """What is wrong with a record of builtins; None when nothing is.

    `flat` also takes a tensor as the row-major list of its values, as Arrow columns carry it.
    """
    if not isinstance(record, dict):
        return Problem("", f"expected an object, got {shown(record)}")
    for name, field in schema.items():
        value = record.get(name)
        if value is None and field.nullable:
            continue
        if name not in record:
            return Problem(name, "missing")
        reason = explain_value(value, field, flat)
        if reason:
            return Problem(name, reason)
    for name in record:
        if name not in schema:
            return Problem(str(name), f"unknown field: the schema has {', '.join(schema)}")
    return None


def explain_value(value: Any, field: Field, flat: bool) -> str:
    """ "" when the value fits."""
    if not field.shape:
        return explain_scalar(value, field.type)
    leaves = leaves_of(value, field.shape)
    if leaves is None and flat:
        leaves = leaves_of(value, [math.prod(field.shape)])
    if leaves is None:
        return f"expected shape {field.shape}, got {described(value)}"
    for index, leaf in enumerate(leaves):
        reason = explain_scalar(leaf, field.type)
        if reason:
            return f"value {index}: {reason}"
    return ""


def leaves_of(value: Any, shape: Sequence[int]) -> list[Any] | None:
    """A nested list's values in row-major order; None when it has another shape."""
    level = [value]
    for size in shape:
        if not all(isinstance(item, list) and len(item) == size for item in level):
            return None
        level = [leaf for item in level for leaf in item]
    return None if any(isinstance(leaf, list) for leaf in level) else level


def described(value: Any) -> str:
    """The shape a nested list has, by its first items."""
    if not isinstance(value, list):
        return shown(value)
    shape = []
    level = value
    while isinstance(level, list):
        shape.append(len(level))
        if not level:
            break
        level = level[0]
    return str(shape) if leaves_of(value, shape) is not None else f"{shape} with unequal lengths"


def explain_scalar(value: Any, kind: str) -> str:
    """ "" when the value fits the type."""
    if kind in INTEGERS:
        if not isinstance(value, int) or isinstance(value, bool):
            return f"expected {kind}, got {shown(value)}"
        low, high = INTEGERS[kind]
        return "" if low <= value <= high else f"{shown(value)} is not in {low} to {high} ({kind})"
    if kind in FLOATS:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"expected {kind}, got {shown(value)}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{value} is not a finite number"
        return "" if abs(value) <= FLOATS[kind] else f"{shown(value)} does not fit {kind}"
    if kind == "bool":
        return "" if isinstance(value, bool) else f"expected bool, got {shown(value)}"
    if not isinstance(value, str):
        return f"expected string, got {shown(value)}"
    return explain_text(value)


def explain_text(value: str) -> str:
    try:
        size_bytes = len(value.encode())
    except UnicodeEncodeError:
        return "the string holds a lone surrogate, which is not Unicode text"
    if size_bytes > RECORD_BYTES_MAX:
        return f"{size_bytes} bytes, the limit is {RECORD_BYTES_MAX}"
    return ""


def shown(value: Any) -> str:
    """A value with its type, short enough for an error."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    short = text if len(text) <= SHOWN_MAX else text[:SHOWN_MAX] + "..."
    return f"string {short!r}" if isinstance(value, str) else short
