"""Tensors on the wire <-> numpy, and what a model's signature lets in.

Pure. A tensor that does not fit is an `Unfit` that names the input and the numbers; the words are
Triton's where its clients look for them.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from libs.contracts.artifacts import Signature, Tensor

Array = NDArray[Any]
Arrays = dict[str, Array]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype -> the field of `InferTensorContents` its values travel in."""
VALUES: dict[str, tuple[type, ...]] = {
    "BOOL": (bool,),
    "UINT8": (int,),
    "INT32": (int,),
    "INT64": (int,),
    "FP32": (int, float),
    "FP64": (int, float),
    "BYTES": (str, bytes),
}
LENGTH = struct.Struct("<I")


class Unfit(ValueError):
    """A tensor the model does not take."""


class Given(NamedTuple):
    """A tensor as a client sent it: raw bytes, or values (flat or nested)."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes | None = None
    values: Sequence[Any] | None = None


def accept(model: str, signature: Signature, given: Sequence[Given]) -> Arrays:
    """Every input the signature asks for, each with the same number of rows. Raises `Unfit`."""
    expected = {tensor.name: tensor for tensor in signature.inputs}
    check_names(model, expected, given)
    for one in given:
        check_kind(model, expected[one.name], one)
    rows = given[0].shape[0]
    for one in given:
        if one.shape[0] != rows:
            raise Unfit(
                f"input '{one.name}' batch size does not match other inputs for '{model}': "
                f"{one.shape[0]} against {rows} of '{given[0].name}'"
            )
    return {one.name: decoded(one) for one in given}


def check_names(model: str, expected: Mapping[str, Tensor], given: Sequence[Given]) -> None:
    names = [one.name for one in given]
    for index, name in enumerate(names):
        if name not in expected:
            known = listed(expected)
            raise Unfit(
                f"unexpected inference input '{name}' for model '{model}': it takes {known}"
            )
        if name in names[:index]:
            raise Unfit(f"input '{name}' is given twice for model '{model}'")
    missing = [name for name in expected if name not in names]
    if missing:
        raise Unfit(
            f"expected {len(expected)} inputs but got {len(names)} inputs for model '{model}'. "
            f"Missing required input(s) {listed(missing)}"
        )


def check_kind(model: str, tensor: Tensor, given: Given) -> None:
    if given.datatype != tensor.datatype:
        raise Unfit(
            f"inference input '{given.name}' data-type is '{given.datatype}', "
            f"but model '{model}' expects '{tensor.datatype}'"
        )
    fits = len(given.shape) == len(tensor.shape) and all(
        got >= 1 and want in (-1, got) for got, want in zip(given.shape, tensor.shape, strict=True)
    )
    if not fits:
        raise Unfit(
            f"unexpected shape for input '{given.name}' for model '{model}'. "
            f"Expected {bracketed(tensor.shape)}, got {bracketed(given.shape)}"
        )


def decoded(given: Given) -> Array:
    if given.raw is not None:
        return from_raw(given.name, given.datatype, given.shape, given.raw)
    return from_values(given.name, given.datatype, given.shape, given.values or ())


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """Little-endian row-major bytes -> array; BYTES elements carry a 4-byte length each."""
    count = math.prod(shape)
    if datatype == "BYTES":
        return strings(name, shape, split_lengths(name, count, raw))
    dtype = DTYPES[datatype]
    if len(raw) != count * dtype.itemsize:
        raise Unfit(
            f"input '{name}' got {len(raw)} bytes, expected {count * dtype.itemsize} "
            f"for {datatype} {bracketed(shape)}"
        )
    if datatype == "BOOL":
        return np.frombuffer(raw, np.uint8).astype(np.bool_).reshape(tuple(shape))
    return np.frombuffer(raw, dtype).reshape(tuple(shape))


def split_lengths(name: str, count: int, raw: bytes) -> list[bytes]:
    found: list[bytes] = []
    position = 0
    while position < len(raw):
        start = position + LENGTH.size
        if start > len(raw) or len(found) == count:
            break
        (length,) = LENGTH.unpack_from(raw, position)
        if start + length > len(raw):
            raise Unfit(
                f"input '{name}' element {len(found)} says {length} bytes, "
                f"{len(raw) - start} are left"
            )
        found.append(raw[start : start + length])
        position = start + length
    if position != len(raw) or len(found) != count:
        raise Unfit(
            f"input '{name}' got {len(found)} strings and {len(raw) - position} bytes more, "
            f"expected {count} strings"
        )
    return found


def from_values(name: str, datatype: str, shape: Sequence[int], values: Sequence[Any]) -> Array:
    """Flat or nested values -> array; every value must be one of the datatype."""
    flat = flattened(values)
    count = math.prod(shape)
    if len(flat) != count:
        raise Unfit(
            f"input '{name}' got {len(flat)} values, expected {count} "
            f"for {datatype} {bracketed(shape)}"
        )
    for kind in set(map(type, flat)):
        if kind not in VALUES[datatype]:
            raise Unfit(f"input '{name}' holds a {kind.__name__}, expected {datatype} values")
    if datatype == "BYTES":
        return strings(name, shape, flat)
    try:
        with np.errstate(over="raise"):
            return np.array(flat, DTYPES[datatype]).reshape(tuple(shape))
    except (OverflowError, FloatingPointError) as error:
        raise Unfit(f"input '{name}' holds a value out of range for {datatype}: {error}") from error


def flattened(values: Sequence[Any]) -> list[Any]:
    """Row-major leaves of nested lists, without recursion: the depth is the client's."""
    flat: list[Any] = []
    left = [iter(values)]
    while left:
        for value in left[-1]:
            if isinstance(value, list):
                left.append(iter(value))
                break
            flat.append(value)
        else:
            left.pop()
    return flat


def strings(name: str, shape: Sequence[int], elements: Sequence[str | bytes]) -> Array:
    """onnxruntime's strings are UTF-8 text."""
    array = np.empty(len(elements), object)
    for index, element in enumerate(elements):
        try:
            array[index] = element.decode() if isinstance(element, bytes) else element
        except UnicodeDecodeError as error:
            raise Unfit(f"input '{name}' element {index} is not UTF-8: {error}") from error
    return array.reshape(tuple(shape))


def to_raw(datatype: str, array: Array) -> bytes:
    if datatype == "BYTES":
        encoded = [encoded_string(element) for element in array.reshape(-1)]
        return b"".join(LENGTH.pack(len(one)) + one for one in encoded)
    return np.ascontiguousarray(array, DTYPES[datatype]).tobytes()


def to_values(datatype: str, array: Array) -> list[Any]:
    """Flat Python values, row-major; BYTES as bytes."""
    flat = array.reshape(-1)
    if datatype == "BYTES":
        return [encoded_string(element) for element in flat]
    return flat.tolist()  # type: ignore[no-any-return]


def encoded_string(element: Any) -> bytes:
    return element if isinstance(element, bytes) else str(element).encode()


def bracketed(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
