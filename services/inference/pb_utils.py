"""What a user's `model.py` imports as `triton_python_backend_utils`: Triton's names, our text.

Runs in a worker only. Numbers in signatures and flags are Triton's.
"""

import json
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TYPES: dict[str, Any] = {
    "TYPE_BOOL": np.bool_,
    "TYPE_UINT8": np.uint8,
    "TYPE_UINT16": np.uint16,
    "TYPE_UINT32": np.uint32,
    "TYPE_UINT64": np.uint64,
    "TYPE_INT8": np.int8,
    "TYPE_INT16": np.int16,
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP16": np.float16,
    "TYPE_FP32": np.float32,
    "TYPE_FP64": np.float64,
    "TYPE_STRING": np.object_,
    "TYPE_BF16": np.uint16,
}
"""In the order of their numbers; BF16 as bit patterns."""
NUMBERS = {name: number for number, name in enumerate(TYPES, 1)}


class TritonModelException(Exception):
    pass


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG = range(4)
    UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(4, 8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, data: Array) -> None:
        self._name = name
        self._data = np.asarray(data)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._data

    def triton_dtype(self) -> int:
        return np_to_triton_type(self._data.dtype.type)

    def shape(self) -> list[int]:
        return list(self._data.shape)

    def is_cpu(self) -> bool:
        return True

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> "Tensor":
        return Tensor(name, np.from_dlpack(tensor))

    def to_dlpack(self) -> Any:
        return self._data.__dlpack__()

    def __dlpack__(self, **stated: Any) -> Any:
        return self._data.__dlpack__(**stated)

    def __dlpack_device__(self) -> Any:
        return self._data.__dlpack_device__()


class InferenceResponse:
    def __init__(
        self,
        output_tensors: Sequence[Tensor] = (),
        error: TritonError | str | None = None,
        parameters: str = "",
    ) -> None:
        self._outputs = list(output_tensors or ())
        self._error = TritonError(error) if isinstance(error, str) else error
        self._parameters = parameters

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return self._parameters or "{}"


Send = Callable[[InferenceResponse | None, bool], None]
"""An answer, and whether it was the last."""


class ResponseSender:
    """A request that nobody holds any more is over, whether its model said so or not."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_over = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        if self._is_over:
            raise TritonModelException("the final response of this request was sent already")
        self._is_over = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        self._send(response, self._is_over)

    def is_cancelled(self) -> bool:
        return False

    def __del__(self) -> None:
        if not self._is_over:
            self._send(None, True)


class InferenceRequest:
    """One batch: its rows are those of all requests that share it."""

    def __init__(
        self,
        model_name: str = "",
        requested_output_names: Sequence[str] = (),
        inputs: Sequence[Tensor] = (),
        request_id: str = "",
        correlation_id: int | str = 0,
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        parameters: dict[str, Any] | None = None,
        sender: ResponseSender | None = None,
    ) -> None:
        self._model_name = model_name
        self._outputs = list(requested_output_names)
        self._inputs = list(inputs)
        self._id = request_id
        self._correlation_id = correlation_id
        self._model_version = model_version
        self._flags = flags
        self._timeout_us = timeout
        self._parameters = parameters or {}
        self._sender = sender

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def model_name(self) -> str:
        return self._model_name

    def model_version(self) -> int:
        return self._model_version

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def request_id(self) -> str:
        return self._id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def flags(self) -> int:
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = flags

    def timeout(self) -> int:
        return self._timeout_us

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def is_cancelled(self) -> bool:
        return False

    def get_response_sender(self) -> ResponseSender | None:
        return self._sender

    def exec(self, **_: Any) -> InferenceResponse:
        raise TritonModelException("a model cannot ask another model here")


class Logger:
    """To the log of the service, by way of stderr."""

    INFO, WARNING, ERROR, VERBOSE = range(4)
    NAMES: ClassVar = ("INFO", "WARNING", "ERROR", "VERBOSE")

    @staticmethod
    def log(message: str, level: int = INFO) -> None:
        sys.stderr.write(f"{Logger.NAMES[level]} {message}\n")

    @staticmethod
    def log_info(message: str) -> None:
        Logger.log(message, Logger.INFO)

    @staticmethod
    def log_warn(message: str) -> None:
        Logger.log(message, Logger.WARNING)

    @staticmethod
    def log_error(message: str) -> None:
        Logger.log(message, Logger.ERROR)

    @staticmethod
    def log_verbose(message: str) -> None:
        Logger.log(message, Logger.VERBOSE)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((one for one in request.inputs() if one.name() == name), None)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    return next((one for one in response.output_tensors() if one.name() == name), None)


def get_input_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return config_of(model_config, "input", name)


def get_output_config_by_name(model_config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return config_of(model_config, "output", name)


def config_of(model_config: dict[str, Any], kind: str, name: str) -> dict[str, Any] | None:
    return next((one for one in model_config.get(kind, ()) if one["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: dict[str, Any]) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_string_to_numpy(triton_type: str) -> Any:
    return TYPES.get(triton_type)


def triton_to_np_type(number: int) -> Any:
    return next((TYPES[name] for name, known in NUMBERS.items() if known == number), None)


def np_to_triton_type(kind: Any) -> int:
    if np.dtype(kind).kind in "OSU":
        return NUMBERS["TYPE_STRING"]
    found = (number for name, number in NUMBERS.items() if np.dtype(TYPES[name]) == np.dtype(kind))
    return next(found)


def serialize_byte_tensor(array: Array) -> Array:
    encoded = [one if isinstance(one, bytes) else str(one).encode() for one in array.reshape(-1)]
    joined = b"".join(struct.pack("<I", len(one)) + one for one in encoded)
    return np.frombuffer(joined, np.uint8)


def deserialize_bytes_tensor(encoded: bytes) -> Array:
    found: list[bytes] = []
    start = 0
    while start < len(encoded):
        (length,) = struct.unpack_from("<I", encoded, start)
        start += 4 + length
        found.append(encoded[start - length : start])
    return np.array(found, object)
