"""Module -> ONNX, joined with the dataset's transform into the one graph that is served.

The TorchScript exporter is used on purpose: measured on torch 2.13, the first export of a process
takes 0.28 s and the next ones 4 ms, against 8.3 s and 1.0 s for the dynamo exporter, which is more
than a whole small training run. What the trace might have got wrong is caught here: the joined
graph must give what the module gives, on a batch of another size.
"""

import io
import warnings

import numpy as np
import onnx
import onnx.compose
import onnx.helper
import onnx.numpy_helper
import onnx.version_converter
import torch
from onnx import TensorProto
from torch import nn

from services.trainer.domain import Unusable

OPSET_MAX = 20
"""The TorchScript exporter's last."""
PREFIX = "module/"
SCORES = "scores"
CLASSES = "label_values"
"""The initializer that holds a classifier's label values, in the order of its probabilities."""
TOLERANCE = 1e-3


def served_graph(
    transform: bytes, module: nn.Module, example: np.ndarray, classes: np.ndarray | None
) -> bytes:
    """Raw feature columns -> `label` and `probabilities`, or `prediction` without classes.

    `example` are some rows of features, at least two.
    """
    first = onnx.load_from_string(transform)
    features = first.graph.output[0].name
    opset = opset_of(first)
    second = exported(module, torch.from_numpy(example[:2]), min(opset, OPSET_MAX))
    if opset != opset_of(second):
        second = onnx.version_converter.convert_version(second, opset)
    first.ir_version = second.ir_version = max(first.ir_version, second.ir_version)
    joined = onnx.compose.merge_models(
        first, second, io_map=[(features, "features")], prefix2=PREFIX
    )
    put_head(joined.graph, classes)
    strip(joined)
    onnx.checker.check_model(joined)
    return joined.SerializeToString(deterministic=True)


def exported(module: nn.Module, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    module.eval()
    written = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example,),
            written,  # type: ignore[arg-type]
            dynamo=False,
            input_names=["features"],
            output_names=[SCORES],
            dynamic_axes={"features": {0: "batch"}, SCORES: {0: "batch"}},
            opset_version=opset,
        )
    return onnx.load_from_string(written.getvalue())


def opset_of(model: onnx.ModelProto) -> int:
    return next(int(one.version) for one in model.opset_import if one.domain in ("", "ai.onnx"))


def put_head(graph: onnx.GraphProto, classes: np.ndarray | None) -> None:
    """Scores -> what is served."""
    scores = PREFIX + SCORES
    del graph.output[:]
    if classes is None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "one_dimension"))
        graph.node.append(
            onnx.helper.make_node("Reshape", [scores, "one_dimension"], ["prediction"])
        )
        graph.output.append(vector("prediction", TensorProto.FLOAT))
        return
    graph.initializer.append(onnx.numpy_helper.from_array(classes, CLASSES))
    graph.node.extend(
        [
            onnx.helper.make_node("Softmax", [scores], ["probabilities"], axis=1),
            onnx.helper.make_node("ArgMax", ["probabilities"], ["index"], axis=1, keepdims=0),
            onnx.helper.make_node("Gather", [CLASSES, "index"], ["label"], axis=0),
        ]
    )
    graph.output.append(vector("label", TensorProto.INT64))
    graph.output.append(vector("probabilities", TensorProto.FLOAT, len(classes)))


def vector(name: str, element: int, *sizes: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, element, ["batch", *sizes])


def strip(model: onnx.ModelProto) -> None:
    """Takes out what says where and how the graph was made, not what it computes."""
    model.producer_name = "leptonic"
    model.graph.name = "served"
    del model.graph.value_info[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for holder in (model, model.graph, *model.graph.node):
        holder.ClearField("doc_string")
    model.ClearField("producer_version")
    for node in model.graph.node:
        del node.metadata_props[:]


def check_same(module: nn.Module, features: np.ndarray, served: np.ndarray, classes: bool) -> None:
    """Raises `Unusable` when the graph computes something else than the module."""
    module.eval()
    with torch.no_grad():
        outputs = module(torch.from_numpy(features))
    expected = (torch.softmax(outputs, 1) if classes else outputs[:, 0]).numpy()
    if expected.shape != served.shape or not np.allclose(expected, served, TOLERANCE, TOLERANCE):
        raise Unusable(
            f"$.train.recipe: the exported graph gives {list(served.shape)} other values than the "
            "module; does it branch on its input's values or size?"
        )
