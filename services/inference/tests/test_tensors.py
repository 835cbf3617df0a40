"""What goes over the wire comes back the same, and what does not fit is named."""

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from libs.contracts.artifacts import Signature, Tensor
from services.inference import tensors
from services.inference.tensors import DTYPES, Array, Given, Unfit

SHAPES = arrays.array_shapes(min_dims=1, max_dims=3, max_side=4)
TEXT = st.text(st.characters(codec="utf-8"), max_size=6)
NUMERIC = sorted(set(DTYPES) - {"BYTES"})


@st.composite
def typed(draw: st.DrawFn) -> tuple[str, Array]:
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    if datatype == "BYTES":
        return datatype, draw(arrays.arrays(object, SHAPES, elements=TEXT, fill=TEXT))
    return datatype, draw(arrays.arrays(DTYPES[datatype], SHAPES))


@given(typed())
def test_raw_bytes_come_back_the_same(one: tuple[str, Array]) -> None:
    datatype, array = one
    raw = tensors.to_raw(datatype, array)
    back = tensors.from_raw("x", datatype, array.shape, raw)
    assert back.dtype == DTYPES[datatype]
    assert np.array_equal(back, array, equal_nan=datatype.startswith("FP"))


@given(typed())
def test_values_come_back_the_same_flat_and_nested(one: tuple[str, Array]) -> None:
    datatype, array = one
    flat = tensors.to_values(datatype, array)
    for values in (flat, array.tolist()):
        back = tensors.from_values("x", datatype, array.shape, values)
        assert np.array_equal(back, array, equal_nan=datatype.startswith("FP"))


@given(st.sampled_from(sorted(DTYPES)), st.binary(max_size=64), SHAPES)
def test_any_bytes_are_a_tensor_of_that_shape_or_unfit(
    datatype: str, raw: bytes, shape: tuple[int, ...]
) -> None:
    with contextlib.suppress(Unfit):
        assert tensors.from_raw("x", datatype, shape, raw).shape == shape


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
        ([PIXELS], "expected 2 inputs but got 1 inputs for model 'digits'. Missing required"),
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
        ([PIXELS._replace(raw=bytes(252)), AGE], "input 'pixels' got 252 bytes, expected 256"),
        ([PIXELS._replace(raw=b""), AGE], "input 'pixels' got 0 bytes, expected 256"),
        (
            [PIXELS, AGE._replace(shape=[2], values=[1, 2])],
            "input 'age' batch size does not match other inputs for 'digits': 2 against 1",
        ),
        ([PIXELS, AGE._replace(values=[1, 2])], "input 'age' got 2 values, expected 1"),
        ([PIXELS, AGE._replace(values=[1.5])], "input 'age' holds a float, expected INT32 values"),
        ([PIXELS, AGE._replace(values=[True])], "input 'age' holds a bool"),
        ([PIXELS, AGE._replace(values=[None])], "input 'age' holds a NoneType"),
        (
            [PIXELS, AGE._replace(values=[2**31])],
            "input 'age' holds a value out of range for INT32",
        ),
        ([PIXELS, AGE._replace(values=None)], "input 'age' got 0 values, expected 1"),
    ],
)
def test_what_does_not_fit_is_named_with_its_numbers(given_tensors: list[Given], said: str) -> None:
    with pytest.raises(Unfit) as error:
        tensors.accept("digits", DIGITS, given_tensors)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\x05\x00\x00\x00ab", "element 0 says 5 bytes, 2 are left"),
        (b"\x01\x00\x00\x00a\x01", "got 1 strings and 1 bytes more, expected 2 strings"),
        (b"", "got 0 strings and 0 bytes more, expected 2 strings"),
        (b"\x01\x00\x00\x00\xff\x00\x00\x00\x00", "element 0 is not UTF-8"),
    ],
)
def test_short_strings_are_named(raw: bytes, said: str) -> None:
    with pytest.raises(Unfit) as error:
        tensors.from_raw("name", "BYTES", [2], raw)
    assert said in str(error.value)


def test_a_deep_nesting_is_no_problem() -> None:
    nested: list[Any] = [1]
    for _ in range(50_000):
        nested = [nested]
    assert tensors.flattened(nested) == [1]
    while nested:
        nested = nested.pop() if isinstance(nested[-1], list) else []
