"""What lies in object storage under its sha256: manifests of dataset and model versions.

A manifest is canonical JSON (sorted keys, no spaces), so the same content has the same digest.
"""

import hashlib
from typing import Any

import msgspec

from libs.contracts.pipeline import Field


class Blob(msgspec.Struct, frozen=True):
    """Bytes in object storage at `artifacts/<digest>`."""

    digest: str
    """sha256, 64 hex digits."""
    size_bytes: int
    rows: int = 0
    """Rows of a Parquet blob; 0 for anything else."""


class DatasetManifest(msgspec.Struct, frozen=True, kw_only=True):
    """An immutable snapshot: which parts went in, what came out."""

    project: str
    dataset: str
    schema: dict[str, Field]
    steps: list[dict[str, Any]]
    """The pipeline's preprocessing steps, as written."""
    parts: list[str]
    """sha256 of every landed part it was built from, in landing order."""
    splits: dict[str, Blob]
    """`train` and `test`: Parquet with the schema's columns, cleaned but not transformed."""
    transform: Blob
    """ONNX: raw feature columns -> `features` float32 [batch, ...]; see preprocess/transform.py."""
    fitted: dict[str, Any]
    """The fitted parameters, readable: what the transform graph was made from."""
    statistics: dict[str, Any]
    """Per column: rows, nulls, min, max, mean, std, histogram: the reference for drift."""


class Tensor(msgspec.Struct, frozen=True):
    """One input or output of a served graph, in Open Inference Protocol words."""

    name: str
    datatype: str
    """`FP32`, `FP64`, `INT64`, `INT32`, `UINT8`, `BOOL`, `BYTES`."""
    shape: list[int]
    """-1 for the batch dimension, which comes first."""


class Signature(msgspec.Struct, frozen=True):
    inputs: list[Tensor]
    """The dataset's raw feature columns, in schema order."""
    outputs: list[Tensor]
    """Classification: `label` INT64 [-1] and `probabilities` FP32 [-1, classes].
    Regression: `prediction` FP32 [-1]."""


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """Everything needed to rebuild the version bit for bit on CPU."""

    dataset: str
    dataset_version: int
    dataset_digest: str
    pipeline: str
    revision: int
    recipe: str
    params: dict[str, Any]
    seed: int
    workers: int
    libraries: dict[str, str]
    """Versions of python, torch, numpy, onnx, onnxruntime that trained it."""


class ModelManifest(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    weights: Blob
    """safetensors: the recipe module's state_dict."""
    graph: Blob
    """ONNX: fitted transform followed by the module; what is served."""
    transform: Blob
    """The dataset version's transform, byte for byte."""
    signature: Signature
    metrics: dict[str, float]
    """Of the served graph on the test split of its dataset version."""
    lineage: Lineage


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Candidate and champion on the same rows: what the gate decides on."""

    dataset_digest: str
    metrics: dict[str, float]
    champion: int | None = None
    champion_metrics: dict[str, float] = {}


class TrainResult(msgspec.Struct, frozen=True, kw_only=True):
    """`AttemptSucceeded.result` of a `train` job, as builtins."""

    manifest: Blob
    evaluation: Evaluation
    seconds: float
    resumed_from_epoch: int = 0


def canonical(value: msgspec.Struct | dict[str, Any]) -> bytes:
    """The one byte representation of a manifest."""
    return msgspec.json.encode(value, order="sorted")


def digest_of(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def blob_of(payload: bytes, rows: int = 0) -> Blob:
    return Blob(digest=digest_of(payload), size_bytes=len(payload), rows=rows)
