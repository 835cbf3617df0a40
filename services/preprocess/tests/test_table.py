"""Parquet and canonical rows say the same thing about the same records."""

import math
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.contracts.pipeline import Field
from services.preprocess.table import (
    Column,
    Table,
    Unusable,
    canonical_rows,
    column_from_arrow,
    column_from_values,
    concatenate,
    read,
    write,
)

FIELDS = {
    "flag": Field("bool"),
    "age": Field("int32", nullable=True),
    "price": Field("float64", nullable=True),
    "city": Field("string", nullable=True),
    "image": Field("uint8", [2, 2, 1], nullable=True),
}
VALUES = {
    "flag": st.booleans(),
    "age": st.integers(-(2**31), 2**31 - 1),
    "price": st.floats(allow_nan=False, allow_infinity=False),
    "city": st.text(max_size=4),
    "image": st.lists(st.integers(0, 255), min_size=4, max_size=4),
}


def column_of(name: str, values: list[object]) -> Column:
    field = FIELDS[name]
    kind = pa.list_(pa.uint8(), 4) if field.shape else None
    types = {"flag": pa.bool_(), "age": pa.int32(), "price": pa.float64(), "city": pa.string()}
    return column_from_arrow(name, pa.array(values, kind or types[name]), field)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    rows = draw(st.integers(0, 5))
    columns = {}
    for name, field in FIELDS.items():
        one = st.none() | VALUES[name] if field.nullable else VALUES[name]
        columns[name] = column_of(name, draw(st.lists(one, min_size=rows, max_size=rows)))
    return Table(columns, np.arange(rows), np.zeros(rows, np.int64))


@settings(max_examples=50, deadline=None)
@given(tables())
def test_what_is_written_is_read_back(table: Table) -> None:
    payload = write(table, FIELDS)
    again = read(payload, FIELDS)
    assert [*canonical_rows(again, [*FIELDS])] == [*canonical_rows(table, [*FIELDS])]
    assert write(again, FIELDS) == payload


@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=3)), max_size=6))
def test_rows_are_equal_exactly_where_their_contents_are(pairs: list[tuple[str, str]]) -> None:
    valid = np.ones(len(pairs), bool)
    columns = {
        str(i): Column(np.array([pair[i] for pair in pairs], np.object_), valid) for i in (0, 1)
    }
    place = np.arange(len(pairs))
    rows = [*canonical_rows(Table(columns, place, place), ["0", "1"])]
    for a, one in zip(pairs, rows, strict=True):
        for b, other in zip(pairs, rows, strict=True):
            assert (a == b) == (one == other)


def test_not_a_number_is_a_null_and_minus_zero_is_zero() -> None:
    column = column_from_values(np.array([1.0, math.nan, math.inf, -0.0]), Field("float64"))
    assert column.valid.tolist() == [True, False, False, True]
    assert not np.signbit(column.values).any()


def test_nested_lists_are_the_same_tensor_as_flat_ones() -> None:
    field = Field("uint8", [2, 2, 1])
    nested = pa.array([[[[1], [2]], [[3], [4]]], None])
    column = column_from_arrow("image", nested, field)
    assert column.values[0].ravel().tolist() == [1, 2, 3, 4]
    assert column.valid.tolist() == [True, False]


def test_tables_are_joined_in_landing_order() -> None:
    def table(place: list[tuple[int, int]]) -> Table:
        sequence, index = np.array(place).T
        values = sequence * 10 + index
        return Table({"x": Column(values, np.ones(len(place), bool))}, sequence, index)

    joined = concatenate([table([(3, 0), (3, 1)]), table([(1, 1), (1, 0)])])
    assert joined.columns["x"].values.tolist() == [10, 11, 30, 31]


@pytest.mark.parametrize(
    ("data", "field", "problem"),
    [
        (pa.array(["a"]), Field("int64"), "x: landed as string, not int64"),
        (pa.array([[1, 2]]), Field("int64", [3]), "x: 2 values in 1 records of [3]"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_by_column(
    data: pa.Array, field: Field, problem: str
) -> None:
    with pytest.raises(Unusable, match=re.escape(problem)):
        column_from_arrow("x", data, field)


def test_rubbish_is_not_a_part() -> None:
    with pytest.raises(Unusable, match="not Parquet"):
        read(b"rubbish", FIELDS)
