"""A version answers the samples of its `model_warmup` before it is served, or is not served."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from libs.contracts.artifacts import Signature, Tensor
from services.inference import layout, loading, modelconfig
from services.inference.modelconfig import Misconfigured
from services.inference.models import RunFailed, Unloadable
from services.inference.tensors import Arrays
from services.inference.tests.desk import Own, counter, running_sum
from services.inference.tests.test_models import graph
from services.inference.warmup import RUNS_MAX, warm_up

CONFIG = """
name: "m" max_batch_size: 4
input { name: "x" data_type: TYPE_%s dims: [3] }
output { name: "y" data_type: TYPE_%s dims: [3] }
model_warmup { name: "w" %s }
"""
INPUT = 'inputs { key: "x" value { data_type: TYPE_%s dims: [3] %s } }'


def warmed(folder: Path, datatype: str, how: str, more: str = "") -> list[Arrays]:
    """What the model was asked."""
    seen: list[Arrays] = []

    def keep(inputs: Arrays) -> Arrays:
        seen.append(inputs)
        return {"y": inputs["x"]}

    name = "STRING" if datatype == "BYTES" else datatype
    sample = INPUT % (name, how) + more
    config = modelconfig.parse(CONFIG % (name, name, sample), "config.pbtxt")
    signature = Signature([Tensor("x", datatype, [-1, 3])], [Tensor("y", datatype, [-1, 3])])
    warm_up(Own(signature, keep), config, folder)
    return seen


@pytest.mark.parametrize("datatype", ["BOOL", "INT64", "FP16", "FP32", "BF16"])
def test_zeros_and_numbers_from_0_to_1(tmp_path: Path, datatype: str) -> None:
    (zeros,) = warmed(tmp_path, datatype, "zero_data: true")
    assert zeros["x"].tolist() == [[0, 0, 0]]
    (drawn,) = warmed(tmp_path, datatype, "random_data: true")
    one = 0x3F80 if datatype == "BF16" else 1
    assert ((drawn["x"] >= 0) & (drawn["x"] <= one)).all()
    assert drawn["x"].any()


def test_texts_are_empty(tmp_path: Path) -> None:
    for how in ("zero_data: true", "random_data: true"):
        (given,) = warmed(tmp_path, "BYTES", how)
        assert given["x"].tolist() == [[b"", b"", b""]]


def test_a_row_from_a_file_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "row").write_bytes(np.array([1, 2, 3], "<f4").tobytes())
    found = warmed(tmp_path, "FP32", 'input_data_file: "row"', "batch_size: 2 count: 3")
    assert [one["x"].tolist() for one in found] == [[[1, 2, 3], [1, 2, 3]]] * 3


@pytest.mark.parametrize(
    ("how", "more", "said"),
    [
        ("", "", "input 'x' says none of zero_data, random_data and input_data_file"),
        ("zero_data: true", "batch_size: 5", "batch_size 5, and max_batch_size is 4"),
        ("zero_data: true", f"count: {RUNS_MAX + 1}", "count 1001: at most 1000 are run"),
        ("zero_data: true dims: [0]", "", r"dims \[3, 0\] must be at least 1"),
        ("zero_data: true dims: [1000000000]", "", "more than a request may hold"),
        ("zero_data: true dims: [2]", "", r"unexpected shape for input 'x'"),
        ('input_data_file: "none"', "", "warmup/none: No such file"),
        ('input_data_file: "../secret"', "", "leads out of the model's folder"),
        ('input_data_file: "short"', "", "Expected 12, got 4"),
        ("zero_data: true", INPUT.replace('"x"', '"z"') % ("FP32", "zero_data: true"), "input 'z'"),
    ],
)
def test_what_is_no_request_is_named(tmp_path: Path, how: str, more: str, said: str) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "short").write_bytes(b"four")
    with pytest.raises(Misconfigured, match=f"model_warmup 'w': .*{said}"):
        warmed(tmp_path, "FP32", how, more)


def test_what_the_server_alone_sends_is_zero() -> None:
    config = modelconfig.parse(
        """name: "sum" max_batch_size: 8
        input { name: "x" data_type: TYPE_INT32 dims: [1] }
        model_warmup { name: "w" batch_size: 2
          inputs { key: "x" value { data_type: TYPE_INT32 dims: [1] random_data: true } } }""",
        "config.pbtxt",
    )
    model = running_sum()
    told: list[Arrays] = []
    model.function = told.append
    model.signature.inputs.append(Tensor("before", "INT32", [-1, 1]))
    warm_up(model, config, Path())
    assert [one["before"].tolist() for one in told] == [[[0], [0]]]


def test_a_decoupled_model_gives_all_its_answers() -> None:
    config = modelconfig.parse(
        """name: "counter" input { name: "x" data_type: TYPE_INT32 dims: [1] }
        model_warmup { name: "w"
          inputs { key: "x" value { data_type: TYPE_INT32 dims: [1] zero_data: true } } }""",
        "config.pbtxt",
    )
    model = counter()
    told: list[Arrays] = []

    def answers(inputs: Arrays) -> Iterator[Arrays]:
        for _ in range(3):
            told.append(inputs)
            yield {"y": inputs["x"]}

    model.function = answers
    warm_up(model, config, Path())
    assert [one["x"].tolist() for one in told] == [[0]] * 3


def test_a_model_that_fails_is_not_loaded(tmp_path: Path) -> None:
    def fails(_: Arrays) -> Arrays:
        raise RunFailed("it cannot")

    config = modelconfig.parse(
        CONFIG % ("FP32", "FP32", INPUT % ("FP32", "zero_data: true")), "config.pbtxt"
    )
    model = Own(Signature([Tensor("x", "FP32", [-1, 3])], [Tensor("y", "FP32", [-1, 3])]), fails)
    with pytest.raises(Unloadable, match="model_warmup 'w': it cannot"):
        warm_up(model, config, tmp_path)


def test_a_folder_is_served_only_after_its_warm_up(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "1").mkdir(parents=True)
    (folder / "warmup").mkdir()
    (folder / "1" / "model.onnx").write_bytes(graph("Identity", "FP32", ["rows", 2]))
    (folder / "config.pbtxt").write_text(
        'name: "m" max_batch_size: 4 model_warmup { name: "w" inputs { key: "x" value '
        '{ data_type: TYPE_FP32 dims: [2] input_data_file: "row" } } }'
    )
    plan = layout.read(layout.at_folder(folder))
    (folder / "warmup" / "row").write_bytes(b"short")
    with pytest.raises(Misconfigured, match=r"model_warmup 'w': .*Expected 8, got 5"):
        loading.build(plan, plan.versions[0])
    (folder / "warmup" / "row").write_bytes(b"two sums")
    loading.build(plan, plan.versions[0]).model.close()
