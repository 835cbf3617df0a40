"""A folder of Triton's Python backend is served as it is; what is somebody's code runs apart."""

import textwrap
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from libs.doors import Internal, Unavailable
from services.inference import layout, loading, python_front
from services.inference.calls import Call
from services.inference.endpoints import Endpoints
from services.inference.isolated import Isolated
from services.inference.models import Unloadable
from services.inference.notes import Notes
from services.inference.repository import Repository
from services.inference.served import Rates
from services.inference.tensors import Given
from services.inference.tests.test_models import graph

CONFIG = """
backend: "python"
max_batch_size: {rows_max}
input [ {{ name: "x", data_type: TYPE_FP32, dims: [2] }} ]
output [ {{ name: "y", data_type: TYPE_FP32, dims: [2] }} ]
parameters {{ key: "factor", value: {{ string_value: "{factor}" }} }}
"""
CODE = """
    import ctypes, json
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def initialize(self, args):
            config = json.loads(args["model_config"])
            self.factor = float(config["parameters"]["factor"]["string_value"])
            assert config["max_batch_size"] in (0, 8)
            assert config["input"][0]["dims"] == [2]
            assert pb_utils.get_output_config_by_name(config, "y")["data_type"] == "TYPE_FP32"
            assert not pb_utils.using_decoupled_model_transaction_policy(config)

        def execute(self, requests):
            answers = []
            for request in requests:
                x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
                if x.min() < -1:
                    ctypes.string_at(0)
                if x.min() < 0:
                    error = pb_utils.TritonError("negative")
                    answers.append(pb_utils.InferenceResponse(error=error))
                else:
                    tensor = pb_utils.Tensor("y", (x * self.factor).astype("f4"))
                    answers.append(pb_utils.InferenceResponse([tensor]))
            return answers
"""


def put(root: Path, factor: int, version: int = 1, rows_max: int = 8) -> Path:
    folder = root / "scale"
    (folder / str(version)).mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG.format(factor=factor, rows_max=rows_max))
    (folder / str(version) / "model.py").write_text(textwrap.dedent(CODE))
    return folder


@pytest.fixture
async def endpoints() -> AsyncIterator[Endpoints]:
    front = python_front.PythonFront(lambda call: None, [])
    made = Endpoints(front, Notes(None, "test", Rates(0, 0)), "default")
    yield made
    await made.close()


async def ask(endpoints: Endpoints, shape: list[int], *values: float) -> list[float]:
    given = [Given("x", "FP32", shape, values=values)]
    answer = await endpoints.infer(Call("scale", "", "", given, [], 0, ""))
    ((_, array),) = answer.outputs
    return [float(one) for one in array.flat]


@pytest.mark.parametrize(("rows_max", "shape"), [(8, [1, 2]), (0, [2])])
async def test_tritons_folder_is_served_as_it_is(
    tmp_path: Path, endpoints: Endpoints, rows_max: int, shape: list[int]
) -> None:
    put(tmp_path, factor=3, rows_max=rows_max)
    await Repository(tmp_path, "none", endpoints).start([])
    assert await ask(endpoints, shape, 1, 2) == [3, 6]
    with pytest.raises(Internal, match="negative"):
        await ask(endpoints, shape, -1, 2)
    with pytest.raises(Unavailable, match=r"died of signal 11 \(SIGSEGV\)"):
        await ask(endpoints, shape, -2, 2)
    assert await ask(endpoints, shape, 2, 2) == [6, 6]


def test_a_library_of_ops_is_loaded_in_a_worker_only(tmp_path: Path) -> None:
    """Of one that is not there, it is the worker that says so."""
    folder = tmp_path / "ops"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(graph("Identity", "FP32", ["rows", 2]))
    (folder / "config.pbtxt").write_text(
        'backend: "onnxruntime" model_operations { op_library_filename: "libours.so" }'
    )
    plan = layout.read(layout.at_folder(folder))
    with pytest.raises(Unloadable, match=r"failed to load 'ops': .*ops/libours\.so"):
        loading.build(plan, plan.versions[0])


def test_a_python_models_batch_is_its_requests_rows(tmp_path: Path) -> None:
    plan = layout.read(layout.at_folder(put(tmp_path, factor=2)))
    built = loading.build(plan, plan.versions[0])
    try:
        assert isinstance(built.model, Isolated)
        outputs = built.model.run({"x": np.array([[1, 2], [3, 4]], np.float32)})
        assert outputs["y"].tolist() == [[2, 4], [6, 8]]
    finally:
        built.model.close()


MEETING = """
    import os, pathlib
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def initialize(self, args):
            self.name = args["model_instance_name"]
            self.place = pathlib.Path(args["model_repository"])

        def execute(self, requests):
            (self.place / self.name).touch()
            while len(list(self.place.glob("scale_0_*"))) < 2:
                os.sched_yield()
            tensor = pb_utils.Tensor("y", np.array([[int(self.name[-1]), 0]], "f4"))
            return [pb_utils.InferenceResponse([tensor])]
"""
"""Answers only while two of it compute."""


def test_an_instance_group_computes_in_several_processes_at_once(tmp_path: Path) -> None:
    folder = put(tmp_path, factor=2)
    with (folder / "config.pbtxt").open("a") as config:
        config.write("instance_group { count: 2 kind: KIND_CPU }")
    (folder / "1" / "model.py").write_text(textwrap.dedent(MEETING))
    plan = layout.read(layout.at_folder(folder))
    built = loading.build(plan, plan.versions[0])
    try:
        given = {"x": np.ones((1, 2), np.float32)}
        with ThreadPoolExecutor(2) as callers:
            answers = list(callers.map(built.model.run, [given, given]))
        assert sorted(answer["y"][0, 0] for answer in answers) == [0, 1]
    finally:
        built.model.close()


def test_of_instances_that_do_not_all_start_none_is_left(tmp_path: Path) -> None:
    folder = put(tmp_path, factor=2)
    with (folder / "config.pbtxt").open("a") as config:
        config.write("instance_group { count: 2 kind: KIND_CPU }")
    (folder / "1" / "model.py").write_text(
        "class TritonPythonModel:\n"
        "    def initialize(self, args):\n"
        "        assert args['model_instance_name'] == 'scale_0_0', 'only one'\n"
    )
    plan = layout.read(layout.at_folder(folder))
    with pytest.raises(Unloadable, match="only one"):
        loading.build(plan, plan.versions[0])
    assert not [thread.name for thread in threading.enumerate() if "scale" in thread.name]
