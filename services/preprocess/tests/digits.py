"""The handwritten digits that ship with scikit-learn, as landed parts and as a pipeline."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from libs.contracts.artifacts import digest_of
from libs.contracts.pipeline import Pipeline, convert
from services.preprocess.domain import Part

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS = PIXELS.astype(np.float32)
INK_MAX = 16.0


def spec(**changes: Any) -> dict[str, Any]:
    """A pipeline file over 64-vectors and a scalar, as builtins."""
    document = {
        "pipeline": "digits",
        "dataset": {
            "name": "digits",
            "schema": {
                "pixels": {"type": "float32", "shape": [64]},
                "ink": {"type": "float64"},
                "digit": {"type": "int64", "role": "label"},
            },
        },
        "preprocess": [
            {"drop_duplicates": {}},
            {"standardize": {"columns": ["pixels", "ink"]}},
            {"split": {"test": 0.2, "seed": 7}},
        ],
        "train": {"recipe": "mlp"},
        "deployment": {"model": "digits"},
        "triggers": {"records": 1000, "drift": {"psi": 0.25, "min_records": 200}},
    }
    return document | changes


def pipeline(**changes: Any) -> Pipeline:
    return convert(spec(**changes))


def parquet(pixels: Any, labels: Any, first: int) -> bytes:
    """A part as ingest lands it; message `first` and on, one record each."""
    rows = len(pixels)
    flat = pa.array(np.asarray(pixels, np.float32).reshape(-1))
    table = pa.table(
        {
            "pixels": pa.FixedSizeListArray.from_arrays(flat, 64),
            "ink": pa.array(np.asarray(pixels, np.float64).sum(axis=1)),
            "digit": pa.array(np.asarray(labels, np.int64)),
            "_sequence": pa.array(np.arange(first, first + rows)),
            "_index": pa.array(np.zeros(rows, np.int32)),
        }
    )
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def part(start: int, stop: int, *, position: int = 1, inverted: bool = False) -> tuple[Part, bytes]:
    """Digits `start` to `stop`; inverted ones are white on black."""
    pixels = PIXELS[start:stop]
    payload = parquet(INK_MAX - pixels if inverted else pixels, LABELS[start:stop], start + 1)
    digest = digest_of(payload)
    key = f"parts/default/digits/{digest}.parquet"
    found = Part(
        digest=digest, key=key, rows=stop - start, first_sequence=start + 1, position=position
    )
    return found, payload
