"""BentoML with adaptive batching, HTTP and JSON."""

import bentoml
import numpy as np
from models import NAMES, ROWS_MAX, Opened


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
class Onnx:
    def __init__(self) -> None:
        self.opened = Opened(NAMES[0])

    @bentoml.api(batchable=True, max_batch_size=ROWS_MAX, max_latency_ms=1000)
    def predict(self, features: np.ndarray) -> np.ndarray:
        return self.opened.run(features.astype(np.float32))
