from libs.contracts.pipeline import Field
from services.ingest import domain
from services.ingest.domain import Place, explain, fetch_limit, place_of, sort_messages

SCHEMA = {
    "pixels": Field("float32", [2, 2]),
    "label": Field("uint8", role="label"),
    "note": Field("string", nullable=True),
}
GOOD = {"pixels": [[1, 2.5], [3, 4]], "label": 3}


def reason(**changes: object) -> str:
    return str(explain({**GOOD, **changes}, SCHEMA))


def test_a_good_record_has_no_problem() -> None:
    assert explain(GOOD, SCHEMA) is None
    assert explain({**GOOD, "note": "x"}, SCHEMA) is None


def test_every_problem_names_its_field_and_what_it_found() -> None:
    assert str(explain(5, SCHEMA)) == "expected an object, got 5"
    assert str(explain({"label": 3}, SCHEMA)) == "pixels: missing"
    assert reason(color="red") == "color: unknown field: the schema has pixels, label, note"
    assert reason(label="x") == "label: expected uint8, got string 'x'"
    assert reason(label=None) == "label: expected uint8, got null"
    assert reason(label=True) == "label: expected uint8, got true"
    assert reason(label=1.5) == "label: expected uint8, got 1.5"
    assert reason(label=256) == "label: 256 is not in 0 to 255 (uint8)"
    assert reason(note=7) == "note: expected string, got 7"
    assert reason(note="\ud800").startswith("note: the string holds a lone surrogate")
    assert reason(note="é" * 600_000) == "note: 1200000 bytes, the limit is 1048576"


def test_shapes_are_told_as_numbers() -> None:
    assert reason(pixels=7) == "pixels: expected shape [2, 2], got 7"
    assert reason(pixels=[1, 2, 3, 4]) == "pixels: expected shape [2, 2], got [4]"
    assert reason(pixels=[]) == "pixels: expected shape [2, 2], got [0]"
    assert (
        reason(pixels=[[1, 2], [3]])
        == "pixels: expected shape [2, 2], got [2, 2] with unequal lengths"
    )
    assert explain({**GOOD, "pixels": [1, 2, 3, 4]}, SCHEMA, flat=True) is None


def test_floats_must_be_finite_and_fit() -> None:
    nan, infinity = float("nan"), float("inf")
    assert reason(pixels=[[1, 2], [nan, 4]]) == "pixels: value 2: nan is not a finite number"
    assert reason(pixels=[[infinity, 2], [1, 4]]) == "pixels: value 0: inf is not a finite number"
    assert reason(pixels=[[1e39, 2], [1, 4]]) == "pixels: value 0: 1e+39 does not fit float32"
    assert "an integer of 3322 bits does not fit" in reason(pixels=[[10**1000, 2], [1, 4]])


def test_a_message_is_fresh_a_duplicate_or_landed() -> None:
    ids = {(1, 9): "", (2, 9): "a", (3, 9): "a", (4, 9): "b", (5, 9): "", (6, 9): "c"}
    fresh, duplicates = sort_messages(ids, landed={(5, 9)}, ids_landed={"b"})
    assert fresh == [(1, 9), (2, 9), (6, 9)]
    assert duplicates == [(3, 9), (4, 9)]


def test_a_landed_message_keeps_its_id_from_being_a_duplicate_of_itself() -> None:
    assert sort_messages({(1, 9): "a"}, {(1, 9)}, {"a"}) == ([], [])


def test_a_subject_is_a_place_or_nothing() -> None:
    assert place_of("records.default.digits") == Place("default", "digits")
    assert place_of("records.default") is None
    assert place_of("records.a.b.c") is None


def test_a_batch_is_bounded_in_messages_and_bytes() -> None:
    assert fetch_limit(0, 0, 200) == 64
    assert fetch_limit(250, 0, 200) == 6
    assert fetch_limit(domain.BATCH_MESSAGES_MAX, 0, 200) == 0
    assert fetch_limit(3, 0, 8 << 20) == 8
    assert fetch_limit(3, domain.BATCH_BYTES_MAX - 1, 8 << 20) == 1
    assert fetch_limit(3, domain.BATCH_BYTES_MAX, 200) == 0
