"""An inference request's body, JSON and binary: what is right is read exactly, all else refused."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.contracts.artifacts import Tensor
from libs.doors import Refused
from services.inference import tensors
from services.inference.bodies import (
    BINARY_ONLY,
    body_of,
    given_of,
    parameters_of,
    split,
    wishes_of,
)
from services.inference.calls import Answer
from services.inference.protocol import Wish
from services.inference.sharedmemory import SharedMemory
from services.inference.tensors import DTYPES, Given

NOWHERE = SharedMemory()


def asked(*inputs: dict[str, Any], **fields: Any) -> dict[str, Any]:
    known = {"name": "x", "datatype": "FP32", "shape": [1]}
    return {"inputs": [{**known, **one} for one in inputs], **fields}


def read(body: bytes, header_length: str | None = None) -> list[Given]:
    request, values, binary = split(body, header_length)
    wishes_of(request, NOWHERE)
    parameters_of(request)
    return given_of(request, values, binary, NOWHERE)


def test_binary_tensors_follow_in_the_order_of_the_inputs() -> None:
    head = json.dumps(
        asked(
            {"name": "a", "parameters": {"binary_data_size": 3}},
            {"name": "b", "data": [1.5]},
            {"name": "c", "parameters": {"binary_data_size": 2}},
        )
    ).encode()
    a, b, c = read(head + b"aaacc", str(len(head)))
    assert (a.raw, b.values, c.raw) == (b"aaa", (1.5,), b"cc")


WRONG: list[tuple[Any, bytes, str]] = [
    ({}, b"", "missing required field `inputs`"),
    (asked({"data": [1], "parameters": {"binary_data_size": 4}}), b"1234", "needs its values once"),
    (asked({}), b"", "needs its values once"),
    (asked({"parameters": {"binary_data_size": 5}}), b"1234", "binary_data_size 5, 4 bytes are"),
    (asked({"parameters": {"binary_data_size": -1}}), b"1234", "binary_data_size -1, 4 bytes"),
    (asked({"parameters": {"binary_data_size": True}}), b"1234", "binary_data_size True"),
    (asked({"parameters": {"binary_data_size": 3}}), b"1234", "1 bytes after the last binary"),
    (asked({"parameters": {"nested": {}}, "data": [1]}), b"", "$.inputs[0].parameters"),
    (asked({"data": [1], "shape": [1.5]}), b"", "Expected `int`, got `float`"),
    (asked({"data": 1}), b"", "Expected `array | null`, got `int`"),
    (asked(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]), b"", "is true or false"),
    (asked(outputs=[{"name": "y", "parameters": {"classification": 0}}]), b"", "at least 1"),
    (asked(parameters={"binary_data_output": "yes"}, outputs=[{"name": "y"}]), b"", "true or fal"),
    (asked(parameters={"triton_mine": 1}), b"", "reserved for Triton usage"),
    (
        asked({"data": [1], "parameters": {"shared_memory_region": "r"}}),
        b"",
        "'shared_memory_byte_size' must be specified",
    ),
]


def test_what_is_wrong_is_named() -> None:
    for document, binary, said in WRONG:
        head = json.dumps(document).encode()
        with pytest.raises(Refused) as error:
            read(head + binary, str(len(head)))
        assert said in str(error.value)
        assert error.value.http_status == 400


def test_half_precision_has_no_json() -> None:
    for datatype in BINARY_ONLY:
        body = json.dumps(asked({"datatype": datatype, "data": [1]})).encode()
        with pytest.raises(Refused, match=f"receiving {datatype} data via JSON is not supported"):
            read(body)


@pytest.mark.parametrize("length", ["", "-1", "1e1", "²", "9" * 5000, "3.0", " 2"])
def test_a_header_that_is_no_length(length: str) -> None:
    with pytest.raises(Refused, match="Inference-Header-Content-Length"):
        read(json.dumps(asked()).encode(), length)


def status_of(body: bytes, length: str | None) -> int:
    try:
        read(body, length)
    except Refused as error:
        return error.http_status
    return 200


@given(st.binary(max_size=300), st.none() | st.text(max_size=4))
def test_any_bytes_are_a_request_or_a_refusal(body: bytes, length: str | None) -> None:
    assert status_of(body, length) in (200, 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
PARAMETERS = st.dictionaries(
    st.sampled_from(
        ["binary_data_size", "binary_data", "classification", "shared_memory_region", "timeout"]
    ),
    JSON,
)
TENSORS = st.fixed_dictionaries(
    {"name": JSON, "datatype": st.sampled_from(sorted(DTYPES)) | JSON, "shape": JSON},
    optional={"data": JSON, "parameters": PARAMETERS},
)


@given(
    st.fixed_dictionaries(
        {"inputs": st.lists(TENSORS, max_size=3)},
        optional={"outputs": st.lists(TENSORS, max_size=2), "parameters": PARAMETERS, "id": JSON},
    ),
    st.binary(max_size=20),
)
def test_any_document_is_a_request_or_a_refusal(document: dict[str, Any], binary: bytes) -> None:
    head = json.dumps(document).encode()
    assert status_of(head + binary, str(len(head))) in (200, 400, 404)


def answer(datatype: str, array: tensors.Array) -> Answer:
    return Answer("m", "1", "id", [(Tensor("y", datatype, [-1]), array)], {}, "")


@pytest.mark.parametrize("datatype", sorted(set(DTYPES) - {"BYTES", "BOOL"}))
def test_an_answer_is_the_same_in_both_forms(datatype: str) -> None:
    array = np.array([0, 1, 100]).astype(DTYPES[datatype])
    binary = body_of(answer(datatype, array), {}, every_binary=True)
    head = json.loads(binary.payload[: binary.header_length])
    (output,) = head["outputs"]
    raw = binary.payload[binary.header_length :]
    assert output["parameters"] == {"binary_data_size": len(raw)}
    assert np.frombuffer(raw, DTYPES[datatype]).tolist() == array.tolist()
    if datatype in BINARY_ONLY:
        with pytest.raises(Refused, match=f"sending {datatype} data via JSON is not supported"):
            body_of(answer(datatype, array), {}, every_binary=False)
        return
    text = body_of(answer(datatype, array), {}, every_binary=False)
    (output,) = json.loads(text.payload)["outputs"]
    assert (text.header_length, output["data"]) == (0, array.tolist())


def test_what_json_cannot_say_is_null() -> None:
    array = np.array([math.nan, math.inf, 1.0], np.float32)
    text = body_of(answer("FP32", array), {}, every_binary=False)
    assert json.loads(text.payload)["outputs"][0]["data"] == [None, None, 1.0]


def test_one_output_may_be_binary_and_another_its_classes() -> None:
    scores = np.array([[0.25, 0.75]], np.float32)
    outputs = [(Tensor(name, "FP32", [-1, 2]), scores) for name in ("a", "b")]
    wishes = {"a": Wish(binary=True), "b": Wish(classes=1)}
    made = Answer("m", "1", "id", outputs, {"b": ["cat", "dog"]}, "00-a")
    found = body_of(made, wishes, every_binary=False)
    head = json.loads(found.payload[: found.header_length])
    assert head["parameters"] == {"traceparent": "00-a"}
    assert found.payload[found.header_length :] == scores.tobytes()
    assert head["outputs"][1] == {
        "name": "b",
        "datatype": "BYTES",
        "shape": [1, 1],
        "data": ["0.750000:1:dog"],
    }
