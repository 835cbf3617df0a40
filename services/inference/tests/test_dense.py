"""Products on tile registers answer as float32 does, to 2^-16 of what is summed; the rest stays."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from services.inference import dense, operators, rewriting
from services.inference.models import OnnxModel, RunFailed, Unloadable
from services.inference.tests.graphs import (
    answers,
    model_of,
    node,
    numbers,
    operators_of,
    with_operators,
)

TILES = pytest.mark.skipif(not operators.have_tiles(), reason="no tile registers here (AMX)")
FLOAT_MAX = np.finfo(np.float32).max
"""The bfloat16 next to it is infinity."""
LOST = 2.0**-16
"""Of the sum of all products without their signs."""


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "WEIGHTS_BYTES_MIN", 0)
    monkeypatch.setattr(rewriting, "HEAVY_BYTES_MIN", 0)


def layer(inputs: int, outputs: int, relu: bool = False, **said: Any) -> onnx.ModelProto:
    """x -> y, with weights `w`, `b`."""
    nodes = [node("Gemm", "x w b", "y", **said)]
    if relu:
        nodes = [node("Gemm", "x w b", "sums", **said), node("Relu", "sums", "y")]
    weights = numbers(inputs, outputs)
    known = {"w": weights.T.copy() if said.get("transB") else weights, "b": numbers(outputs)}
    return model_of(nodes, known, ["rows", inputs])


def check_near(model: onnx.ModelProto, rows: Any, weights: Any) -> Counter[str]:
    """Of the model as it is served: its operators."""
    graph = model.SerializeToString()
    served = OnnxModel("one", "", graph, batched=True).run({"x": rows})["y"]
    expected = answers(graph, rows)[0]
    assert served.shape == expected.shape
    room = LOST * (np.abs(rows) @ np.abs(weights)) + 1e-6
    assert (np.abs(served - expected) <= room).all()
    return operators_of(rewriting.rewritten("one", graph))


@TILES
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    inputs=st.integers(1, 400),
    outputs=st.integers(1, 100),
    relu=st.booleans(),
    turned=st.booleans(),
)
def test_a_layer_of_any_size_answers_as_in_float32(
    rows: int, inputs: int, outputs: int, relu: bool, turned: bool
) -> None:
    model = layer(inputs, outputs, relu, transB=int(turned))
    found = check_near(model, numbers(rows, inputs, seed=3), numbers(inputs, outputs))
    assert found == {"Dense": 1}


@TILES
def test_more_rows_than_are_taken_at_once_and_more_dimensions() -> None:
    nodes = [node("MatMul", "x w", "sums"), node("Add", "b sums", "y")]
    weights = numbers(40, 33)
    model = model_of(nodes, {"w": weights, "b": numbers(33)}, ["rows", 7, 40])
    assert check_near(model, numbers(100, 7, 40), weights) == {"Dense": 1}


@TILES
def test_a_rows_infinity_or_nan_is_its_own() -> None:
    graph = layer(100, 20).SerializeToString()
    rows = numbers(40, 100)
    for row, value in {3: np.inf, 17: -np.inf, 18: np.nan, 38: FLOAT_MAX, 39: 3e38}.items():
        rows[row, 50] = value
    served = OnnxModel("one", "", graph, batched=True).run({"x": rows})["y"]
    expected = answers(graph, rows)[0]
    plain = [row for row in range(40) if row not in (3, 17, 18, 38, 39)]
    np.testing.assert_allclose(served[plain], expected[plain], rtol=1e-3, atol=1e-3)
    for row in (3, 17, 18):
        np.testing.assert_array_equal(served[row], expected[row])
    np.testing.assert_allclose(served[38:], expected[38:], rtol=1e-4)


@TILES
@pytest.mark.parametrize("said", [{"alpha": 0.5}, {"beta": 2.0}])
def test_other_products_stay_in_float32(said: dict[str, Any]) -> None:
    graph = layer(100, 20, **said).SerializeToString()
    assert rewriting.rewritten("one", graph) is graph


@TILES
def test_weights_that_are_no_numbers_or_few_stay_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = layer(100, 20)
    endless = numbers(100, 20)
    endless[7, 7] = np.inf
    model.graph.initializer[0].raw_data = endless.tobytes()
    graph = model.SerializeToString()
    assert rewriting.rewritten("one", graph) is graph
    monkeypatch.setattr(dense, "WEIGHTS_BYTES_MIN", 100 * 20 * 4 + 1)
    graph = layer(100, 20).SerializeToString()
    assert rewriting.rewritten("one", graph) is graph


def test_without_the_library_graphs_stay_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "EXTENSION", "leptonic_ops_of_nowhere")
    assert not operators.have_tiles()
    graph = layer(100, 20).SerializeToString()
    assert rewriting.rewritten("one", graph) is graph


def operator_alone(weights: Any, shape: list[Any], **said: int) -> bytes:
    made = node("Dense", "x w b", "y", domain=operators.DOMAIN, **{"relu": 0} | said)
    model = model_of([made], {"w": weights, "b": numbers(20)}, shape)
    model.opset_import.append(helper.make_opsetid(operators.DOMAIN, 1))
    return bytes(model.SerializeToString())


@TILES
@pytest.mark.parametrize(
    ("said", "length", "why"),
    [
        ({"given": 50, "made": 20}, 50, ""),
        ({"given": 50, "made": 20}, 51, "rows are of another length"),
        ({"given": 64, "made": 33}, 64, "of another matrix"),
        ({"given": 0, "made": 20}, 50, "a matrix has rows and columns"),
    ],
)
def test_a_graph_may_not_ask_our_operator_for_nonsense(
    said: dict[str, int], length: int, why: str
) -> None:
    weights = operators.packed(numbers(50, 20))
    graph = operator_alone(weights, ["rows", length], **said)
    if not why:
        rows = numbers(3, 50)
        served = with_operators(graph).run({"x": rows})["y"]
        np.testing.assert_allclose(
            served, rows @ numbers(50, 20) + numbers(20), rtol=1e-3, atol=1e-3
        )
        return
    with pytest.raises((Unloadable, RunFailed), match=why):
        with_operators(graph)
