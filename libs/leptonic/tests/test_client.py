"""Every verb against doors that speak the real contract."""

import json
from pathlib import Path
from typing import Any

import leptonic
import pytest
from google.protobuf.descriptor import FieldDescriptor
from leptonic import Client, Error, records, wire
from leptonic.client import model_reference
from leptonic.stackfile import locate

from libs.contracts.protos import (
    inference_pb2,
    ingest_pb2,
    preprocess_pb2,
    registry_pb2,
    scheduler_pb2,
    trainer_pb2,
)

DIGITS = "digits"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
MODULES = (
    ingest_pb2, preprocess_pb2, trainer_pb2, registry_pb2, inference_pb2, scheduler_pb2,
)  # fmt: skip


def test_numbers_are_numbers_and_the_users_own_json_is_left_alone(client: Client) -> None:
    found = client.dataset(DIGITS)
    assert (found["rows"], found["versions"][0]["number"]) == (1200, 1)
    assert found["schema"] == {"rows": {"type": "int64", "role": "12", "shape": [64]}}
    assert isinstance(found["schema"]["rows"]["shape"][0], int)
    assert found["drift"]["features"][0]["window_rows"] == 200
    assert client.models()[0]["aliases"] == {"champion": 2}


def test_every_64_bit_integer_and_every_struct_of_the_contracts_is_known() -> None:
    int64, structs = set(), set()
    for module in MODULES:
        for message in module.DESCRIPTOR.message_types_by_name.values():
            for field in message.fields:
                kind = field.message_type
                if kind and kind.GetOptions().map_entry:
                    field_type = kind.fields_by_name["value"].type
                    int64 |= {field.name} if field_type == FieldDescriptor.TYPE_INT64 else set()
                elif field.type == FieldDescriptor.TYPE_INT64:
                    int64.add(field.name)
                elif kind and kind.full_name in ("google.protobuf.Struct", "google.protobuf.Value"):
                    structs.add(field.name)
    assert (int64, structs) == (set(wire.INT64), set(wire.STRUCTS))


def test_apply_takes_a_file_or_text_and_names_the_field_that_is_wrong(
    client: Client, platform: Any, tmp_path: Path
) -> None:
    file = tmp_path / "digits.yaml"
    file.write_text("pipeline: digits\n")
    assert client.apply(file)["revision"] == 4
    assert client.apply("pipeline: digits\n")["pipeline"] == DIGITS
    assert [one.yaml for one in platform.asked] == ["pipeline: digits\n"] * 2
    with pytest.raises(Error, match="unknown field `recipy`") as caught:
        client.apply("train:\n  recipy: mlp\n")
    assert (caught.value.field, caught.value.code) == ("$.train", "INVALID_ARGUMENT")
    with pytest.raises(Error, match="No such file"):
        client.apply(tmp_path / "none.yaml")


def test_publish_sends_dicts_as_lines_and_counts(client: Client, platform: Any) -> None:
    receipt = client.publish(DIGITS, [{"x": 1}, {"x": 2}])
    assert receipt == {"accepted": 2, "refused": 0, "refusals": []}
    assert platform.bodies == [("application/x-ndjson", b'{"x": 1}\n{"x": 2}\n')]


def test_publish_splits_lines_and_counts_refusals_across_the_pieces(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: Any
) -> None:
    monkeypatch.setattr(records, "CHUNK_BYTES_MAX", 8)
    file = tmp_path / "records.jsonl"
    file.write_text("good\n\ngood\nbad\ngood\nbad\n")
    receipt = client.publish(DIGITS, file)
    assert (receipt["accepted"], receipt["refused"]) == (3, 2)
    assert [one["index"] for one in receipt["refusals"]] == [2, 4]
    assert len(platform.bodies) == 3


@pytest.mark.parametrize(("suffix", "kind"), sorted(records.FORMATS.items()))
def test_the_suffix_says_the_format(
    client: Client, platform: Any, tmp_path: Path, suffix: str, kind: str
) -> None:
    file = tmp_path / f"records{suffix}"
    file.write_bytes(b"1\n")
    client.publish(DIGITS, file)
    assert platform.bodies == [(kind, b"1\n")]


def test_what_is_no_file_of_records_is_refused(client: Client, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"'\.txt' is no format of records"):
        client.publish(DIGITS, tmp_path / "a.txt")
    with pytest.raises(Error, match="No such file"):
        client.publish(DIGITS, tmp_path / "a.csv")


@pytest.mark.parametrize(
    "inputs", [{"pixels": [[1, 2], [3, 4]]}, [{"pixels": [1, 2]}, {"pixels": [3, 4]}]]
)
def test_predict_by_rows_or_by_columns(client: Client, platform: Any, inputs: Any) -> None:
    answer = client.predict(DIGITS, inputs, id="r-9")
    tensor = {"name": "pixels", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}
    assert platform.asked == [{"inputs": [tensor], "id": "r-9"}]
    assert answer["outputs"] == {"label": [1, 1], "probabilities": [[0.25, 0.75]] * 2}
    assert (answer["id"], answer["model_version"]) == ("r-9", "2")


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        ({"pixel": [[1, 2]]}, "pixel: the model has no such input, only pixels"),
        ({}, "pixels: missing"),
        ({"pixels": [[1, 2, 3]]}, r"pixels: shape \[1, 3\] does not fit \[-1, 2\]"),
        ({"pixels": [[1, 2], [3]]}, "pixels: rows of different shapes"),
        ([{"pixels": [1, 2]}, {}], "pixels: missing in row 1"),
    ],
)
def test_predict_names_the_input_that_is_wrong(client: Client, inputs: Any, problem: str) -> None:
    with pytest.raises(Error, match=problem) as caught:
        client.predict(DIGITS, inputs)
    assert caught.value.field in ("pixel", "pixels")


def test_feedback_carries_the_label_as_it_is(client: Client, platform: Any) -> None:
    client.feedback(DIGITS, "r-1", 7)
    (asked,) = platform.asked
    assert (asked.project, asked.model, asked.request_id) == ("default", DIGITS, "r-1")
    assert asked.label.number_value == 7


def test_a_job_has_its_run_and_an_endpoint_its_counts(client: Client) -> None:
    assert [one["metrics"]["loss"] for one in client.job("train-a")["run"]["epochs"]] == [1.0, 0.5]
    (one,) = client.endpoints()
    assert [target["percent"] for target in one["targets"]] == [80, 20]
    assert one["serving"]["targets"][0]["requests"] == 50


@pytest.mark.parametrize(
    "reference", ["r-1", TRACE_ID, "models:/digits/2", "models:/digits@champion"]
)
def test_a_trace_is_found_by_request_by_id_and_by_model(client: Client, reference: str) -> None:
    assert client.trace(reference)["trace_id"] == TRACE_ID


@pytest.mark.parametrize("reference", ["models:/digits", "models:/@x", "models:/a/b", "models:/a@"])
def test_what_is_no_model_reference_is_refused(reference: str) -> None:
    with pytest.raises(Error, match="write models:/name/3"):
        model_reference(reference)


def test_what_a_server_does_not_know_is_its_own_words(client: Client) -> None:
    with pytest.raises(Error, match="no request 'r-2'") as caught:
        client.trace("r-2")
    assert caught.value.code == "NOT_FOUND"


def test_a_door_that_is_closed_says_where_and_what_to_do() -> None:
    with leptonic.connect(endpoints={"scheduler": "http://127.0.0.1:9"}) as client:
        with pytest.raises(Error, match=r"scheduler at http://127.0.0.1:9.*`leptonic status`"):
            client.nodes()
        with pytest.raises(Error, match="names no endpoint 'registry', only scheduler"):
            client.models()


def test_a_stack_is_found_by_folder_then_by_environment(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"no stack runs on .*: start one with `leptonic up"):
        locate(tmp_path, {})
    bare = tmp_path / "bare.json"
    bare.write_text('{"ingest": "http://a"}')
    assert locate(None, {"LEPTONIC_ENDPOINTS": str(bare)}).endpoint("ingest") == "http://a"
    stopped: dict[str, Any] = {"project": "p", "pid": None, "endpoints": {}, "processes": {}}
    (tmp_path / "stack.json").write_text(json.dumps(stopped))
    with pytest.raises(Error, match="no stack runs"):
        locate(tmp_path, {"LEPTONIC_ENDPOINTS": str(bare)})
    bare.write_text("[")
    with pytest.raises(Error, match="cannot be read as JSON"):
        locate(None, {"LEPTONIC_ENDPOINTS": str(bare)})
