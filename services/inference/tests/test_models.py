"""An ONNX graph in this process: every datatype, its own signature, errors, and no memory kept."""

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from libs.contracts.artifacts import Signature, Tensor
from services.inference.models import OnnxModel, RunFailed, Unloadable
from services.inference.tensors import DTYPES

ELEMENTS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}
CYCLES = 100
GROWTH_BYTES_MAX = 24 << 20
"""Of 100 loads of 8 MiB of weights."""


def graph(op: str, datatype: str, shape: list[Any], **attributes: Any) -> bytes:
    """`op` from `x` to `y`."""
    kind = ELEMENTS[datatype]
    made = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], **attributes)],
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape if op == "Identity" else None)],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def heavy() -> bytes:
    """8 MiB of weights."""
    weights = np.ones((1024, 2048), np.float32)
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2048])],
        [helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.tobytes(), raw=True)],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def quantised(weights: Any, scale: float) -> bytes:
    """`x @ (weights * scale)` with int8 weights, and 8 bits of `x` as it comes."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["bytes", "step", "zero"]),
        helper.make_node("MatMulInteger", ["bytes", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["step", "scale"], ["unit"]),
        helper.make_node("Mul", ["floats", "unit"], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weights.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", weights.shape[1]])],
        [
            helper.make_tensor("w", TensorProto.INT8, weights.shape, weights.tobytes(), raw=True),
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def row_of(datatype: str) -> Any:
    if datatype == "BYTES":
        return np.array([["a", "é\0b"]], object)
    return np.array([[0, 1]], DTYPES[datatype])


@pytest.mark.parametrize("datatype", ELEMENTS)
def test_every_datatype_goes_in_and_comes_out(datatype: str) -> None:
    model = OnnxModel("same", "", graph("Identity", datatype, ["rows", 2]), batched=True)
    given = row_of(datatype)
    given_back = model.run({"x": given})["y"]
    assert given_back.dtype == given.dtype
    assert given_back.tolist() == given.tolist()
    assert model.signature.inputs == [Tensor("x", datatype, [-1, 2])]


def test_a_graph_with_int8_in_it_answers_nearly_as_its_floats() -> None:
    random = np.random.default_rng(1)
    weights = random.integers(-127, 128, (64, 10)).astype(np.int8)
    rows = random.random((5, 64), np.float32)
    model = OnnxModel("int8", "", quantised(weights, 0.01), batched=True)
    assert model.signature.inputs == [Tensor("x", "FP32", [-1, 64])]
    exact = rows @ (weights.astype(np.float32) * np.float32(0.01))
    assert np.abs(model.run({"x": rows})["y"] - exact).max() < 0.02 * np.abs(exact).max()


def test_bf16_rows_outlive_the_run_that_made_them() -> None:
    model = OnnxModel("same", "", graph("Identity", "BF16", ["rows", 2]), batched=True)
    first = model.run({"x": np.array([[1, 2]], "<u2")})["y"]
    model.run({"x": np.array([[3, 4]], "<u2")})
    assert first.tolist() == [[1, 2]]


def test_a_signature_is_the_graphs_own_unless_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph("Identity", "FP32", [2, "more", 3]))
    model = OnnxModel("own", "", path, batched=False)
    assert model.signature == Signature(
        [Tensor("x", "FP32", [2, -1, 3])], [Tensor("y", "FP32", [2, -1, 3])]
    )
    assert model.run({"x": np.ones((2, 5, 3), np.float32)})["y"].shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("shape", "promised", "why"),
    [
        ([2, 2], None, "the first dimension must be open"),
        (["rows"], Signature([Tensor("z", "FP32", [-1])], []), "differ in x, z"),
        (["rows"], Signature([Tensor("x", "FP64", [-1])], []), "'x' is FP32 in the graph, FP64"),
        (["rows"], Signature([Tensor("x", "FP32", [-1])], [Tensor("w", "FP32", [-1])]), "in w"),
    ],
)
def test_a_graph_that_breaks_its_promise_is_not_loaded(
    shape: list[Any], promised: Signature | None, why: str
) -> None:
    with pytest.raises(Unloadable, match=why):
        OnnxModel("bad", "", graph("Identity", "FP32", shape), batched=True, signature=promised)


def test_what_is_no_graph_is_not_loaded() -> None:
    with pytest.raises(Unloadable, match="failed to load 'bad'"):
        OnnxModel("bad", "", b"rubbish", batched=True)


def test_a_graph_with_somebody_elses_ops_is_not_loaded_here() -> None:
    with pytest.raises(Unloadable, match=r"domain 'their\.domain'"):
        OnnxModel("ops", "", graph("Op", "FP32", ["rows"], domain="their.domain"), batched=True)


def test_a_graph_that_raises_fails_its_run_only() -> None:
    """In ONNX 7 rows do not reshape to 2 columns."""
    kind = TensorProto.FLOAT
    made = helper.make_graph(
        [helper.make_node("Reshape", ["x", "to"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", kind, ["rows", 2])],
        [helper.make_tensor_value_info("y", kind, ["rows", 2])],
        [helper.make_tensor("to", TensorProto.INT64, [2], [1, 2])],
    )
    built = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = OnnxModel("one", "", built.SerializeToString(), batched=True)
    with pytest.raises(RunFailed, match=r"model one: .*Reshape"):
        model.run({"x": np.ones((7, 2), np.float32)})
    assert model.run({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[1, 1]]


def resident_bytes() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of what other tests left
        gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def used(built: bytes) -> OnnxModel:
    model = OnnxModel("heavy", "", built, batched=True)
    model.run({"x": np.ones((1, 1024), np.float32)})
    model.close()
    return model


def test_100_loads_leave_the_memory_as_it_was() -> None:
    """Whoever still holds the closed model."""
    built = heavy()
    closed = [used(built)]
    before = resident_bytes()
    closed += [used(built) for _ in range(CYCLES)]
    assert resident_bytes() - before < GROWTH_BYTES_MAX
