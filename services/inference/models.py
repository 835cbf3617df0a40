"""A model version in memory: what the doors ask of it, and an ONNX graph in this process.

Nothing whose bytes do not match their digest gets this far: `ObjectStore.get_blob` raises
`Corrupt`, and the cache throws them away. User code is no part of this process: see `isolated`.
"""

import asyncio
import ctypes
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as onnx_errors

from libs.contracts.artifacts import ModelManifest, Signature, Tensor
from services.inference import operators, rewriting
from services.inference.cache import Cache
from services.inference.tensors import DTYPES, Array, Arrays

INTRA_OP_THREADS = 1
"""One thread a session and more replicas: two OpenMP threads beside a busy neighbour were 5-12
times slower."""
LOG_FATAL = 4
BFLOAT16 = 16
"""ONNX's number of the one datatype numpy has no array for."""
ERRORS = (
    onnx_errors.EPFail,
    onnx_errors.Fail,
    onnx_errors.InvalidArgument,
    onnx_errors.InvalidGraph,
    onnx_errors.InvalidProtobuf,
    onnx_errors.NoSuchFile,
    onnx_errors.NotImplemented,
    onnx_errors.RuntimeException,
    RuntimeError,
    ValueError,
)
DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}


class Unloadable(ValueError):
    """The bytes are what was registered, and still cannot be served."""


class RunFailed(RuntimeError):
    """The model raised."""


class Crashed(RuntimeError):
    """The process the model ran in is gone; the text says why."""


class Model(Protocol):
    """One version, loaded and warm."""

    digest: str
    signature: Signature
    batched: bool
    """The first dimension of every tensor is rows."""
    decoupled: bool
    """Asked by `stream`; any other model by `run`."""
    parallel: int | None
    """Batches it runs at once; None: as many as it is given."""
    platform: str
    """In Triton's words."""
    labels: dict[str, list[str]]
    """Output -> the names of its classes."""
    on_crash: Callable[[str], None] | None
    """Told the cause, once for each process of its own that died; on a thread of the model's."""

    def run(self, inputs: Arrays) -> Arrays:
        """Blocks. Raises `RunFailed`, `Crashed`."""

    def stream(self, inputs: Arrays) -> Iterator[Arrays]:
        """Blocks between answers. Raises what `run` does."""

    def close(self) -> None:
        """Nothing runs any more; the memory goes back to the system."""


class OnnxModel:
    decoupled = False
    parallel: int | None = None
    on_crash: Callable[[str], None] | None = None
    platform = "onnxruntime_onnx"

    def __init__(
        self,
        name: str,
        digest: str,
        graph: bytes | Path,
        *,
        batched: bool,
        signature: Signature | None = None,
        labels: dict[str, list[str]] | None = None,
        libraries: Sequence[Path] = (),
    ) -> None:
        """`signature`: the graph's own when None. `libraries` of custom ops are somebody's code:
        with them this belongs into a worker. Raises `Unloadable`."""
        self.name = name
        self.digest = digest
        self.batched = batched
        self.labels = labels or {}
        self.session = session_of(name, graph, libraries)
        found = signature_of(name, self.session)
        self.signature = signature or found
        check(name, self.signature, found, batched)
        self.outputs = [tensor.name for tensor in self.signature.outputs]
        described = (*self.signature.inputs, *self.signature.outputs)
        self.patterns = any(tensor.datatype == "BF16" for tensor in described)
        self.warm_up()

    def run(self, inputs: Arrays) -> Arrays:
        try:
            if self.patterns:
                return self.run_values(inputs)
            outputs = self.session.run(self.outputs, inputs)
        except ERRORS as error:
            raise RunFailed(f"model {self.name}: {error}") from error
        return dict(zip(self.outputs, outputs, strict=True))

    def run_values(self, inputs: Arrays) -> Arrays:
        """Through onnxruntime's own tensors, as BF16 goes and comes as bit patterns."""
        values = {
            tensor.name: value_of(tensor.datatype, inputs[tensor.name])
            for tensor in self.signature.inputs
        }
        outputs = self.session.run_with_ort_values(self.outputs, values)
        return dict(zip(self.outputs, map(array_of, outputs), strict=True))

    def stream(self, inputs: Arrays) -> Iterator[Arrays]:
        yield self.run(inputs)

    def warm_up(self) -> None:
        """The first run allocates; let it not be a caller's."""
        try:
            self.run({tensor.name: zeros(tensor) for tensor in self.signature.inputs})
        except RunFailed as error:
            raise Unloadable(f"the graph fails on one row: {error}") from error

    def close(self) -> None:
        """glibc keeps what was freed: a ResNet-18 loaded 20 times over held up to 300 MB, with a
        trim 65 MB, as before the first."""
        del self.session
        ctypes.CDLL(None).malloc_trim(0)


class Artifacts(Protocol):
    """An object store, as far as a model needs it."""

    async def get_blob(self, digest: str) -> bytes: ...


Build = Callable[[str, str, bytes, Signature], Model]
"""(name, digest, graph, signature); blocks; raises `Unloadable`."""


def in_process(name: str, digest: str, graph: bytes, signature: Signature) -> Model:
    return OnnxModel(name, digest, graph, batched=True, signature=signature)


async def load(
    objects: Artifacts, digest: str, cache: Cache | None = None, build: Build = in_process
) -> Model:
    """Manifest digest -> a warm model; `build` may be `isolated.in_worker`.

    Raises `Unloadable`, or `Corrupt`, `Missing`, `Unavailable` of the object store.
    """
    manifest = await fetched(objects, digest, cache)
    try:
        decoded = msgspec.json.decode(manifest, type=ModelManifest)
    except msgspec.DecodeError as error:
        raise Unloadable(f"manifest {digest}: {error}") from error
    graph = await fetched(objects, decoded.graph.digest, cache)
    return await asyncio.to_thread(build, decoded.model, digest, graph, decoded.signature)


async def fetched(objects: Artifacts, digest: str, cache: Cache | None) -> bytes:
    if cache is None:
        return await objects.get_blob(digest)
    kept = await asyncio.to_thread(cache.get, digest)
    if kept is not None:
        return kept
    payload = await objects.get_blob(digest)
    await asyncio.to_thread(cache.put, digest, payload)
    return payload


def session_of(
    name: str, graph: bytes | Path, libraries: Sequence[Path]
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = INTRA_OP_THREADS
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_FATAL
    try:
        taken = rewriting.rewritten(name, graph)
        ours = operators.library() if taken is not graph else None
        for library in (*libraries, *([ours] if ours else [])):
            options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(taken, options, ["CPUExecutionProvider"])
    except ERRORS as error:
        raise Unloadable(f"failed to load '{name}': {error}") from error


def signature_of(name: str, session: onnxruntime.InferenceSession) -> Signature:
    """What the graph says; -1 for a dimension it leaves open."""
    inputs, outputs = (
        [described(name, node) for node in nodes]
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    return Signature(inputs, outputs)


def described(name: str, node: onnxruntime.NodeArg) -> Tensor:
    if node.type not in DATATYPES:
        raise Unloadable(f"failed to load '{name}': '{node.name}' is a {node.type}, not a tensor")
    shape = [size if isinstance(size, int) else -1 for size in node.shape]
    return Tensor(node.name, DATATYPES[node.type], shape)


def check(name: str, promised: Signature, found: Signature, batched: bool) -> None:
    """The graph takes and gives what its signature says; it may give more."""
    missing = {one.name for one in promised.inputs} ^ {one.name for one in found.inputs}
    missing |= {one.name for one in promised.outputs} - {one.name for one in found.outputs}
    if missing:
        listed = ", ".join(sorted(missing))
        raise Unloadable(f"failed to load '{name}': graph and signature differ in {listed}")
    known = {one.name: one.datatype for one in (*found.inputs, *found.outputs)}
    for one in (*promised.inputs, *promised.outputs):
        if one.datatype != known[one.name]:
            raise Unloadable(
                f"failed to load '{name}': '{one.name}' is {known[one.name]} in the graph, "
                f"{one.datatype} in the signature"
            )
    for one in found.inputs:
        if batched and one.shape[:1] != [-1]:
            raise Unloadable(
                f"failed to load '{name}': input '{one.name}' has shape {one.shape}; "
                "for batching the first dimension must be open (-1)"
            )


def zeros(tensor: Tensor) -> Array:
    """One row, 1 for every size that is open. A text is a number too: graphs may read it as one."""
    sizes = tuple(max(size, 1) for size in tensor.shape)
    if tensor.datatype == "BYTES":
        return np.full(sizes, "0", object)
    return np.zeros(sizes, DTYPES[tensor.datatype])


def value_of(datatype: str, array: Array) -> onnxruntime.OrtValue:
    if datatype == "BF16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def array_of(value: onnxruntime.OrtValue) -> Array:
    if value.element_type() != BFLOAT16:
        array: Array = value.numpy()
        return array
    there: Any = (ctypes.c_char * value.tensor_size_in_bytes()).from_address(value.data_ptr())
    return np.frombuffer(bytearray(there), DTYPES["BF16"]).reshape(value.shape())
