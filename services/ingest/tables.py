"""Arrow and Parquet <-> columns of a layout, each bad row with its reason."""

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from libs.contracts.pipeline import Field
from services.ingest.domain import FLOATS, INTEGERS, RECORD_BYTES_MAX, Problem, Refused, explain
from services.ingest.layout import Accepted, Layout, arrow_of
from services.ingest.records import Decoded, Unreadable

TABLE_BYTES_MAX = 512 << 20
"""Of a message or body once it is unpacked."""
ARROW_CONTINUATION = b"\xff\xff\xff\xff"
UNREADABLE = (pa.ArrowException, OSError, MemoryError)


class Unfit(ValueError):
    """Something in the column does not fit; which row is found by looking at each."""


def from_arrow(layout: Layout, payload: bytes) -> Decoded:
    """An Arrow IPC stream. Raises `Unreadable`."""
    try:
        with pa.ipc.open_stream(payload) as reader:
            table = within_limit(reader)
        table.validate(full=True)
    except UNREADABLE as error:
        raise Unreadable(f"not an Arrow IPC stream: {error}") from error
    return conform(layout, table)


def from_parquet(layout: Layout, payload: bytes) -> Decoded:
    """A Parquet file. Raises `Unreadable`."""
    try:
        with pq.ParquetFile(pa.BufferReader(payload)) as file:
            table = within_limit(file)
        table.validate(full=True)
    except UNREADABLE as error:
        raise Unreadable(f"not a Parquet file: {error}") from error
    return conform(layout, table)


def within_limit(source: pa.RecordBatchReader | pq.ParquetFile) -> pa.Table:
    """Reads batch by batch, so that a small payload cannot unpack without end."""
    batches = []
    size_bytes = 0
    is_file = isinstance(source, pq.ParquetFile)
    for batch in source.iter_batches() if is_file else source:
        size_bytes += batch.nbytes
        if size_bytes > TABLE_BYTES_MAX:
            raise Unreadable(f"unpacks to more than {TABLE_BYTES_MAX} bytes")
        batches.append(batch)
    return pa.Table.from_batches(batches, source.schema_arrow if is_file else source.schema)


def conform(layout: Layout, table: pa.Table) -> Decoded:
    """Casts what is safe to cast; looks at each row only when some row does not fit."""
    problem = explain_columns(layout, table)
    if problem:
        return Accepted.none(), [Refused(0, problem, ipc_bytes(table), max(1, len(table)))]
    try:
        return Accepted(cast(layout, table), np.arange(len(table), dtype=np.int32)), []
    except (Unfit, pa.ArrowException):
        return row_by_row(layout, table)


def explain_columns(layout: Layout, table: pa.Table) -> Problem | None:
    """What holds for every row alike."""
    names = table.column_names
    for name, field in layout.schema.items():
        if name not in names and not field.nullable:
            return Problem(name, "missing")
        if names.count(name) > 1:
            return Problem(name, f"{names.count(name)} columns have this name")
    for name in names:
        if name not in layout.schema:
            return Problem(name, f"unknown field: the schema has {', '.join(layout.schema)}")
    return None


def row_by_row(layout: Layout, table: pa.Table) -> Decoded:
    index, refused = [], []
    for position, record in enumerate(table.to_pylist()):
        problem = explain(record, layout.schema, flat=True)
        if problem:
            refused.append(Refused(position, problem, ipc_bytes(table.slice(position, 1))))
        else:
            index.append(position)
    kept = table.take(pa.array(index, pa.int64()))
    return Accepted(cast(layout, kept, by_value=True), np.array(index, np.int32)), refused


def cast(layout: Layout, table: pa.Table, by_value: bool = False) -> pa.Table:
    """Raises `Unfit` or an `ArrowException` when a value does not fit.

    `by_value`: the values are known to fit, whatever type they came in.
    """
    columns = []
    for name, field in layout.schema.items():
        if name not in table.column_names:
            columns.append(pa.nulls(len(table), arrow_of(field)))
        elif by_value:
            columns.append(from_values(field, table.column(name).to_pylist()))
        else:
            columns.append(cast_column(field, table.column(name).combine_chunks()))
    return pa.Table.from_arrays(columns, schema=layout.columns)


def from_values(field: Field, values: list[object]) -> pa.Array:
    def flat(value: object) -> object:
        while isinstance(value, list) and value and isinstance(value[0], list):
            value = [leaf for item in value for leaf in item]
        return value

    return pa.array([flat(value) for value in values], arrow_of(field))


def cast_column(field: Field, array: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count and (field.shape or not field.nullable):
        raise Unfit
    if field.shape:
        values = leaves(array, field.shape)
        if values.null_count:
            raise Unfit
        return pa.FixedSizeListArray.from_arrays(cast_values(field, values), type=arrow_of(field))
    return cast_values(field, array)


def leaves(array: pa.Array, shape: list[int]) -> pa.Array:
    """The values of a list column, row-major: nested as the shape is, or already flat."""
    depth = 0
    kind = array.type
    while is_list(kind):
        kind = kind.value_type
        depth += 1
    for size in shape if depth == len(shape) else [math.prod(shape)]:
        if not is_list(array.type) or array.null_count:
            raise Unfit
        if len(array) and pc.min_max(pc.list_value_length(array)).as_py() != {
            "min": size,
            "max": size,
        }:
            raise Unfit
        array = array.flatten()
    return array


def is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def cast_values(field: Field, values: pa.Array) -> pa.Array:
    kind = values.type
    target = arrow_of(Field(field.type))
    if field.type in INTEGERS:
        fits = pa.types.is_integer(kind)
    elif field.type in FLOATS:
        fits = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    elif field.type == "bool":
        fits = pa.types.is_boolean(kind)
    else:
        fits = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not fits:
        raise Unfit
    cast = values.cast(target, safe=field.type not in FLOATS)
    if field.type in FLOATS and pc.all(pc.is_finite(cast)).as_py() is False:
        raise Unfit
    if field.type == "string" and (pc.max(pc.binary_length(cast)).as_py() or 0) > RECORD_BYTES_MAX:
        raise Unfit
    return cast


def ipc_bytes(table: pa.Table) -> bytes:
    """Table -> Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def chunks(table: pa.Table, chunk_bytes: int) -> Iterator[pa.Table]:
    """Slices of about so many bytes, one row at least."""
    rows = max(1, chunk_bytes * len(table) // max(1, table.nbytes))
    for start in range(0, len(table), rows):
        yield table.slice(start, rows)


def parquet_bytes(table: pa.Table) -> bytes:
    """Table -> Parquet, the same bytes for the same table.

    Floats are split by byte before zstd: 10,000 digits of 64 float64 take 2.5 us and 42 bytes a
    record that way, 4.6 us and 57 bytes without.
    """
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=1,
        use_dictionary=False,
        use_byte_stream_split=float_paths(table.schema),
        write_statistics=False,
    )
    return bytes(sink.getvalue())


def float_paths(schema: pa.Schema) -> list[str]:
    """Parquet's paths of the floating point columns."""
    paths = [
        (f"{field.name}.list.element", field.type.value_type)
        if is_list(field.type)
        else (field.name, field.type)
        for field in schema
    ]
    return [path for path, kind in paths if pa.types.is_floating(kind)]


def is_arrow(payload: bytes) -> bool:
    return payload[:4] == ARROW_CONTINUATION
