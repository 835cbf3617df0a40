"""The bench's models, opened the same way in every peer's own environment: one thread each."""

import os
from pathlib import Path

import numpy as np
import onnxruntime

PORT = int(os.environ.get("BENCH_PORT", "0"))
NAMES = os.environ.get("BENCH_NAMES", "").split(",")
ROWS_MAX = 64
"""Rows of a batch, for every server that makes batches."""
WAIT_MAX_S = 0.001
"""How long a peer may wait for a batch to fill, where it insists on a time."""


class Opened:
    """float32 `features` -> float32 `scores`."""

    def __init__(self, name: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = Path(os.environ["BENCH_MODELS"]) / f"{name}.onnx"
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.shape = self.session.get_inputs()[0].shape[1:]
        self.scores_shape = self.session.get_outputs()[0].shape[1:]

    def run(self, features: np.ndarray) -> np.ndarray:
        return self.session.run(["scores"], {"features": features})[0]
