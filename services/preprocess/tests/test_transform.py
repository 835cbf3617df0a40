"""Each step's graph, run by onnxruntime, against a float64 reference written here from scratch.

Tolerances: float32 arithmetic on O(1..1000) numbers after one subtraction and one division is
within 1e-5 relative; what is computed in float64 and rounded once is within 1e-6.
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.contracts.pipeline import Field
from services.preprocess.steps import Steps
from services.preprocess.table import DTYPES, Column, Table, Unusable
from services.preprocess.transform import IR_VERSION, OPSET, compile_graph, fit

FLOAT32 = 1e-5
FLOAT64 = 1e-6
RANDOM = np.random.default_rng(0)


def table_of(columns: dict[str, Any], schema: dict[str, Field]) -> Table:
    found = {
        name: Column(np.asarray(values, DTYPES[schema[name].type]), np.ones(len(values), bool))
        for name, values in columns.items()
    }
    rows = len(next(iter(found.values())).valid)
    return Table(found, np.arange(rows), np.zeros(rows, np.int64))


def run(
    schema: dict[str, Field],
    steps: Steps,
    train: dict[str, Any],
    given: dict[str, Any] | None = None,
) -> Any:
    """Fits on `train`, applies the graph to `given`."""
    fitted = fit(table_of(train, schema), schema, steps)
    session = ort.InferenceSession(compile_graph(schema, fitted))
    inputs = table_of(given or train, schema).columns
    (features,) = session.run(["features"], {name: c.values for name, c in inputs.items()})
    assert features.dtype == np.float32
    return features


def close(features: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(features, expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(-(10**12), 10**12), min_size=2, max_size=20),
    st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=5),
)
def test_standardize_of_a_scalar(train: list[int], given: list[int]) -> None:
    """Of integers too large for float32, so the arithmetic has to be wider."""
    features = run(
        {"x": Field("int64")}, [{"standardize": {"columns": ["x"]}}], {"x": train}, {"x": given}
    )
    numbers = np.array(train, np.float64)
    std = np.sqrt(np.mean((numbers - np.mean(numbers)) ** 2))
    expected = (np.array(given, np.float64) - np.mean(numbers)) / (std if std > 0 else 1.0)
    close(features, expected[:, None], FLOAT64)


def test_standardize_of_a_vector_is_by_element_and_survives_a_constant_one() -> None:
    train = RANDOM.normal(5, 3, (50, 6)).astype(np.float32)
    train[:, 2] = 7
    given = RANDOM.normal(5, 3, (9, 6)).astype(np.float32)
    features = run({"x": Field("float32", [6])}, [{"standardize": {}}], {"x": train}, {"x": given})
    std = train.astype(np.float64).std(axis=0)
    std[2] = 1
    close(features, (given - train.mean(axis=0, dtype=np.float64)) / std, FLOAT32)


def test_standardize_of_an_image_is_by_channel_and_comes_out_channels_first() -> None:
    train = RANDOM.integers(0, 256, (20, 4, 5, 3), np.uint8)
    features = run({"x": Field("uint8", [4, 5, 3])}, [{"standardize": {}}], {"x": train})
    wide = train.astype(np.float64)
    expected = (wide - wide.mean((0, 1, 2))) / wide.std((0, 1, 2))
    close(features, expected.transpose(0, 3, 1, 2), FLOAT32)


def test_minmax() -> None:
    train, given = [3.0, -1.0, 7.0], [3.0, 11.0]
    features = run(
        {"x": Field("float64")}, [{"minmax": {"columns": ["x"]}}], {"x": train}, {"x": given}
    )
    close(features, [[0.5], [1.5]], FLOAT64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"min": 0, "max": 2}, [0, 1, 2]), ({"min": 0}, [0, 1, 5]), ({"max": 2}, [-3, 1, 2])],
)
@pytest.mark.parametrize("kind", ["int32", "float32", "float64"])
def test_clip(kind: str, options: dict[str, Any], expected: list[float]) -> None:
    features = run({"x": Field(kind)}, [{"clip": options}], {"x": [-3, 1, 5]})
    assert features[:, 0].tolist() == expected


def test_a_step_is_fitted_on_what_the_steps_before_it_left() -> None:
    steps: Steps = [{"clip": {"max": 10}}, {"minmax": {}}, {"standardize": {}}]
    train = RANDOM.normal(8, 3, 200)
    features = run({"x": Field("float64")}, steps, {"x": train})
    clipped = np.minimum(train, 10)
    scaled = (clipped - clipped.min()) / (clipped.max() - clipped.min())
    close(features[:, 0], (scaled - scaled.mean()) / scaled.std(), FLOAT64)


def test_one_hot_of_strings_knows_only_what_it_saw() -> None:
    given = {"x": ["b", "", "c", "é", "a"]}
    features = run({"x": Field("string")}, [{"one_hot": {}}], {"x": ["é", "a", "b", "a"]}, given)
    assert features.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("kind", ["int32", "int64", "uint8", "bool"])
def test_one_hot_of_integers(kind: str) -> None:
    steps: Steps = [{"one_hot": {"columns": ["x"]}}]
    features = run({"x": Field(kind)}, steps, {"x": [1, 0, 1]}, {"x": [0, 1]})
    assert features.tolist() == [[1, 0], [0, 1]]


def test_image_scale() -> None:
    images = RANDOM.integers(0, 256, (3, 4, 5, 2), np.uint8)
    options = {"columns": ["x"], "mean": [0.4, 0.5], "std": [0.2, 0.25]}
    features = run({"x": Field("uint8", [4, 5, 2])}, [{"image_scale": options}], {"x": images})
    expected = (images.astype(np.float64) / 255 - [0.4, 0.5]) / [0.2, 0.25]
    close(features, expected.transpose(0, 3, 1, 2), FLOAT32)
    plain = run({"x": Field("uint8", [4, 5, 2])}, [{"image_scale": {}}], {"x": images})
    close(plain, images.transpose(0, 3, 1, 2) / 255.0, FLOAT32)


def test_cast_runs_in_the_graph() -> None:
    schema = {"x": Field("string"), "y": Field("float64")}
    steps: Steps = [
        {"standardize": {"columns": ["x"]}},
        {"cast": {"columns": ["x"], "to": "float32"}},
        {"cast": {"columns": ["y"], "to": "int32"}},
    ]
    features = run(schema, steps, {"x": ["1.5", "2.5"], "y": [1.9, -1.9]})
    close(features, [[-1, 1], [1, -1]], FLOAT32)


def test_columns_lie_side_by_side_in_schema_order() -> None:
    schema = {
        "flag": Field("bool"),
        "city": Field("string"),
        "image": Field("uint8", [1, 2, 1]),
        "label": Field("int64", role="label"),
        "age": Field("int32"),
    }
    given = {
        "flag": [True, False],
        "city": ["x", "y"],
        "image": [[[[1], [2]]], [[[3], [4]]]],
        "age": [30, 40],
    }
    features = run(schema, [{"one_hot": {"columns": ["city"]}}], given)
    assert features.tolist() == [[1, 1, 0, 1, 2, 30], [0, 0, 1, 3, 4, 40]]


def test_the_graph_says_what_it_takes_and_is_the_same_every_time() -> None:
    schema = {"city": Field("string"), "pixels": Field("float32", [8, 8])}
    train = {"city": ["b", "a", "c"], "pixels": RANDOM.normal(size=(3, 8, 8))}
    steps: Steps = [{"one_hot": {}}, {"standardize": {}}]
    graphs = {compile_graph(schema, fit(table_of(train, schema), schema, steps)) for _ in range(3)}
    assert len(graphs) == 1
    model = onnx.load_from_string(graphs.pop())
    assert model.ir_version == IR_VERSION <= 10
    assert [(one.domain, one.version) for one in model.opset_import] == [("", OPSET)]
    session = ort.InferenceSession(model.SerializeToString())
    inputs = [(one.name, one.type, one.shape) for one in session.get_inputs()]
    assert inputs == [
        ("city", "tensor(string)", ["batch"]),
        ("pixels", "tensor(float)", ["batch", 8, 8]),
    ]
    (output,) = session.get_outputs()
    assert (output.name, output.shape) == ("features", ["batch", 67])


@pytest.mark.parametrize(
    ("field", "step", "problem"),
    [
        (Field("string"), {"standardize": {"columns": ["x"]}}, r"standardize\.columns: 'x' is str"),
        (Field("string"), {"split": {}}, r"schema\.x: is string: a model takes numbers"),
        (Field("float64"), {"one_hot": {"columns": ["x"]}}, "must be a scalar string, integer"),
        (Field("float64"), {"clip": {}}, "clip needs min or max"),
        (Field("float64"), {"clip": {"min": 2, "max": 1}}, "min 2.0 is above max 1.0"),
        (Field("float64"), {"clip": {"min": "low"}}, r"clip\.min: a number, got 'low'"),
        (Field("uint8", [2]), {"image_scale": {"columns": ["x"]}}, "not height, width, channels"),
        (Field("uint8", [1, 1, 1]), {"image_scale": {"std": 0}}, r"image_scale\.std: above 0"),
        (Field("uint8", [1, 1, 1]), {"image_scale": {"mean": [1, 2]}}, "2 numbers for 1 channels"),
    ],
)
def test_a_step_that_does_not_fit_its_column_is_refused_by_field(
    field: Field, step: dict[str, dict[str, Any]], problem: str
) -> None:
    value = "a" if field.type == "string" else np.ones(field.shape)
    with pytest.raises(Unusable, match=problem):
        run({"x": field}, [step], {"x": [value, value]})


def test_only_features_can_be_transformed() -> None:
    schema = {"x": Field("float64"), "y": Field("int64", role="label")}
    with pytest.raises(Unusable, match="'y' is not a feature"):
        run(schema, [{"standardize": {"columns": ["y"]}}], {"x": [1.0], "y": [1]})
