"""The classification extension: of an output, the n highest as "score:index[:label]"."""

from collections.abc import Mapping, Sequence

import numpy as np

from libs.contracts.artifacts import Tensor
from libs.doors import Invalid
from services.inference.tensors import DTYPES, Array

PARAMETER = "classification"
UNSCORED = ("BOOL", "FP16", "BF16", "BYTES")
FREE = -1


def classes_of(output: str, parameters: Mapping[str, bool | int | float | str]) -> int:
    """How many an output's parameters ask for; 0: the tensor itself. Raises `Invalid`."""
    value = parameters.get(PARAMETER, 0)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Invalid(
            f"invalid value type for '{PARAMETER}' parameter of output '{output}', "
            "expected int64_param."
        )
    if value < 0 or (PARAMETER in parameters and value == 0):
        raise Invalid(f"'{PARAMETER}' of output '{output}' must be at least 1, got {value}")
    return value


def classified(
    tensor: Tensor, array: Array, classes: int, labels: Sequence[str]
) -> tuple[Tensor, Array]:
    """BYTES, [rows, n], or [n] of an output without rows; fewer where it has fewer elements."""
    if tensor.datatype in UNSCORED:
        raise Invalid(
            f"class result not available for output '{tensor.name}' due to unsupported type "
            f"'{tensor.datatype}'"
        )
    rows = array.shape[:1] if tensor.shape[:1] == [FREE] else ()
    scores = np.asarray(array, DTYPES[tensor.datatype]).reshape(*(rows or (1,)), -1)
    best = [told(row, classes, labels) for row in scores]
    shape = (*rows, min(classes, scores.shape[1]))
    found = np.array(best, object).reshape(shape)
    return Tensor(tensor.name, "BYTES", list(shape)), found


def told(scores: Array, classes: int, labels: Sequence[str]) -> list[bytes]:
    """Highest first; of equal ones, the first."""
    backwards = np.argsort(scores[::-1], kind="stable")[::-1]
    return [
        told_one(scores[index], int(index), labels)
        for index in len(scores) - 1 - backwards[:classes]
    ]


def told_one(score: np.generic, index: int, labels: Sequence[str]) -> bytes:
    """Floats with six digits, as C++ writes them."""
    value = f"{float(score):f}" if isinstance(score, np.floating) else str(int(score))  # type: ignore[call-overload]
    label = f":{labels[index]}" if index < len(labels) and labels[index] else ""
    return f"{value}:{index}{label}".encode()
