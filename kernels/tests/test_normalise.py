"""`kernels.normalise` against `kernels.reference`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import reference
from kernels.normalise import ERROR_ULP_MAX, normalise

numbers = st.floats(-3, 3, width=32)
deviations = st.floats(0.0078125, 4, width=32)


def error_ulp(images: NDArray[np.uint8], mean: list[float], std: list[float]) -> float:
    """The largest distance to the reference, in units of the result's last place."""
    exact = reference.normalise(images, np.array(mean), np.array(std))
    result = normalise(images, mean, std)
    assert result.dtype == np.float32
    assert result.shape == exact.shape
    assert result.flags.c_contiguous
    place = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(result - exact) / place, initial=0.0))


@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_is_correctly_rounded_for_any_shape_and_strides(data: st.DataObject, seed: int) -> None:
    channels = data.draw(st.integers(1, 5))
    shape = [data.draw(st.integers(0, 9)) for _ in range(3)]
    steps = [data.draw(st.sampled_from([-2, -1, 1, 2, 3])) for _ in range(4)]
    whole = [size * abs(step) for size, step in zip([*shape, channels], steps, strict=True)]
    bytes_ = np.random.default_rng(seed).integers(0, 256, whole, np.uint8)
    images = bytes_[tuple(slice(None, None, step) for step in steps)]
    if data.draw(st.booleans()):
        images = images.swapaxes(1, 2)
    mean = data.draw(st.lists(numbers, min_size=channels, max_size=channels))
    std = data.draw(st.lists(deviations, min_size=channels, max_size=channels))
    assert error_ulp(images, mean, std) <= ERROR_ULP_MAX


def test_every_byte_of_every_channel() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert error_ulp(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) <= ERROR_ULP_MAX


def test_an_empty_batch_is_an_empty_batch() -> None:
    assert normalise(np.empty((0, 28, 28, 1), np.uint8), [0.5], [0.5]).shape == (0, 1, 28, 28)


def test_a_read_only_array_is_read() -> None:
    images = np.full((1, 2, 2, 1), 255, np.uint8)
    images.flags.writeable = False
    assert normalise(images, [0.5], [0.5]).tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]


@pytest.mark.parametrize(
    ("images", "mean", "std", "problem"),
    [
        (np.zeros((1, 2, 2, 3), np.float32), [0] * 3, [1] * 3, "images: uint8"),
        (np.zeros((2, 2, 3), np.uint8), [0] * 3, [1] * 3, "images: uint8"),
        (np.zeros((1, 2, 2, 3), np.uint8), [0], [1] * 3, "mean: one for each of 3 channels"),
        (np.zeros((1, 2, 2, 3), np.uint8), [0] * 3, [1, 0, 1], "std: above 0"),
        (np.zeros((1, 2, 2, 1), np.uint8), [float("nan")], [1], "mean: finite"),
    ],
)
def test_rubbish_is_refused_by_name(
    images: NDArray[np.uint8], mean: list[float], std: list[float], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        normalise(images, mean, std)
