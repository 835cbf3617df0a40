"""A rewritten graph answers as the one that came; what cannot be rewritten is left as it is."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from services.inference import operators, rewriting, rewritings
from services.inference.models import OnnxModel, RunFailed, Unloadable
from services.inference.tests.graphs import (
    FLOATS,
    answers,
    model_of,
    node,
    numbers,
    operators_of,
    with_operators,
)

OPERATORS = pytest.mark.skipif(operators.library() is None, reason="leptonic_ops is not built here")
RUNS_AT_ONCE = 4


def stem(
    conv: dict[str, Any] | None = None, pool: dict[str, Any] | None = None
) -> list[onnx.NodeProto]:
    """x -> y; weights `w`, `b`."""
    return [
        node("Conv", "x w b", "convolved", **conv or {}),
        node("Relu", "convolved", "rectified"),
        node("MaxPool", "rectified", "pooled", **{"kernel_shape": [2, 2], **(pool or {})}),
        node("Flatten", "pooled", "y"),
    ]


def constants(made: int = 5, given: int = 1, size: int = 3) -> dict[str, Any]:
    return {"w": numbers(made, given, size, size), "b": numbers(made, seed=2)}


def check_same(model: onnx.ModelProto, rows: Any) -> Counter[str]:
    """Served, it answers as onnxruntime does. The operators that it is made of now."""
    graph = model.SerializeToString()
    served = OnnxModel("one", "", graph, batched=True)
    for given_back, expected in zip(
        served.run({"x": rows}).values(), answers(graph, rows), strict=True
    ):
        np.testing.assert_allclose(given_back, expected, rtol=1e-4, atol=1e-4)
    return operators_of(rewriting.rewritten("one", graph))


def around(size: int) -> st.SearchStrategy[int]:
    return st.integers(0, size - 1)


@st.composite
def windows(draw: st.DrawFn, size_max: int) -> dict[str, list[int]]:
    sizes = [draw(st.integers(1, size_max)) for _ in range(2)]
    strides = [draw(st.integers(1, 3)) for _ in range(2)]
    pads = [draw(around(size)) for size in sizes * 2]
    return {"kernel_shape": sizes, "strides": strides, "pads": pads}


@OPERATORS
@settings(max_examples=60, deadline=None)
@given(
    conv=windows(5), pool=windows(3), channels=st.integers(1, 4), made=st.integers(1, 40),
    sizes=st.tuples(st.integers(9, 40), st.integers(9, 40)), rows=st.integers(1, 3),
    has_bias=st.booleans(), has_relu=st.booleans(),
)  # fmt: skip
def test_a_stem_of_any_shape_answers_as_its_three_operators(
    conv: dict[str, list[int]],
    pool: dict[str, list[int]],
    channels: int,
    made: int,
    sizes: tuple[int, int],
    rows: int,
    has_bias: bool,
    has_relu: bool,
) -> None:
    nodes = stem(conv, pool)
    known = {"w": numbers(made, channels, *conv["kernel_shape"]), "b": numbers(made)}
    if not has_bias:
        nodes[0].input.pop()
        del known["b"]
    if not has_relu:
        del nodes[1]
        nodes[1].input[:] = ["convolved"]
    model = model_of(nodes, known, ["rows", channels, *sizes])
    assert check_same(model, numbers(rows, channels, *sizes)) == {"ConvPool": 1, "Flatten": 1}


@OPERATORS
def test_pools_after_each_other_and_a_transform_before_them() -> None:
    """As LeNet has them, and the platform's own graphs: bytes become numbers first."""
    nodes = [
        node("Mul", "x scale", "scaled"),
        node("Conv", "scaled w b", "a", pads=[2] * 4),
        node("Relu", "a", "c"),
        node("MaxPool", "c", "d", kernel_shape=[2, 2], strides=[2, 2]),
        node("Identity", "w2", "same"),
        node("Conv", "d same", "e"),
        node("MaxPool", "e", "f", kernel_shape=[2, 2], strides=[2, 2]),
        node("Flatten", "f", "y"),
    ]
    known = constants(6, 1, 5) | {
        "w2": numbers(16, 6, 5, 5),
        "scale": np.array([1 / 255], np.float32),
    }
    found = check_same(model_of(nodes, known, ["rows", 1, 28, 28]), numbers(3, 1, 28, 28))
    assert found["ConvPool"] == 2
    assert not found["Conv"] + found["MaxPool"]


@OPERATORS
@pytest.mark.parametrize("turned", [0, 1])
def test_a_product_behind_takes_the_channels_as_they_come(turned: int) -> None:
    nodes = [*stem(pool={"strides": [2, 2]})[:3], node("Flatten", "pooled", "flat")]
    nodes.append(node("Gemm", "flat w2 b2", "y", transB=turned))
    weights = numbers(9, 32 * 13 * 12) / 100
    known = constants(32) | {"w2": weights if turned else weights.T.copy(), "b2": numbers(9)}
    found = check_same(model_of(nodes, known, ["rows", 1, 28, 27]), numbers(5, 1, 28, 27))
    assert found["ConvPool"] == found["Gemm"] + found["Dense"] == found.total() / 2 == 1


@pytest.mark.parametrize(
    ("conv", "shape", "pixels"),
    [
        ({"pads": [1, 1, 1, 1]}, (2, 2), 4),
        ({"pads": [1, 1, 1, 1]}, (4, 4), 16),
        ({"pads": [0, 1, 2, 0], "strides": [2, 1]}, (4, 3), 4),
        ({}, (3, 3), 1),
    ],
)
def test_a_heavy_convolution_of_few_pixels_becomes_a_product(
    conv: dict[str, Any], shape: tuple[int, int], pixels: int
) -> None:
    nodes = [node("Conv", "x w b", "a", **conv), node("Relu", "a", "y")]
    known = {"w": numbers(256, 256, 3, 3) / 48, "b": numbers(256)}
    model = model_of(nodes, known, ["rows", 256, *shape])
    rows = numbers(3, 256, *shape)
    made = answers(model.SerializeToString(), rows)[0]
    assert made.shape[2] * made.shape[3] == pixels
    found = check_same(model, rows)
    assert found["Gemm"] + found["Dense"] == 1
    assert not found["Conv"]


@OPERATORS
def test_names_that_we_would_give_may_be_taken() -> None:
    nodes = [*stem()[:3], node("Add", "pooled pooled/weights", "y")]
    known = constants() | {"pooled/weights": numbers(1), "pooled/bias": numbers(1)}
    nodes.append(node("Mul", "y pooled/bias", "z"))
    found = check_same(model_of(nodes, known, ["rows", 1, 9, 9], ["z"]), numbers(2, 1, 9, 9))
    assert found["ConvPool"] == 1


def test_names_between_our_operators_may_be_taken() -> None:
    nodes = [node("Relu", "x", "c/1"), node("Conv", "c/1 w", "c"), node("Add", "c c/matrix", "y")]
    known = {"w": numbers(256, 256, 3, 3) / 48, "c/matrix": numbers(1)}
    found = check_same(model_of(nodes, known, ["rows", 256, 3, 3]), numbers(2, 256, 3, 3))
    assert not found["Conv"]


def test_nobody_keeps_the_weights_in_two_layouts() -> None:
    known = {"w": numbers(256, 256, 3, 3), "b": numbers(256)}
    graph = model_of([node("Conv", "x w b", "y")], known, ["rows", 256, 3, 3]).SerializeToString()
    smaller = rewriting.rewritten("one", graph)
    assert isinstance(smaller, bytes)
    assert len(smaller) < len(graph) + 4096


def convolved_twice() -> onnx.ModelProto:
    nodes = [*stem()[:3], node("Conv", "pooled w2", "y")]
    return model_of(nodes, constants() | {"w2": numbers(7, 5, 1, 1)}, ["rows", 1, 28, 28])


def seen_between() -> onnx.ModelProto:
    return model_of(stem(), constants(), ["rows", 1, 28, 28], ["y", "rectified"])


def with_indices() -> onnx.ModelProto:
    nodes = stem()
    nodes[2].output.append("where")
    nodes.append(helper.make_node("Cast", ["where"], ["z"], to=FLOATS))
    return model_of(nodes, constants(), ["rows", 1, 28, 28], ["y", "z"])


def with_weights_from_callers() -> onnx.ModelProto:
    model = model_of(stem(), constants(), ["rows", 1, 28, 28])
    model.graph.input.append(helper.make_tensor_value_info("w", FLOATS, [5, 1, 3, 3]))
    return model


def in_a_branch() -> onnx.ModelProto:
    then = helper.make_graph(
        [node("Flatten", "rectified", "inner")],
        "then",
        [],
        [helper.make_tensor_value_info("inner", FLOATS, None)],
    )
    nodes = [
        *stem()[:3],
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=then),
        node("Flatten", "pooled", "z"),
    ]
    known = constants() | {"yes": np.array(True)}
    return model_of(nodes, known, ["rows", 1, 28, 28], ["y", "z"])


def of_any_size() -> onnx.ModelProto:
    nodes = [node("Conv", "x w", "y", pads=[1] * 4)]
    return model_of(nodes, {"w": numbers(256, 256, 3, 3)}, ["rows", 256, "height", 4])


def of_many_pixels() -> onnx.ModelProto:
    nodes = [node("Conv", "x w", "y", pads=[1] * 4)]
    return model_of(nodes, {"w": numbers(256, 256, 3, 3)}, ["rows", 256, 7, 7])


def of_an_old_opset() -> onnx.ModelProto:
    return model_of(stem(), constants(), ["rows", 1, 28, 28], opset=11)


def of_strange_windows(conv: dict[str, Any], pool: dict[str, Any], groups: int = 1) -> Any:
    known = constants(5 * groups, 1, 3)
    return lambda: model_of(stem(conv, pool), known, ["rows", groups, 28, 28])


@pytest.mark.parametrize(
    "made",
    [
        convolved_twice,
        seen_between,
        with_indices,
        with_weights_from_callers,
        in_a_branch,
        of_any_size,
        of_many_pixels,
        of_an_old_opset,
        of_strange_windows({"auto_pad": "SAME_UPPER"}, {}),
        of_strange_windows({"dilations": [2, 2]}, {}),
        of_strange_windows({"group": 2}, {}, 2),
        of_strange_windows({}, {"ceil_mode": 1}),
        of_strange_windows({}, {"kernel_shape": [9, 9]}),
    ],
)
def test_what_is_not_for_us_is_left_as_it_is(made: Any) -> None:
    graph = made().SerializeToString()
    assert rewriting.rewritten("one", graph) is graph
    OnnxModel("one", "", graph, batched=True)


def test_weights_in_a_file_beside_the_graph_stay_there(tmp_path: Path) -> None:
    model = model_of(
        [node("Conv", "x w", "y")], {"w": numbers(256, 256, 3, 3)}, ["rows", 256, 3, 3]
    )
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights")
    assert rewriting.rewritten("one", path) is path
    assert OnnxModel("one", "", path, batched=True).signature.inputs[0].shape == [-1, 256, 3, 3]


def test_without_the_library_graphs_are_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operators, "EXTENSION", "leptonic_ops_of_nowhere")
    model = model_of(stem(), constants(), ["rows", 1, 28, 28])
    graph = model.SerializeToString()
    assert rewriting.rewritten("one", graph) is graph
    rows = numbers(2, 1, 28, 28)
    served = OnnxModel("one", "", graph, batched=True).run({"x": rows})["y"]
    np.testing.assert_array_equal(served, answers(graph, rows)[0])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_bytes_that_are_no_graph_are_for_onnxruntime_to_refuse(data: st.DataObject) -> None:
    graph = bytearray(model_of(stem(), constants(), ["rows", 1, 28, 28]).SerializeToString())
    for _ in range(data.draw(st.integers(1, 6))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    rewritings.applied("one", bytes(graph[: data.draw(st.integers(0, len(graph)))]))


@OPERATORS
def test_several_runners_of_one_model_are_in_nobodys_way() -> None:
    graph = model_of(stem(), constants(30), ["rows", 1, 28, 28]).SerializeToString()
    served = OnnxModel("one", "", graph, batched=True)
    rows = [numbers(1 + one, 1, 28, 28, seed=one) for one in range(RUNS_AT_ONCE)]
    expected = [answers(graph, one)[0] for one in rows]
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        runs = list(pool.map(lambda one: served.run({"x": one})["y"], rows * 50))
    for found, one in zip(runs, expected * 50, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-4)


@OPERATORS
def test_an_image_that_is_too_small_is_met_as_onnxruntime_meets_it() -> None:
    known = constants() | {"least": np.array([0] * 6 + [2, 2])}
    nodes = [node("Pad", "x least", "padded"), *stem()]
    nodes[1].input[0] = "padded"
    graph = model_of(nodes, known, ["rows", 1, "height", "width"]).SerializeToString()
    model = OnnxModel("one", "", graph, batched=True)
    for sizes, values in {(1, 1): 0, (1, 9): 0, (2, 2): 5}.items():
        rows = numbers(2, 1, *sizes)
        assert model.run({"x": rows})["y"].shape == answers(graph, rows)[0].shape == (2, values)
    with pytest.raises(RunFailed, match="smaller than the window"):
        model.run({"x": numbers(2, 1, 0, 0)})


def operator_alone(**changed: int) -> bytes:
    sizes = {
        f"{what}_{part}_{axis}": value
        for what in ("conv", "pool")
        for axis in "yx"
        for part, value in (("size", 1), ("stride", 1), ("before", 0), ("after", 0))
    }
    made = node(
        "ConvPool",
        "x w b",
        "y",
        domain="ai.leptonic",
        **{"channels": 5, "relu": 0, "flat": 0} | sizes | changed,
    )
    known = {"w": numbers(1, 1, 1, 16), "b": numbers(16)}
    model = model_of([made], known, ["rows", 1, 3, 3])
    model.opset_import.append(helper.make_opsetid("ai.leptonic", 1))
    return bytes(model.SerializeToString())


@OPERATORS
@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"conv_stride_y": 0}, "a window of no size"),
        ({"pool_before_x": 1}, "a pool that is too large"),
        ({"channels": 0}, "so many channels"),
        ({"flat": 1}, "no whole blocks"),
        ({"channels": 17}, "of another convolution"),
        ({"conv_size_x": 2}, "of another convolution"),
    ],
)
def test_a_graph_may_not_ask_our_operator_for_nonsense(changed: dict[str, int], why: str) -> None:
    graph = operator_alone(**changed)
    if not why:
        served = with_operators(graph)
        assert served.run({"x": numbers(2, 1, 3, 3)})["y"].shape == (2, 5, 3, 3)
        return
    with pytest.raises((Unloadable, RunFailed), match=why):
        with_operators(graph)
