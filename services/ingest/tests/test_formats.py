"""What each format accepts, and that every refusal says which record and field."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from libs.contracts.pipeline import Field
from services.ingest import records, tables
from services.ingest.domain import RECORD_BYTES_MAX, Refused, explain
from services.ingest.layout import Accepted, Layout, assemble
from services.ingest.records import Unreadable, from_csv, from_json, from_ndjson
from services.ingest.tables import chunks, from_arrow, from_parquet, ipc_bytes, parquet_bytes

DIGITS = Layout({"pixels": Field("float64", [4]), "label": Field("int64", role="label")})
ROW = {"pixels": [0.0, 1.5, 2, 3], "label": 3}
FLAT = Layout(
    {
        "amount": Field("float32"),
        "count": Field("int32", role="label"),
        "note": Field("string", nullable=True),
        "flag": Field("bool", nullable=True),
    }
)


def payload(*rows: Any) -> bytes:
    return json.dumps(rows).encode()


def reasons(refused: list[Refused]) -> list[str]:
    return [one.reason for one in refused]


def landed(layout: Layout, accepted: Accepted) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("_")}
        for row in assemble(layout, [(1, accepted)]).to_pylist()
    ]


def table(**columns: Any) -> pa.Table:
    return pa.table(columns)


def test_an_object_and_an_array_of_json() -> None:
    one, _ = from_json(DIGITS, json.dumps(ROW).encode())
    two, refused = from_json(DIGITS, payload(ROW, ROW))
    assert (len(one.index), len(two.index), refused) == (1, 2, [])
    assert landed(DIGITS, one) == [ROW]


def test_good_records_of_a_message_land_beside_bad_ones() -> None:
    bad = [
        {"pixels": [1, 2, 3], "label": 1},
        {"label": 3},
        {**ROW, "label": "x"},
        {**ROW, "pixels": [1, 2, float("nan"), 4]},
        {**ROW, "extra": 1},
    ]
    accepted, refused = from_json(DIGITS, payload(ROW, *bad, ROW))
    assert accepted.index.tolist() == [0, 6]
    assert reasons(refused) == [
        "record 1: pixels: expected shape [4], got [3]",
        "record 2: pixels: missing",
        "record 3: label: expected int64, got string 'x'",
        "record 4: pixels: value 2: nan is not a finite number",
        "record 5: extra: unknown field: the schema has pixels, label",
    ]
    assert json.loads(refused[0].payload) == bad[0]


def test_what_is_not_json_is_refused_whole() -> None:
    with pytest.raises(Unreadable, match="not JSON: "):
        from_json(DIGITS, b"[{")
    assert reasons(from_json(DIGITS, b"hello")[1])[0].startswith("record 0: not JSON: ")
    assert reasons(from_json(DIGITS, b"{" * 100_000)[1])[0].startswith("record 0: not JSON: ")
    assert "utf-8" in reasons(from_json(FLAT, b'{"note": "\xff"}')[1])[0]


def test_a_record_of_5_mb_is_refused_with_the_numbers() -> None:
    big = json.dumps({**ROW, "note": "x" * 5_000_000}).encode()
    accepted, refused = from_json(DIGITS, b"[" + big + b"," + json.dumps(ROW).encode() + b"]")
    assert accepted.index.tolist() == [1]
    assert reasons(refused) == [
        f"record 0: {len(big)} bytes, the limit is {RECORD_BYTES_MAX} a record"
    ]


def test_ndjson_skips_empty_lines_and_counts_the_rest() -> None:
    accepted, refused = from_ndjson(DIGITS, b"\n".join([json.dumps(ROW).encode(), b"", b"nope"]))
    assert accepted.index.tolist() == [0]
    assert reasons(refused)[0].startswith("record 1: not JSON")


def test_csv_by_header() -> None:
    text = "count,amount,note,flag\n1,2.5,hi,true\n2,nan,,\nx,1,,\n3,1,,maybe\n4,1\n5,1,,\n"
    accepted, refused = from_csv(FLAT, text.encode())
    assert landed(FLAT, accepted) == [
        {"amount": 2.5, "count": 1, "note": "hi", "flag": True},
        {"amount": 1.0, "count": 5, "note": None, "flag": None},
    ]
    assert reasons(refused) == [
        "record 1: amount: nan is not a finite number",
        "record 2: count: expected int32, got string 'x'",
        "record 3: flag: expected bool, got string 'maybe'",
        "record 4: 2 cells, the header has 4",
    ]


def test_arrow_casts_what_is_safe() -> None:
    sent = table(
        label=pa.array([1, 2], pa.uint8()),
        pixels=pa.array([[1, 2, 3, 4]] * 2, pa.list_(pa.int16())),
    )
    accepted, refused = from_arrow(DIGITS, ipc_bytes(sent))
    assert refused == []
    assert landed(DIGITS, accepted)[1] == {"pixels": [1, 2, 3, 4], "label": 2}
    assert list(landed(DIGITS, accepted)[0]) == ["pixels", "label"]


def test_arrow_refuses_row_by_row() -> None:
    rows: list[Any] = [[1.0] * 4, [1.0] * 3, None, [float("nan")] * 4, [1.0] * 4]
    sent = table(pixels=pa.array(rows), label=pa.array([1, 2, 3, 4, None]))
    accepted, refused = from_arrow(DIGITS, ipc_bytes(sent))
    assert accepted.index.tolist() == [0]
    assert reasons(refused) == [
        "record 1: pixels: expected shape [4], got [3]",
        "record 2: pixels: expected shape [4], got null",
        "record 3: pixels: value 0: nan is not a finite number",
        "record 4: label: expected int64, got null",
    ]
    alone, again = from_arrow(DIGITS, refused[0].payload)
    assert (len(alone.index), reasons(again)) == (
        0,
        ["record 0: pixels: expected shape [4], got [3]"],
    )


def test_arrow_columns_that_no_row_can_satisfy_are_refused_once() -> None:
    (missing,) = from_arrow(DIGITS, ipc_bytes(table(label=[1, 2, 3])))[1]
    assert (missing.reason, missing.records) == ("record 0: pixels: missing", 3)
    sent = table(label=[1], pixels=[[1.0] * 4], extra=[1])
    (unknown,) = from_arrow(DIGITS, ipc_bytes(sent))[1]
    assert unknown.problem.field == "extra"


def test_arrow_that_is_broken_is_unreadable() -> None:
    good = ipc_bytes(table(label=[1], pixels=[[1.0] * 4]))
    for broken in (b"\xff\xff\xff\xff", good[: len(good) // 2], good[:40] + b"\x7f" * 200):
        with pytest.raises(Unreadable, match="Arrow"):
            from_arrow(DIGITS, broken)


def test_parquet_and_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table(amount=[1.0], count=[7], note=["a"]), sink)
    accepted, refused = from_parquet(FLAT, bytes(sink.getvalue()))
    assert refused == []
    assert landed(FLAT, accepted) == [{"amount": 1.0, "count": 7, "note": "a", "flag": None}]
    with pytest.raises(Unreadable, match="not a Parquet file"):
        from_parquet(FLAT, b"PAR1")
    monkeypatch.setattr(tables, "TABLE_BYTES_MAX", 10)
    with pytest.raises(Unreadable, match="more than 10 bytes"):
        from_parquet(FLAT, bytes(sink.getvalue()))


def test_images_nested_and_flat_are_the_same_columns() -> None:
    layout = Layout({"image": Field("uint8", [2, 2, 1], nullable=True), "label": Field("int32")})
    nested = [[[1], [2]], [[3], [4]]]
    from_list, _ = from_json(layout, payload({"image": nested, "label": 1}, {"label": 2}))
    sent = table(image=pa.array([nested]), label=[1])
    from_table, refused = from_arrow(layout, ipc_bytes(sent))
    assert refused == []
    assert landed(layout, from_list)[0] == landed(layout, from_table)[0]
    assert landed(layout, from_list)[0] == {"image": [1, 2, 3, 4], "label": 1}
    assert landed(layout, from_list)[1] == {"image": None, "label": 2}


def test_a_part_accounts_for_every_record_and_its_bytes_are_its_content() -> None:
    first, _ = from_json(DIGITS, payload(ROW, "bad", ROW))
    second, _ = from_arrow(DIGITS, ipc_bytes(table(label=[1], pixels=[[1.0] * 4])))
    third, _ = from_json(DIGITS, payload(ROW))
    part = assemble(DIGITS, [(5, first), (7, second), (9, third)])
    assert part["_sequence"].to_pylist() == [5, 5, 7, 9]
    assert part["_index"].to_pylist() == [0, 2, 0, 0]
    assert parquet_bytes(part) == parquet_bytes(part.take(pa.array([0, 1, 2, 3])))
    read = pq.read_table(pa.BufferReader(parquet_bytes(part)))
    assert read.to_pylist() == part.to_pylist()


def test_chunks_hold_every_row_and_stay_small() -> None:
    sent = table(x=np.arange(100_000))
    pieces = [*chunks(sent, 100_000)]
    assert sum(len(piece) for piece in pieces) == 100_000
    assert max(len(ipc_bytes(piece)) for piece in pieces) < 110_000


TEXTS = st.sampled_from(["", "a", "é", "\ud800", "nan"])
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.just([]), st.just({})
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*FLAT.schema, "other"]), SCALARS))
def test_the_fast_path_and_the_explanation_agree(record: dict[str, Any]) -> None:
    """What the compiled type accepts, the explanation finds nothing wrong with, and vice versa."""
    accepted, refused = from_json(FLAT, json.dumps([record]).encode())
    assert len(accepted.index) + len(refused) == 1
    assert bool(refused) == (explain(record, FLAT.schema) is not None)
    if refused:
        assert records.why(FLAT, refused[0].payload, ValueError("-")).reason != "-"
