"""Rows of features as Open Inference Protocol tensors and back, without numpy."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from leptonic.errors import Error


def encode(
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows -> the tensors that a model's metadata asks for. Raises `Error`, naming the input."""
    columns = inputs if isinstance(inputs, Mapping) else columns_of(inputs)
    names = [one["name"] for one in wanted]
    for name in columns:
        if name not in names:
            known = ", ".join(names)
            raise Error(f"{name}: the model has no such input, only {known}", field=name)
    return [tensor(one["name"], one["datatype"], one["shape"], columns) for one in wanted]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in rows for name in row)
    for index, row in enumerate(rows):
        for name in names:
            if name not in row:
                raise Error(f"{name}: missing in row {index}", field=name)
    return {name: [row[name] for row in rows] for name in names}


def tensor(
    name: str, datatype: str, wanted: Sequence[int], columns: Mapping[str, Any]
) -> dict[str, Any]:
    if name not in columns:
        raise Error(f"{name}: missing", field=name)
    shape, data = flat(name, columns[name])
    fits = len(shape) == len(wanted) and all(
        int(w) in (-1, s) for s, w in zip(shape, wanted, strict=True)
    )
    if not fits:
        raise Error(f"{name}: shape {shape} does not fit {[int(w) for w in wanted]}", field=name)
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def flat(name: str, value: Any) -> tuple[list[int], list[Any]]:
    """Nested lists -> (shape, values in row-major order)."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return [], [value]
    parts = [flat(name, one) for one in value]
    shapes = {tuple(shape) for shape, _ in parts}
    if len(shapes) > 1:
        raise Error(f"{name}: rows of different shapes: {sorted(shapes)}", field=name)
    inner = list(shapes.pop()) if shapes else []
    return [len(value), *inner], [one for _, data in parts for one in data]


def rows(output: Mapping[str, Any]) -> list[Any]:
    """An output tensor's values as one entry a row."""
    shape, data = [int(size) for size in output["shape"]], list(output["data"])
    assert math.prod(shape) == len(data), (shape, len(data))
    for size in reversed(shape[1:]):
        data = [data[start : start + size] for start in range(0, len(data), size)]
    return data
