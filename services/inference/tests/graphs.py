"""Small graphs with random weights, and what onnxruntime alone makes of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from services.inference import operators
from services.inference.models import OnnxModel

FLOATS = TensorProto.FLOAT


def numbers(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def node(operator: str, given: str, gives: str, /, **said: Any) -> onnx.NodeProto:
    return helper.make_node(operator, given.split(), gives.split(), **said)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any],
    shape: Sequence[Any],
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
) -> onnx.ModelProto:
    """From `x` of this shape."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", FLOATS, shape)],
        [helper.make_tensor_value_info(name, FLOATS, None) for name in outputs],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def operators_of(graph: bytes | Path) -> Counter[str]:
    """Of a graph that was rewritten."""
    assert isinstance(graph, bytes)
    return Counter(one.op_type for one in onnx.ModelProto.FromString(graph).graph.node)


def with_operators(graph: bytes) -> OnnxModel:
    """A graph that names operators of ours itself."""
    library = operators.library()
    assert library is not None
    return OnnxModel("one", "", graph, batched=True, libraries=[library])


def answers(graph: bytes, rows: Any) -> list[Any]:
    """Of onnxruntime alone."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": rows}))
