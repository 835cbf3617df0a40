"""The row steps: which records a version holds, and on which side of the split each lies.

Row steps (`cast`, `drop_nulls`, `drop_duplicates`) come first, in the order written; then the
feature steps of `transform.py`. A version keeps its features as they landed, because that is what
a request brings; a cast of a feature decides here which rows can be cast, and runs in the graph.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from libs.contracts.pipeline import TYPES, Field
from services.preprocess.table import (
    DTYPES,
    Array,
    Column,
    Table,
    Unusable,
    canonical_rows,
    column_from_values,
    empty,
    whole,
)

TEST_FRACTION = 0.2
Steps = list[dict[str, dict[str, Any]]]


class Cleaned(msgspec.Struct, frozen=True):
    table: Table
    """Features as they landed, the other columns cast."""
    schema: dict[str, Field]
    """Of `table`."""
    content: Table
    """The same records with every cast applied: what makes two of them the same."""


def named(steps: Steps) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(path, name, options) of every step, in order."""
    for number, step in enumerate(steps):
        for name, options in step.items():
            yield f"$.preprocess[{number}].{name}", name, options


def clean(table: Table, schema: Mapping[str, Field], steps: Steps) -> Cleaned:
    """Applies the row steps. Raises `Unusable` when nulls are left where none may be."""
    content, types = table, dict(schema)
    for path, name, options in named(steps):
        columns = list(options.get("columns", schema))
        if name == "cast":
            to = cast_type(path, options)
            content = cast(path, content, columns, types, to)
            types |= {one: msgspec.structs.replace(types[one], type=to) for one in columns}
        elif name == "drop_nulls":
            keep = np.all([content.columns[one].valid for one in columns], axis=0)
            content, table = content.take(keep), table.take(keep)
        elif name == "drop_duplicates":
            keep = first_of_each(content, columns)
            content, table = content.take(keep), table.take(keep)
    forbid_nulls(content, schema)
    features = {name for name, field in schema.items() if field.role == "feature"}
    columns_kept = {name: (table if name in features else content).columns[name] for name in schema}
    final = {name: schema[name] if name in features else types[name] for name in schema}
    return Cleaned(Table(columns_kept, table.sequence, table.index), final, content)


def cast_type(path: str, options: dict[str, Any]) -> str:
    to = options.get("to")
    if to not in TYPES:
        raise Unusable(f"{path}.to", f"one of {', '.join(TYPES)}, got {to!r}")
    return str(to)


def cast(path: str, table: Table, columns: list[str], types: Mapping[str, Field], to: str) -> Table:
    """What cannot be cast becomes null. Floats become integers by truncation."""
    changed = {}
    for name in columns:
        source = types[name].type
        if to == "string" and source not in ("string", "int32", "int64", "uint8"):
            raise Unusable(f"{path}.columns", f"{name!r} is {source}, which has no one text")
        changed[name] = cast_column(table.columns[name], types[name], to)
    return Table({**table.columns, **changed}, table.sequence, table.index)


def cast_column(column: Column, field: Field, to: str) -> Column:
    if field.type == to:
        return column
    target = msgspec.structs.replace(field, type=to)
    rows = len(column.valid)
    if to == "string":
        texts = [str(value) for value in column.values.reshape(-1)]
        return Column(np.array(texts, np.object_).reshape(column.values.shape), column.valid)
    numbers = column.values
    if field.type == "string":
        parsed = [number_of(text) for text in numbers.reshape(-1)]
        numbers = np.array(parsed, np.float64).reshape(numbers.shape)
    fits = np.isfinite(numbers) if numbers.dtype.kind == "f" else np.ones(numbers.shape, bool)
    if to in ("int32", "int64", "uint8"):
        limits = np.iinfo(DTYPES[to])
        truncated = np.trunc(numbers) if numbers.dtype.kind == "f" else numbers
        fits &= (truncated >= limits.min) & (truncated <= limits.max)
    valid = column.valid & whole(fits)
    values = empty(rows, target)
    with np.errstate(over="ignore"):  # a float64 past float32 is an infinity, which is null
        values[valid] = numbers[valid].astype(DTYPES[to])
    found = column_from_values(values, target)
    return Column(found.values, valid & found.valid)


def number_of(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def first_of_each(table: Table, columns: list[str]) -> Array:
    """True for the first record, in landing order, of each content."""
    seen: set[bytes] = set()
    keep = np.zeros(table.rows, bool)
    for position, row in enumerate(canonical_rows(table, columns)):
        key = hashlib.sha256(row).digest()
        keep[position] = key not in seen
        seen.add(key)
    return keep


def forbid_nulls(table: Table, schema: Mapping[str, Field]) -> None:
    for name, field in schema.items():
        nulls = int(np.count_nonzero(~table.columns[name].valid))
        if nulls and field.role != "ignore":
            problem = f"{nulls} of {table.rows} records are null here: add it to drop_nulls"
            raise Unusable(f"$.dataset.schema.{name}", problem)


def split(content: Table, steps: Steps) -> Array:
    """True for the records of the test split.

    The side follows from the record's content and the seed alone: the first 8 bytes of
    sha256(seed, canonical row), little-endian, against `test` * 2**64. So a record lies on the
    same side in every version, and equal records lie on one side.
    """
    fraction, seed = TEST_FRACTION, 0
    for path, name, options in named(steps):
        if name == "split":
            fraction = number(path, "test", options.get("test", TEST_FRACTION))
            seed = options.get("seed", 0)
            if not 0 <= fraction < 1:
                raise Unusable(f"{path}.test", f"0 or more and less than 1, got {fraction}")
    start = hashlib.sha256(f"leptonic split {seed}\n".encode())
    bound = int(fraction * 2**64)
    sides = np.zeros(content.rows, bool)
    for position, row in enumerate(canonical_rows(content, list(content.columns))):
        of_row = start.copy()
        of_row.update(row)
        sides[position] = int.from_bytes(of_row.digest()[:8], "little") < bound
    return sides


def number(path: str, option: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise Unusable(f"{path}.{option}", f"a number, got {value!r}")
    return float(value)
