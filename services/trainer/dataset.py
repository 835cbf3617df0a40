"""A dataset version as arrays: raw columns from Parquet, features through its fitted transform."""

import io
from dataclasses import dataclass

import msgspec
import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq

from libs.contracts.artifacts import DatasetManifest
from libs.contracts.pipeline import Field
from libs.objectstore import ObjectStore
from services.trainer.domain import Unusable

ROWS_MAX = 4096
"""Rows that go through a graph at once."""
ELEMENTS = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}


@dataclass(frozen=True)
class Split:
    """Raw feature columns, each [rows, *shape], and the label."""

    columns: dict[str, np.ndarray]
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Snapshot:
    """A dataset version in memory."""

    manifest: DatasetManifest
    transform: bytes
    train: Split
    test: Split


async def snapshot_of(objects: ObjectStore, digest: str) -> Snapshot:
    manifest = msgspec.json.decode(await objects.get_blob(digest), type=DatasetManifest)
    transform = await objects.get_blob(manifest.transform.digest)
    payloads = [await objects.get_blob(manifest.splits[name].digest) for name in ("train", "test")]
    train, test = (split_of(payload, manifest.schema) for payload in payloads)
    for name, split in (("train", train), ("test", test)):
        if not len(split):
            raise Unusable(f"dataset {manifest.dataset}: its {name} split has no rows")
    return Snapshot(manifest, transform, train, test)


def split_of(parquet: bytes, schema: dict[str, Field]) -> Split:
    label = next(name for name, field in schema.items() if field.role == "label")
    features = [name for name, field in schema.items() if field.role == "feature"]
    table = pq.read_table(io.BytesIO(parquet), columns=[*features, label])
    return Split(
        columns={name: array_of(name, table.column(name), schema[name]) for name in features},
        label=array_of(label, table.column(label), schema[label]),
    )


def array_of(name: str, column: pa.ChunkedArray, field: Field) -> np.ndarray:
    """[rows, *field.shape]; tensors lie flattened, row-major, in fixed-size lists."""
    if column.null_count:
        problem = f"{column.null_count} of {len(column)} rows are null: add drop_nulls"
        raise Unusable(f"$.dataset.schema.{name}: {problem}")
    if field.shape:
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        array: np.ndarray = flat.reshape(len(column), *field.shape)
    else:
        array = column.to_numpy()
    return array


def session_of(graph: bytes) -> ort.InferenceSession:
    """One thread: the same rows give the same bits."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, columns: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Every output of the graph over all rows. Columns take the graph's own types and shapes."""
    ready = {one.name: fitted(columns[one.name], one) for one in session.get_inputs()}
    rows = len(next(iter(ready.values())))
    pieces = [
        session.run(None, {name: array[start : start + ROWS_MAX] for name, array in ready.items()})
        for start in range(0, rows, ROWS_MAX)
    ]
    return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]


def fitted(array: np.ndarray, wanted: ort.NodeArg) -> np.ndarray:
    sizes = [size if isinstance(size, int) else -1 for size in wanted.shape[1:]]
    shaped = array.reshape(len(array), *sizes) if sizes else array.reshape(len(array))
    return np.ascontiguousarray(shaped, dtype=ELEMENTS[wanted.type])


def features_of(transform: bytes, split: Split) -> np.ndarray:
    """[rows, ...] float32."""
    (features,) = run(session_of(transform), split.columns)
    if not np.isfinite(features).all():
        bad = int((~np.isfinite(features)).any(axis=tuple(range(1, features.ndim))).sum())
        raise Unusable(
            f"$.preprocess: {bad} of {len(features)} rows have a feature that is no number"
        )
    return features.astype(np.float32, copy=False)


def classes_of(label: np.ndarray) -> np.ndarray:
    """The label's values in training, ascending, as INT64."""
    if label.dtype.kind not in "iub":
        raise Unusable(f"$.dataset.schema: a class label is an integer or bool, got {label.dtype}")
    return np.unique(label.astype(np.int64))


def indices_of(label: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Label values -> positions in `classes`; -1 for a value that is not there."""
    values = label.astype(np.int64)
    places = np.clip(np.searchsorted(classes, values), 0, len(classes) - 1)
    return np.where(classes[places] == values, places, -1).astype(np.int64)
