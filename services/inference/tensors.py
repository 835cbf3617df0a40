"""Tensors on the wire <-> numpy, and what a model's signature lets in.

Pure. A tensor that does not fit is an `Unfit` that names the input and the numbers; the words are
Triton's where its clients look for them.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from libs.contracts.artifacts import Signature, Tensor

Array = NDArray[Any]
Arrays = dict[str, Array]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
    "BYTES": np.dtype(object),
}
"""BF16 as its bit patterns: numpy has no such type, and onnxruntime takes patterns (as `OrtValue`)
but not ml_dtypes' bfloat16."""
CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Datatype -> the field of `InferTensorContents` its values travel in. FP16 and BF16 have none:
they travel as raw bytes only, over HTTP too."""
WHOLE = (int,)
VALUES: dict[str, tuple[type, ...]] = {
    "BOOL": (bool,),
    "FP32": (int, float),
    "FP64": (int, float),
    "BYTES": (str, bytes),
}
"""Kinds of Python values; of what is not listed, `WHOLE`."""
LENGTH = struct.Struct("<I")
TOGETHER = 1 << 14
"""Values that are read or written in one call, during which no other thread runs."""


class Unfit(ValueError):
    """A tensor the model does not take."""


class Given(NamedTuple):
    """A tensor as a client sent it: raw bytes, or values (flat or nested)."""

    name: str
    datatype: str
    shape: Sequence[int]
    raw: bytes | None = None
    values: Sequence[Any] | None = None


def accept(
    model: str,
    signature: Signature,
    given: Sequence[Given],
    batched: bool = True,
    text: bool = True,
) -> Arrays:
    """Every input the signature asks for; when `batched`, each with the same number of rows.

    Strings are checked to be UTF-8 and given as `str` where `text`, else they are any `bytes`.
    Raises `Unfit`.
    """
    expected = {tensor.name: tensor for tensor in signature.inputs}
    check_names(model, expected, given)
    for one in given:
        check_kind(model, expected[one.name], one)
    if batched:
        check_rows(model, given)
    return {one.name: decoded(model, one, text) for one in given}


def check_rows(model: str, given: Sequence[Given]) -> None:
    for one in given:
        if one.shape[0] != given[0].shape[0]:
            raise Unfit(
                f"input '{one.name}' batch size does not match other inputs for '{model}': "
                f"{one.shape[0]} against {given[0].shape[0]} of '{given[0].name}'"
            )


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
            f"Got inputs [{listed(names)}], but missing required inputs [{listed(missing)}]. "
            "Please provide all required inputs."
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


def decoded(model: str, given: Given, text: bool) -> Array:
    if given.raw is not None:
        return from_raw(model, given, given.raw, text)
    return from_values(model, given, given.values or (), text)


def from_raw(model: str, given: Given, raw: bytes, text: bool) -> Array:
    """Little-endian row-major bytes -> array; BYTES elements carry a 4-byte length each."""
    count = math.prod(given.shape)
    if given.datatype == "BYTES":
        return strings(given, split_lengths(model, given.name, count, raw), text)
    dtype = DTYPES[given.datatype]
    if len(raw) != count * dtype.itemsize:
        raise Unfit(
            f"input byte size mismatch for input '{given.name}' for model '{model}'. "
            f"Expected {count * dtype.itemsize}, got {len(raw)}"
        )
    if given.datatype == "BOOL":
        return np.frombuffer(raw, np.uint8).astype(np.bool_).reshape(tuple(given.shape))
    return np.frombuffer(raw, dtype).reshape(tuple(given.shape))


def split_lengths(model: str, name: str, count: int, raw: bytes) -> list[bytes]:
    what = f"inference input '{name}' for model '{model}'"
    found: list[bytes] = []
    position = 0
    while position < len(raw) and len(found) < count:
        start = position + LENGTH.size
        if start > len(raw):
            raise Unfit(
                f"incomplete string length indicator for {what}, expecting {LENGTH.size} bytes "
                f"but only {len(raw) - position} bytes available"
            )
        (length,) = LENGTH.unpack_from(raw, position)
        position = start + length
        if position > len(raw):
            raise Unfit(
                f"incomplete string data for {what}, expecting string of length {length} "
                f"but only {len(raw) - start} bytes available"
            )
        found.append(raw[start:position])
    if len(found) != count or position != len(raw):
        more = f" and {len(raw) - position} bytes more" if position < len(raw) else ""
        raise Unfit(f"expected {count} string elements for {what}, got {len(found)}{more}")
    return found


def from_values(model: str, given: Given, values: Sequence[Any], text: bool) -> Array:
    """Flat or nested values -> array; every value must be one of the datatype."""
    name, datatype = given.name, given.datatype
    if datatype not in CONTENTS:
        raise Unfit(
            f"sending {datatype} data as values is not supported. "
            f"Please use the binary data format for input '{name}'"
        )
    flat = flattened(values) if isinstance(values, list) else values
    count = math.prod(given.shape)
    if len(flat) != count:
        raise Unfit(
            f"input '{name}' for model '{model}' got {len(flat)} values, expected {count} "
            f"for {datatype} {bracketed(given.shape)}"
        )
    if datatype == "BYTES":
        check_values(given, flat)
        return strings(given, flat, text)
    array = np.empty(count, DTYPES[datatype])
    for at in range(0, count, TOGETHER):
        array[at : at + TOGETHER] = some_numbers(given, flat[at : at + TOGETHER])
    return array.reshape(tuple(given.shape))


def some_numbers(given: Given, values: Sequence[Any]) -> Array:
    check_values(given, values)
    name, datatype = given.name, given.datatype
    try:
        with np.errstate(over="raise"):
            return np.array(values, DTYPES[datatype])
    except (OverflowError, FloatingPointError) as error:
        raise Unfit(f"input '{name}' holds a value out of range for {datatype}: {error}") from error


def check_values(given: Given, values: Sequence[Any]) -> None:
    datatype = given.datatype
    for kind in set(map(type, values)):
        if kind not in VALUES.get(datatype, WHOLE):
            raise Unfit(f"input '{given.name}' holds a {kind.__name__}, expected {datatype} values")


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


def strings(given: Given, elements: Sequence[str | bytes], text: bool) -> Array:
    array = np.empty(len(elements), object)
    for index, element in enumerate(elements):
        try:
            array[index] = as_text(element) if text else encoded_string(element)
        except UnicodeError as error:
            raise Unfit(f"input '{given.name}' element {index} is not UTF-8: {error}") from error
    return array.reshape(tuple(given.shape))


def as_text(element: str | bytes) -> str:
    return element.decode() if isinstance(element, bytes) else element


def to_raw(datatype: str, array: Array) -> bytes:
    if datatype == "BYTES":
        encoded = [encoded_string(element) for element in array.reshape(-1)]
        return b"".join(LENGTH.pack(len(one)) + one for one in encoded)
    return np.ascontiguousarray(array, DTYPES[datatype]).tobytes()


def to_values(datatype: str, array: Array) -> list[Any]:
    """Flat Python values, row-major; BYTES as bytes. FP16 and BF16 have none: raises `Unfit`."""
    if datatype not in CONTENTS:
        raise Unfit(
            f"sending {datatype} data as values is not supported. "
            "Please use the binary data format for output"
        )
    flat = array.reshape(-1)
    if datatype == "BYTES":
        return [encoded_string(element) for element in flat]
    return flat.tolist()  # type: ignore[no-any-return]


def parts(array: Array) -> Iterator[Array]:
    """Flat, row-major."""
    flat = array.reshape(-1)
    for at in range(0, len(flat), TOGETHER):
        yield flat[at : at + TOGETHER]


def encoded_string(element: Any) -> bytes:
    return element if isinstance(element, bytes) else str(element).encode()


def size_of(datatype: str, shape: Sequence[int]) -> int | None:
    """In bytes; None where elements have no fixed size, or the datatype is none of ours."""
    dtype = DTYPES.get(datatype)
    return None if dtype is None or dtype.hasobject else math.prod(shape) * dtype.itemsize


def bracketed(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
