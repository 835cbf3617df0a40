"""Classification answers the highest scores in Triton's form."""

from typing import Any

import numpy as np
import pytest

from libs.contracts.artifacts import Tensor
from libs.doors import Invalid
from services.inference.classification import classes_of, classified
from services.inference.tensors import DTYPES

SCORES = Tensor("scores", "FP32", [-1, 4])


def test_the_highest_come_first_with_their_labels() -> None:
    array = np.array([[0.25, 1, -2, 0.5], [3, 3, 4, 3]], np.float32)
    tensor, found = classified(SCORES, array, 3, ["a", "", "c"])
    assert (tensor.name, tensor.datatype, found.shape) == ("scores", "BYTES", (2, 3))
    assert found.tolist() == [
        [b"1.000000:1", b"0.500000:3", b"0.250000:0:a"],
        [b"4.000000:2:c", b"3.000000:0:a", b"3.000000:1"],
    ]


def test_an_output_without_rows_is_one_list() -> None:
    tensor = Tensor("scores", "UINT64", [2, 2])
    array = np.array([[1, 1 << 63], [7, 3]], np.uint64)
    _, found = classified(tensor, array, 9, [])
    assert found.tolist() == [b"9223372036854775808:1", b"7:2", b"3:3", b"1:0"]


@pytest.mark.parametrize("datatype", sorted(set(DTYPES) - {"BOOL", "FP16", "BF16", "BYTES"}))
def test_every_number_can_be_a_score(datatype: str) -> None:
    array = np.array([[1, 2]], DTYPES[datatype])
    _, found = classified(Tensor("y", datatype, [-1, 2]), array, 1, ["no", "yes"])
    assert found.tolist() == [[b"2.000000:1:yes" if datatype.startswith("FP") else b"2:1:yes"]]


@pytest.mark.parametrize("datatype", ["BOOL", "FP16", "BF16", "BYTES"])
def test_what_is_no_score_is_refused(datatype: str) -> None:
    array = np.zeros((1, 2), DTYPES[datatype])
    with pytest.raises(Invalid, match=f"unsupported type '{datatype}'"):
        classified(Tensor("y", datatype, [-1, 2]), array, 1, [])


@pytest.mark.parametrize(
    ("value", "said"),
    [(True, "expected int64_param"), ("3", "expected int64_param"), (0, "at least 1"), (-1, "got")],
)
def test_the_parameter_is_a_count(value: Any, said: str) -> None:
    with pytest.raises(Invalid, match=said):
        classes_of("y", {"classification": value})


def test_without_the_parameter_the_tensor_is_the_answer() -> None:
    assert classes_of("y", {}) == 0
    assert classes_of("y", {"classification": 2}) == 2
