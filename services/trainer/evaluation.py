"""Measures served graphs with onnxruntime, the candidate's and the champion's on the same rows."""

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort

from libs.contracts.artifacts import Signature, Tensor
from services.trainer.dataset import Split, indices_of, run, session_of
from services.trainer.export import CLASSES
from services.trainer.recipes import Recipe

DATATYPES = {
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(int64)": "INT64",
    "tensor(int32)": "INT32",
    "tensor(uint8)": "UINT8",
    "tensor(bool)": "BOOL",
    "tensor(string)": "BYTES",
}


class Served:
    """A served graph, ready to run."""

    def __init__(self, graph: bytes) -> None:
        self.session = session_of(graph)
        values = {one.name: one for one in onnx.load_from_string(graph).graph.initializer}
        self.classes: np.ndarray | None = (
            onnx.numpy_helper.to_array(values[CLASSES]) if CLASSES in values else None
        )

    def predicted(self, split: Split) -> np.ndarray:
        """Probabilities [rows, classes], or predictions [rows]."""
        return run(self.session, split.columns)[-1]

    def targets(self, split: Split) -> np.ndarray:
        if self.classes is None:
            return split.label.astype(np.float32)
        return indices_of(split.label, self.classes)

    def signature(self, columns: list[str]) -> Signature:
        """`columns`: the order of the inputs."""
        found = {one.name: tensor_of(one) for one in self.session.get_inputs()}
        return Signature(
            inputs=[found[name] for name in columns if name in found],
            outputs=[tensor_of(one) for one in self.session.get_outputs()],
        )


def tensor_of(one: ort.NodeArg) -> Tensor:
    sizes = [size if isinstance(size, int) else -1 for size in one.shape]
    return Tensor(one.name, DATATYPES[one.type], sizes)


def measure(served: Served, split: Split, recipe: Recipe) -> dict[str, float]:
    measured = recipe.metrics(served.predicted(split), served.targets(split))
    return {name: float(value) for name, value in measured.items()}


def comparable(candidate: Served, champion: Served) -> bool:
    """Whether both take the same columns and answer the same kind of question."""
    return describe(candidate.session) == describe(champion.session) and (
        candidate.classes is None
    ) == (champion.classes is None)


def describe(session: ort.InferenceSession) -> list[tuple[str, str, int]]:
    return sorted((one.name, one.type, len(one.shape)) for one in session.get_inputs())
