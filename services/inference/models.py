"""A model version in memory: fetched by digest, verified, built and warmed up.

Nothing whose bytes do not match their digest gets this far: `ObjectStore.get_blob` raises
`Corrupt`.
"""

import asyncio

import msgspec
import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as onnx_errors

from libs.contracts.artifacts import ModelManifest, Signature
from libs.objectstore import ObjectStore
from services.inference.batcher import RunFailed
from services.inference.tensors import CONTENTS, DTYPES, Array, Arrays

INTRA_OP_THREADS = 1
"""One thread a session and more replicas: two OpenMP threads beside a busy neighbour were 5-12
times slower."""
LOG_FATAL = 4
ERRORS = (
    onnx_errors.EPFail,
    onnx_errors.Fail,
    onnx_errors.InvalidArgument,
    onnx_errors.InvalidGraph,
    onnx_errors.InvalidProtobuf,
    onnx_errors.NotImplemented,
    onnx_errors.RuntimeException,
    RuntimeError,
    ValueError,
)


class Unloadable(ValueError):
    """The bytes are what was registered, and still cannot be served."""


class Model:
    """A session and what it takes and gives."""

    def __init__(
        self, digest: str, manifest: ModelManifest, session: onnxruntime.InferenceSession
    ) -> None:
        self.digest = digest
        self.manifest = manifest
        self.session = session
        self.outputs = [tensor.name for tensor in self.signature.outputs]

    @property
    def signature(self) -> Signature:
        return self.manifest.signature

    def run(self, inputs: Arrays) -> Arrays:
        """Blocks. Raises `RunFailed`."""
        try:
            outputs = self.session.run(self.outputs, inputs)
        except ERRORS as error:
            raise RunFailed(f"model {self.manifest.model}: {error}") from error
        return dict(zip(self.outputs, outputs, strict=True))


async def load(objects: ObjectStore, digest: str) -> Model:
    """Manifest digest -> a warm model.

    Raises `Unloadable`, or `Corrupt`, `Missing`, `Unavailable` of the object store.
    """
    manifest = await objects.get_blob(digest)
    try:
        decoded = msgspec.json.decode(manifest, type=ModelManifest)
    except msgspec.DecodeError as error:
        raise Unloadable(f"manifest {digest}: {error}") from error
    graph = await objects.get_blob(decoded.graph.digest)
    return await asyncio.to_thread(build, digest, decoded, graph)


def build(digest: str, manifest: ModelManifest, graph: bytes) -> Model:
    """Raises `Unloadable`."""
    for tensor in (*manifest.signature.inputs, *manifest.signature.outputs):
        if tensor.datatype not in CONTENTS:
            raise Unloadable(f"tensor '{tensor.name}' has unknown datatype {tensor.datatype!r}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = INTRA_OP_THREADS
    options.inter_op_num_threads = 1
    options.log_severity_level = LOG_FATAL
    try:
        session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
    except ERRORS as error:
        raise Unloadable(f"graph {manifest.graph.digest}: {error}") from error
    model = Model(digest, manifest, session)
    check(model)
    warm_up(model)
    return model


def check(model: Model) -> None:
    """The graph takes and gives what its signature says."""
    for what, promised, actual in (
        ("inputs", model.signature.inputs, model.session.get_inputs()),
        ("outputs", model.signature.outputs, model.session.get_outputs()),
    ):
        missing = {tensor.name for tensor in promised} ^ {node.name for node in actual}
        if missing:
            raise Unloadable(f"graph and signature differ in {what}: {', '.join(sorted(missing))}")


def warm_up(model: Model) -> None:
    """The first run allocates; let it not be a caller's."""
    inputs = {
        tensor.name: zeros(tensor.datatype, tensor.shape) for tensor in model.signature.inputs
    }
    try:
        model.run(inputs)
    except RunFailed as error:
        raise Unloadable(
            f"graph {model.manifest.graph.digest} fails on one row: {error}"
        ) from error


def zeros(datatype: str, shape: list[int]) -> Array:
    sizes = tuple(max(size, 1) for size in shape)
    if datatype == "BYTES":
        return np.full(sizes, "", object)
    return np.zeros(sizes, DTYPES[datatype])
