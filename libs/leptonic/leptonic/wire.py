"""JSON as the doors send it, with its numbers back.

Protobuf writes 64-bit integers as strings, and every number of a Struct as a double.
"""

import json
from typing import Any

INT64 = frozenset(
    {
        "after", "aliases", "borrowed", "by", "correct", "cpu_milli",
        "dead_letters", "duplicates", "duration_s", "errors", "generation", "gpu_milli",
        "gpu_milli_bound", "gpu_milli_fragmented", "labelled", "left", "lent",
        "memory_mib", "nominal", "number", "owes", "parts", "ready_generation", "requests",
        "revision", "rows", "share", "size_bytes", "used", "versions", "weight", "window_rows",
    }
)  # fmt: skip
"""Every int64 field of the protos, and the map whose values are; a test compares."""
STRUCTS = frozenset(
    {
        "autoscaling",
        "batching",
        "checks",
        "inputs",
        "label",
        "manifest",
        "outputs",
        "result",
        "schema",
        "spec",
    }
)
"""Every field that holds free JSON: its strings are left as they are; a test compares."""
EXACT_MAX = 1 << 53
"""Up to here a double holds every whole number."""


def decoded(payload: bytes) -> Any:
    """An answer's JSON, with its numbers as numbers."""
    return numbered(json.loads(payload)) if payload else None


def numbered(value: Any, is_int: bool = False) -> Any:
    match value:
        case dict():
            return {
                name: whole(one) if name in STRUCTS else numbered(one, is_int or name in INT64)
                for name, one in value.items()
            }
        case list():
            return [numbered(one) for one in value]
        case str() if is_int and value.lstrip("-").isdigit():
            return int(value)
    return value


def whole(value: Any) -> Any:
    """7.0 is 7 again, all through free JSON."""
    match value:
        case dict():
            return {name: whole(one) for name, one in value.items()}
        case list():
            return [whole(one) for one in value]
        case float() if value.is_integer() and abs(value) <= EXACT_MAX:
            return int(value)
    return value
