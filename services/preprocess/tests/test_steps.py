"""Row steps keep what they say, and the split depends on content and seed alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.contracts.pipeline import Field
from services.preprocess.steps import Steps, clean, first_of_each, split
from services.preprocess.table import DTYPES, Column, Table, Unusable


def table_of(**columns: list[Any]) -> Table:
    """None is null."""
    found = {}
    for name, values in columns.items():
        valid = np.array([value is not None for value in values], bool)
        some = next((value for value in values if value is not None), 0)
        kind = DTYPES["string"] if isinstance(some, str) else np.asarray(some).dtype
        filled = [type(some)() if value is None else value for value in values]
        found[name] = Column(np.array(filled, kind), valid)
    rows = len(next(iter(found.values())).valid)
    return Table(found, np.arange(rows), np.zeros(rows, np.int64))


SCHEMA = {"x": Field("float64", nullable=True), "y": Field("int64", role="label")}


def kept(table: Table, schema: dict[str, Field], *steps: dict[str, dict[str, Any]]) -> list[int]:
    return [int(one) for one in clean(table, schema, list(steps)).table.sequence]


def test_drop_nulls_looks_at_its_columns() -> None:
    schema = SCHEMA | {"note": Field("string", role="ignore", nullable=True)}
    table = table_of(x=[1.0, None, 3.0], y=[1, 2, 3], note=[None, "b", "c"])
    assert kept(table, schema, {"drop_nulls": {"columns": ["x"]}}) == [0, 2]
    assert kept(table, schema, {"drop_nulls": {}}) == [2]


def test_a_null_that_nobody_drops_is_refused_by_name() -> None:
    with pytest.raises(Unusable, match=r"schema\.x: 1 of 2 records are null here"):
        kept(table_of(x=[1.0, None], y=[1, 2]), SCHEMA)


def test_drop_duplicates_keeps_the_first_that_landed() -> None:
    table = table_of(x=[1.0, 2.0, 1.0, 1.0], y=[1, 2, 1, 3])
    assert kept(table, SCHEMA, {"drop_duplicates": {}}) == [0, 1, 3]
    assert kept(table, SCHEMA, {"drop_duplicates": {"columns": ["x"]}}) == [0, 1]


def test_a_cast_label_is_cast_and_a_cast_feature_stays_as_a_request_brings_it() -> None:
    schema = {"x": Field("string"), "y": Field("string", role="label")}
    table = table_of(x=["1.50", "2", "oops"], y=["3", "4", "5"])
    steps: Steps = [
        {"cast": {"columns": ["x"], "to": "float32"}},
        {"cast": {"columns": ["y"], "to": "int64"}},
        {"drop_nulls": {}},
    ]
    cleaned = clean(table, schema, steps)
    assert cleaned.table.columns["x"].values.tolist() == ["1.50", "2"]
    assert cleaned.content.columns["x"].values.tolist() == [1.5, 2.0]
    assert cleaned.table.columns["y"].values.tolist() == [3, 4]
    assert (cleaned.schema["x"].type, cleaned.schema["y"].type) == ("string", "int64")


@pytest.mark.parametrize(
    ("to", "expected"),
    [("int32", [-1, 2, None]), ("uint8", [None, 2, None]), ("bool", [True, True, True])],
)
def test_what_cannot_be_cast_becomes_null(to: str, expected: list[Any]) -> None:
    cleaned = clean(
        table_of(x=[0, 0, 0], y=[-1.5, 2.9, 1e30]),
        {"x": Field("int64"), "y": Field("float64", role="ignore")},
        [{"cast": {"columns": ["y"], "to": to}}],
    )
    column = cleaned.table.columns["y"]
    values = [v if ok else None for v, ok in zip(column.values.tolist(), column.valid, strict=True)]
    assert values == expected


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({"cast": {"columns": ["x"], "to": "int99"}}, r"\$\.preprocess\[0\]\.cast\.to: one of"),
        ({"cast": {"columns": ["x"]}}, r"cast\.to: one of"),
        ({"cast": {"columns": ["x"], "to": "string"}}, "which has no one text"),
        ({"split": {"test": 1.5}}, r"split\.test: 0 or more and less than 1"),
        ({"split": {"test": "half"}}, r"split\.test: a number, got 'half'"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_field(
    step: dict[str, dict[str, Any]], problem: str
) -> None:
    with pytest.raises(Unusable, match=problem):
        split(clean(table_of(x=[1.0], y=[1]), SCHEMA, [step]).content, [step])


RECORDS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3)), min_size=1, max_size=40)


def content_of(records: list[tuple[int, int]]) -> Table:
    return table_of(x=[float(x) for x, _ in records], y=[y for _, y in records])


@given(RECORDS, RECORDS, st.integers(0, 5))
def test_a_record_lies_on_the_same_side_in_every_version(
    first: list[tuple[int, int]], more: list[tuple[int, int]], seed: int
) -> None:
    steps = [{"split": {"test": 0.5, "seed": seed}}]
    before = dict(zip(first, split(content_of(first), steps), strict=True))
    after = split(content_of(more + first), steps)
    sides: dict[tuple[int, int], set[bool]] = {}
    for record, side in zip(more + first, after, strict=True):
        sides.setdefault(record, set()).add(bool(side))
    assert all(len(both) == 1 for both in sides.values())
    assert all(sides[record] == {bool(side)} for record, side in before.items())


def test_the_split_has_its_fraction_and_its_seed() -> None:
    records = content_of([(x, 0) for x in range(4000)])
    sides = split(records, [])
    assert abs(sides.mean() - 0.2) < 0.03  # 4.7 standard deviations
    other = split(records, [{"split": {"seed": 1}}])
    assert 0 < np.mean(sides != other) < 1
    assert not split(records, [{"split": {"test": 0}}]).any()


def test_the_split_is_the_same_on_every_machine() -> None:
    """Golden: a change here moves records across the split of datasets that exist."""
    sides = split(content_of([(x, x % 3) for x in range(30)]), [{"split": {"test": 0.3}}])
    assert np.flatnonzero(sides).tolist() == GOLDEN


GOLDEN = [0, 1, 7, 8, 12, 25, 27]


@given(RECORDS)
def test_as_many_are_kept_as_are_different(records: list[tuple[int, int]]) -> None:
    keep = first_of_each(content_of(records), ["x", "y"])
    assert keep.sum() == len(set(records))
