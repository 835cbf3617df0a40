"""What goes over the wire comes back the same, and what does not fit is named."""

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.protos import model_config_pb2
from services.inference import tensors
from services.inference.tensors import CONTENTS, DTYPES, TOGETHER, Array, Given, Unfit

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=4)
TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
TYPED = sorted(CONTENTS)
RAW_ONLY = sorted(set(DTYPES) - set(CONTENTS))
ALL = [
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
]


@st.composite
def typed(draw: st.DrawFn, among: list[str] = ALL) -> tuple[str, Array]:
    datatype = draw(st.sampled_from(among))
    if datatype == "BYTES":
        return datatype, draw(arrays.arrays(object, SHAPES, elements=TEXT, fill=TEXT))
    return datatype, draw(arrays.arrays(DTYPES[datatype], SHAPES))


def test_every_datatype_of_the_protocol_is_known() -> None:
    types = model_config_pb2.DataType.DESCRIPTOR.values
    named = {one.name.removeprefix("TYPE_") for one in types}
    assert set(DTYPES) == named - {"INVALID", "STRING"} | {"BYTES"}
    assert RAW_ONLY == ["BF16", "FP16"]


def taken(datatype: str, shape: tuple[int, ...], **sent: Any) -> Array:
    """What a model without a batch dimension gets."""
    signature = Signature([Tensor("x", datatype, [-1] * len(shape))], [])
    return tensors.accept("m", signature, [Given("x", datatype, shape, **sent)], batched=False)["x"]


@given(typed())
def test_raw_bytes_come_back_the_same(one: tuple[str, Array]) -> None:
    datatype, array = one
    raw = tensors.to_raw(datatype, array)
    back = taken(datatype, array.shape, raw=raw)
    assert back.dtype == DTYPES[datatype]
    assert np.array_equal(back, array, equal_nan=datatype.startswith("FP"))


@given(typed(TYPED))
def test_values_come_back_the_same_flat_and_nested(one: tuple[str, Array]) -> None:
    datatype, array = one
    flat = tensors.to_values(datatype, array)
    for values in (flat, tuple(flat), array.tolist()):
        back = taken(datatype, array.shape, values=values)
        assert np.array_equal(back, array, equal_nan=datatype.startswith("FP"))


def test_of_many_values_each_is_checked() -> None:
    shape = (TOGETHER + 2,)
    with pytest.raises(Unfit, match="holds a float, expected INT32"):
        taken("INT32", shape, values=[*[1] * TOGETHER, 1, 1.5])
    with pytest.raises(Unfit, match="holds a value out of range for INT8"):
        taken("INT8", shape, values=[*[1] * TOGETHER, 1, 128])


@pytest.mark.parametrize("datatype", RAW_ONLY)
def test_half_floats_travel_as_raw_bytes_only(datatype: str) -> None:
    said = f"sending {datatype} data as values is not supported"
    with pytest.raises(Unfit, match=said):
        taken(datatype, (1,), values=[1.0])
    with pytest.raises(Unfit, match=said):
        tensors.to_values(datatype, np.zeros(1, DTYPES[datatype]))


@given(st.sampled_from(ALL), st.binary(max_size=64), SHAPES)
def test_any_bytes_are_a_tensor_of_that_shape_or_unfit(
    datatype: str, raw: bytes, shape: tuple[int, ...]
) -> None:
    with contextlib.suppress(Unfit):
        assert taken(datatype, shape, raw=raw).shape == shape


def test_strings_are_text_or_any_bytes() -> None:
    signature = Signature([Tensor("x", "BYTES", [-1])], [])
    asked = Given("x", "BYTES", [2], raw=tensors.to_raw("BYTES", np.array([b"\xff", "é"], object)))
    free = tensors.accept("m", signature, [asked], text=False)["x"]
    assert free.tolist() == [b"\xff", "é".encode()]
    with pytest.raises(Unfit, match="element 0 is not UTF-8"):
        tensors.accept("m", signature, [asked])


def test_a_model_without_rows_takes_its_own_shapes() -> None:
    signature = Signature([Tensor("x", "FP32", [2, -1]), Tensor("y", "INT32", [])], [])
    x = Given("x", "FP32", [2, 1], raw=bytes(8))
    y = Given("y", "INT32", [], values=[3])
    arrays = tensors.accept("m", signature, [x, y], batched=False)
    assert {name: array.shape for name, array in arrays.items()} == {"x": (2, 1), "y": ()}
    with pytest.raises(Unfit, match=r"Expected \[2,-1\], got \[1,1\]"):
        tensors.accept("m", signature, [x._replace(shape=[1, 1]), y], batched=False)


DIGITS = Signature([Tensor("pixels", "FP32", [-1, 64]), Tensor("age", "INT32", [-1])], [])
PIXELS = Given("pixels", "FP32", [1, 64], raw=bytes(256))
AGE = Given("age", "INT32", [1], values=[3])


@pytest.mark.parametrize(
    ("given_tensors", "said"),
    [
        (
            [PIXELS._replace(name="pixel"), AGE],
            "unexpected inference input 'pixel' for model 'digits': it takes 'pixels', 'age'",
        ),
        (
            [PIXELS],
            "expected 2 inputs but got 1 inputs for model 'digits'. Got inputs ['pixels'], "
            "but missing required inputs ['age']. Please provide all required inputs.",
        ),
        ([PIXELS, AGE, AGE], "input 'age' is given twice"),
        (
            [PIXELS._replace(shape=[1, 63]), AGE],
            "unexpected shape for input 'pixels' for model 'digits'. Expected [-1,64], got [1,63]",
        ),
        ([PIXELS._replace(shape=[0, 64]), AGE], "Expected [-1,64], got [0,64]"),
        ([PIXELS._replace(shape=[64]), AGE], "Expected [-1,64], got [64]"),
        (
            [PIXELS._replace(datatype="FP64"), AGE],
            "inference input 'pixels' data-type is 'FP64', but model 'digits' expects 'FP32'",
        ),
        ([PIXELS._replace(datatype="FP16"), AGE], "data-type is 'FP16'"),
        (
            [PIXELS._replace(raw=bytes(252)), AGE],
            "'pixels' for model 'digits'. Expected 256, got 252",
        ),
        ([PIXELS._replace(raw=b""), AGE], "input byte size mismatch for input 'pixels'"),
        (
            [PIXELS, AGE._replace(shape=[2], values=[1, 2])],
            "input 'age' batch size does not match other inputs for 'digits': 2 against 1",
        ),
        (
            [PIXELS, AGE._replace(values=[1, 2])],
            "'age' for model 'digits' got 2 values, expected 1",
        ),
        ([PIXELS, AGE._replace(values=[1.5])], "input 'age' holds a float, expected INT32 values"),
        ([PIXELS, AGE._replace(values=[True])], "input 'age' holds a bool"),
        ([PIXELS, AGE._replace(values=[None])], "input 'age' holds a NoneType"),
        (
            [PIXELS, AGE._replace(values=[2**31])],
            "input 'age' holds a value out of range for INT32",
        ),
        ([PIXELS, AGE._replace(values=None)], "'age' for model 'digits' got 0 values, expected 1"),
    ],
)
def test_what_does_not_fit_is_named_with_its_numbers(given_tensors: list[Given], said: str) -> None:
    with pytest.raises(Unfit) as error:
        tensors.accept("digits", DIGITS, given_tensors)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\x05\x00\x00\x00ab", "expecting string of length 5 but only 2 bytes available"),
        (b"\x01\x00\x00\x00a\x01", "length indicator for inference input 'x' for model 'm'"),
        (b"\x00\x00\x00\x00" * 3, "expected 2 string elements for inference input 'x' for"),
        (b"\x00\x00\x00\x00" * 3, "'m', got 2 and 4 bytes more"),
        (b"", "expected 2 string elements for inference input 'x' for model 'm', got 0"),
        (b"\x01\x00\x00\x00\xff\x00\x00\x00\x00", "element 0 is not UTF-8"),
    ],
)
def test_short_strings_are_named(raw: bytes, said: str) -> None:
    with pytest.raises(Unfit) as error:
        taken("BYTES", (2,), raw=raw)
    assert said in str(error.value)


def test_a_deep_nesting_is_no_problem() -> None:
    nested: list[Any] = [1]
    for _ in range(50_000):
        nested = [nested]
    assert tensors.flattened(nested) == [1]
    while nested:
        nested = nested.pop() if isinstance(nested[-1], list) else []
