"""The served graph: raw columns in, labels or predictions out, the same bytes every time."""

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from torch import nn

from libs.contracts.pipeline import Field
from services.trainer.dataset import Split, array_of, classes_of, features_of, indices_of
from services.trainer.domain import Unusable
from services.trainer.evaluation import Served, comparable
from services.trainer.export import check_same, served_graph
from services.trainer.tests.conftest import transform_of

COLUMNS = ["pixels"]


def split_of(rows: int, label: list[float] | None = None) -> Split:
    values = np.random.default_rng(3).random((rows, 4), np.float32)
    return Split({"pixels": values}, np.array(label if label else np.arange(rows) % 3))


def module_of(outputs: int) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, outputs))


def test_a_classifier_answers_with_the_datasets_own_labels() -> None:
    transform, module, split = transform_of("pixels", [4], 2.0), module_of(3), split_of(9)
    classes = np.array([-7, 5, 90])
    graph = served_graph(transform, module, features_of(transform, split), classes)
    served = Served(graph)
    label, probabilities = served.session.run(None, split.columns)
    expected = torch.softmax(module(torch.from_numpy(split.columns["pixels"] / 2)), 1)
    np.testing.assert_allclose(probabilities, expected.detach().numpy(), rtol=1e-5)
    assert label.tolist() == classes[probabilities.argmax(1)].tolist()
    signature = served.signature(COLUMNS)
    assert [(t.name, t.datatype, t.shape) for t in signature.inputs + signature.outputs] == [
        ("pixels", "FP32", [-1, 4]),
        ("label", "INT64", [-1]),
        ("probabilities", "FP32", [-1, 3]),
    ]


def test_regression_answers_with_one_number_a_row() -> None:
    transform, module, split = transform_of("pixels", [4], 2.0), module_of(1), split_of(5)
    served = Served(served_graph(transform, module, features_of(transform, split), None))
    (prediction,) = served.session.run(None, split.columns)
    assert prediction.shape == (5,)
    features = features_of(transform, split)
    check_same(module, features, prediction, classes=False)
    with pytest.raises(Unusable, match="exported graph"):
        check_same(module, features, prediction + 1, classes=False)


def test_the_graph_says_nothing_of_where_it_was_made() -> None:
    transform = transform_of("pixels", [4], 2.0)
    example = features_of(transform, split_of(4))
    first, second = (served_graph(transform, module_of(2), example, None) for _ in range(2))
    assert first == second
    model = onnx.load_from_string(first)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert b"site-packages" not in first


def test_graphs_of_other_columns_are_not_compared() -> None:
    def served(column: str, classes: np.ndarray | None) -> Served:
        example = np.ones((2, 4), np.float32)
        graph = served_graph(transform_of(column, [4], 1.0), module_of(3), example, classes)
        return Served(graph)

    one = served("pixels", np.arange(3))
    assert comparable(one, served("pixels", np.array([4, 5, 6])))
    assert not comparable(one, served("points", np.arange(3)))
    assert not comparable(one, served("pixels", None))


def test_labels_never_seen_in_training_are_nobodys() -> None:
    classes = classes_of(np.array([9, 3, 3, -1], np.int32))
    assert classes.tolist() == [-1, 3, 9]
    assert indices_of(np.array([3, 9, 4, -1, 100]), classes).tolist() == [1, 2, -1, 0, -1]
    with pytest.raises(Unusable, match="integer or bool"):
        classes_of(np.array([0.5, 1.0]))


def test_columns_take_the_shape_of_one_record() -> None:
    image = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(24, dtype=np.uint8)), 12)
    array = array_of("image", pa.chunked_array([image]), Field("uint8", [2, 2, 3]))
    assert array.shape == (2, 2, 2, 3)
    assert array[1, 0, 1].tolist() == [15, 16, 17]
    with pytest.raises(Unusable, match=r"schema.age: 1 of 2 rows are null: add drop_nulls"):
        array_of("age", pa.chunked_array([[1.0, None]]), Field("float64"))


def test_features_that_are_no_numbers_are_refused() -> None:
    split = Split({"pixels": np.array([[1, 2], [np.inf, 0]], np.float32)}, np.arange(2))
    with pytest.raises(Unusable, match="1 of 2 rows have a feature that is no number"):
        features_of(transform_of("pixels", [2], 1.0), split)
