"""A dataset's schema, compiled: the types that check a record and the columns it lands in."""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
from msgspec import Meta

from libs.contracts.pipeline import Field
from services.ingest.domain import FLOATS, INTEGERS

LAYOUTS_MAX = 256
ARROW = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
}
SEQUENCE = pa.field("_sequence", pa.int64(), nullable=False)
INDEX = pa.field("_index", pa.int32(), nullable=False)


class Layout:
    """`record` is the struct of one record: field `f<i>` is the schema's i-th column."""

    def __init__(self, schema: Mapping[str, Field]) -> None:
        self.schema = schema
        self.columns = pa.schema(
            [pa.field(name, arrow_of(field), field.nullable) for name, field in schema.items()]
        )
        self.record = record_of(schema)
        self.one: msgspec.json.Decoder[Any] = msgspec.json.Decoder(self.record)
        self.any: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
            self.record | list[self.record]  # type: ignore[name-defined]
        )

    def table(self, rows: Sequence[Any]) -> pa.Table:
        """Records -> columns."""
        columns = [
            column(field, [*map(operator.attrgetter(f"f{index}"), rows)])
            for index, field in enumerate(self.schema.values())
        ]
        return pa.Table.from_arrays(columns, schema=self.columns)


@lru_cache(LAYOUTS_MAX)
def layout_of(schema: bytes) -> Layout:
    """`schema`: the JSON of `dict[str, Field]`, as it lies in the database."""
    return Layout(msgspec.json.decode(schema, type=dict[str, Field]))


def arrow_of(field: Field) -> pa.DataType:
    """Tensors are row-major fixed-size lists of their values."""
    kind = ARROW[field.type]
    return pa.list_(kind, math.prod(field.shape)) if field.shape else kind


def record_of(schema: Mapping[str, Field]) -> type[msgspec.Struct]:
    fields: list[Any] = []
    for index, field in enumerate(schema.values()):
        kind = json_type(field)
        name = f"f{index}"
        fields.append((name, kind | None, None) if field.nullable else (name, kind))
    return msgspec.defstruct(
        "Record",
        fields,
        rename={f"f{index}": name for index, name in enumerate(schema)},
        forbid_unknown_fields=True,
        kw_only=True,
        gc=False,
    )


def json_type(field: Field) -> Any:
    """The msgspec type that accepts exactly what `domain.explain_value` accepts."""
    kind: Any = {"bool": bool, "string": str}.get(field.type)
    if field.type in INTEGERS:
        low, high = INTEGERS[field.type]
        kind = Annotated[int, Meta(ge=low, le=high)]
    if field.type in FLOATS:
        limit = FLOATS[field.type]
        kind = Annotated[float, Meta(ge=-limit, le=limit)]
    for size in reversed(field.shape):
        kind = Annotated[list[kind], Meta(min_length=size, max_length=size)]
    return kind


def column(field: Field, values: list[Any]) -> pa.Array:
    kind = arrow_of(field)
    if not field.shape:
        return pa.array(values, kind)
    if None in values:
        rows = [None if value is None else [*flatten([value], field)] for value in values]
        return pa.array(rows, kind)
    leaves = flatten(values, field)
    if field.type == "string":
        return pa.FixedSizeListArray.from_arrays(pa.array([*leaves], pa.string()), type=kind)
    count = len(values) * math.prod(field.shape)
    flat = np.fromiter(leaves, kind.value_type.to_pandas_dtype(), count)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)


def flatten(values: Iterable[Any], field: Field) -> Iterator[Any]:
    """The leaves of many nested lists, row-major."""
    leaves = iter(values)
    for _ in field.shape:
        leaves = itertools.chain.from_iterable(leaves)
    return leaves


class Accepted(msgspec.Struct, frozen=True):
    """Records of one message that fit: structs or a table, and their positions in it."""

    rows: Any
    """`list` of the layout's structs, or a `pa.Table` of its columns."""
    index: np.ndarray[Any, np.dtype[np.int32]]

    @classmethod
    def none(cls) -> "Accepted":
        return cls([], np.empty(0, np.int32))


def assemble(layout: Layout, messages: Sequence[tuple[int, Accepted]]) -> pa.Table:
    """(sequence, accepted) of every message, in order -> one table with `_sequence`, `_index`.

    Neighbours that came as structs become columns together: most of the cost of a small message
    is in making arrays.
    """
    tables: list[pa.Table] = []
    for is_table, group in itertools.groupby(
        (accepted.rows for _, accepted in messages), lambda rows: isinstance(rows, pa.Table)
    ):
        some = [*group]
        tables += some if is_table else [layout.table([*itertools.chain.from_iterable(some)])]
    counts = [len(accepted.index) for _, accepted in messages]
    sequences = np.repeat(np.array([sequence for sequence, _ in messages], np.int64), counts)
    index = np.concatenate([accepted.index for _, accepted in messages])
    complete = pa.concat_tables(tables).combine_chunks()
    complete = complete.append_column(SEQUENCE, pa.array(sequences))
    return complete.append_column(INDEX, pa.array(index, pa.int32()))
