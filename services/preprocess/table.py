"""Records as numpy columns, and their one Parquet and one byte form."""

import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from libs.contracts.pipeline import Field

Array = NDArray[Any]
DTYPES: dict[str, Any] = {
    "bool": np.bool_,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "float32": np.float32,
    "float64": np.float64,
    "string": np.object_,
}
ARROW: dict[str, Any] = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
}
SEQUENCE, INDEX = "_sequence", "_index"
"""Where a record came from: its message in the stream, and its place in that message."""


class Unusable(ValueError):
    """Data or steps from which no version can be built; `field` names where."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Column(msgspec.Struct, frozen=True):
    """`values` [rows, *shape], zero or "" where `valid` [rows] is False."""

    values: Array
    valid: Array

    def take(self, rows: Array) -> "Column":
        return Column(self.values[rows], self.valid[rows])


class Table(msgspec.Struct, frozen=True):
    columns: dict[str, Column]
    sequence: Array
    index: Array

    @property
    def rows(self) -> int:
        return len(self.sequence)

    def take(self, rows: Array) -> "Table":
        """By a boolean mask or by positions."""
        columns = {name: column.take(rows) for name, column in self.columns.items()}
        return Table(columns, self.sequence[rows], self.index[rows])


def column_from_values(values: Array, field: Field) -> Column:
    """[rows, *shape] of the field's type; NaN and infinities count as null."""
    if field.type not in ("float32", "float64"):
        return Column(values, np.ones(len(values), bool))
    valid = whole(np.isfinite(values))
    values = values.copy()
    values[~valid] = 0
    return Column(values + values.dtype.type(0), valid)  # + 0: -0.0 and 0.0 are one value


def whole(elements: Array) -> Array:
    """[rows, *shape] of bool -> [rows]: whether all of a record's are True."""
    return np.asarray(elements.all(axis=tuple(range(1, elements.ndim))))


def column_from_arrow(name: str, data: Any, field: Field) -> Column:
    """An Arrow column, tensors in any nesting of lists, as the schema describes it."""
    if isinstance(data.type, pa.BaseExtensionType):
        data = data.cast(data.type.storage_type)
    present = data.drop_null()
    flat = present
    while pa.types.is_nested(flat.type):
        flat = flat.flatten()
    try:
        flat = flat.cast(ARROW[field.type])
    except pa.ArrowInvalid as error:
        raise Unusable(name, f"landed as {data.type}, not {field.type}: {error}") from error
    if len(flat) != len(present) * math.prod(field.shape) or flat.null_count:
        raise Unusable(name, f"{len(flat)} values in {len(present)} records of {field.shape}")
    valid = data.is_valid().to_numpy(zero_copy_only=False).astype(bool)
    numbers = flat.to_numpy(zero_copy_only=False).astype(DTYPES[field.type], copy=False)
    values = empty(len(valid), field)
    found = column_from_values(numbers.reshape(len(present), *field.shape), field)
    values[valid] = found.values
    valid[valid] = found.valid
    return Column(values, valid)


def empty(rows: int, field: Field) -> Array:
    if field.type == "string":
        return np.full((rows, *field.shape), "", np.object_)
    return np.zeros((rows, *field.shape), DTYPES[field.type])


def read(payload: bytes, schema: Mapping[str, Field]) -> Table:
    """A landed part. A column that the part lacks is all null. Raises `Unusable`."""
    try:
        landed = pq.read_table(io.BytesIO(payload))
    except pa.ArrowInvalid as error:
        raise Unusable("part", f"not Parquet: {error}") from error
    columns = {}
    for name, field in schema.items():
        if name in landed.column_names:
            columns[name] = column_from_arrow(name, landed[name].combine_chunks(), field)
        else:
            nothing = np.zeros(landed.num_rows, bool)
            columns[name] = Column(empty(landed.num_rows, field), nothing)
    for name in (SEQUENCE, INDEX):
        if name not in landed.column_names:
            raise Unusable(name, "the part does not say where its records came from")
    place = [landed[name].to_numpy().astype(np.int64) for name in (SEQUENCE, INDEX)]
    return Table(columns, *place)


def concatenate(tables: list[Table]) -> Table:
    """One table, in landing order."""
    columns = {
        name: Column(
            np.concatenate([table.columns[name].values for table in tables]),
            np.concatenate([table.columns[name].valid for table in tables]),
        )
        for name in tables[0].columns
    }
    sequence = np.concatenate([table.sequence for table in tables])
    index = np.concatenate([table.index for table in tables])
    return Table(columns, sequence, index).take(np.lexsort((index, sequence)))


def write(table: Table, schema: Mapping[str, Field]) -> bytes:
    """Parquet: `_sequence`, `_index`, then the schema's columns; equal tables, equal bytes.

    A tensor is a fixed size list of its elements in C order.
    """
    arrays = [pa.array(table.sequence), pa.array(table.index)]
    arrays += [arrow_of(table.columns[name], field) for name, field in schema.items()]
    out = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(arrays, names=[SEQUENCE, INDEX, *schema]),
        out,
        compression="zstd",
        version="2.6",
    )
    return out.getvalue()


def arrow_of(column: Column, field: Field) -> Any:
    kind = ARROW[field.type]
    if not field.shape:
        return pa.array(column.values, kind, mask=~column.valid)
    flat = pa.array(column.values.reshape(-1), kind)
    mask = None if column.valid.all() else pa.array(~column.valid)
    return pa.FixedSizeListArray.from_arrays(flat, math.prod(field.shape), mask=mask)


def canonical_rows(table: Table, names: list[str]) -> Iterator[bytes]:
    """One byte string a record, equal exactly where the contents are equal.

    Column by column: one byte of validity, then little-endian values in C order; a string is its
    UTF-8 length in 4 bytes and its UTF-8.
    """
    pieces = [list(pieces_of(table.columns[name])) for name in names]
    for row in zip(*pieces, strict=True):
        yield b"".join(row)


def pieces_of(column: Column) -> Iterator[bytes]:
    rows = len(column.valid)
    if not rows:
        return
    flat = np.ascontiguousarray(column.values).reshape(rows, -1)
    flags = [bytes([valid]) for valid in column.valid.tolist()]
    if flat.dtype == np.object_:
        for flag, values in zip(flags, flat, strict=True):
            texts = [str(text).encode() for text in values]
            sized = [len(text).to_bytes(4, "little") + text for text in texts]
            yield flag + b"".join(sized)
        return
    matrix = flat.astype(flat.dtype.newbyteorder("<"), copy=False).view(np.uint8)
    for flag, numbers in zip(flags, matrix, strict=True):
        yield flag + numbers.tobytes()
