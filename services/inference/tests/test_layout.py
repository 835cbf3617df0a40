"""What lies in a model repository and what it asks for: Triton's layout, MLServer's settings, plain
ONNX files. A configuration that cannot be served says which line or field is wrong.
"""

import json
from pathlib import Path

import pytest

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.contracts.protos.model_config_pb2 import ModelConfig
from services.inference import layout, mlserver, modelconfig
from services.inference.modelconfig import Misconfigured

GRAPH = Signature(
    [Tensor("x", "FP32", [-1, 4]), Tensor("START", "INT32", [-1, 1])],
    [Tensor("y", "FP32", [-1, 2])],
)
PLAIN = Signature([Tensor("x", "FP32", [-1, 4])], [Tensor("y", "FP32", [-1, 2])])
TENSORS = (
    'input { name: "x" data_type: TYPE_FP32 dims: [4] } '
    'output { name: "y" data_type: TYPE_FP32 dims: [2] }'
)


def put(folder: Path, config: str | None = None, versions: tuple[str, ...] = ("1",)) -> Path:
    for version in versions:
        (folder / version).mkdir(parents=True)
        (folder / version / "model.onnx").write_bytes(b"graph")
    if config is not None:
        (folder / "config.pbtxt").write_text(config)
    return folder


def read(folder: Path) -> layout.Plan:
    return layout.read(layout.at_folder(folder))


def parsed(text: str) -> ModelConfig:
    return modelconfig.parse(text, "config.pbtxt")


def numbers(plan: layout.Plan) -> list[int]:
    return [version.number for version in plan.versions]


def test_every_kind_of_model_is_found_by_name(tmp_path: Path) -> None:
    put(tmp_path / "triton", 'name: "triton"')
    put(tmp_path / "bare")
    (tmp_path / "single.onnx").write_bytes(b"graph")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / mlserver.FILE).write_text('{"name": "other"}')
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("no model")
    names = [found.name for found in layout.find(tmp_path)]
    assert names == ["bare", "other", "single", "triton"]


@pytest.mark.parametrize("inner", ["m/config.pbtxt", "m/1/model.onnx", "m/model-settings.json"])
def test_a_folder_may_be_one_model(tmp_path: Path, inner: str) -> None:
    file = tmp_path / inner
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert [found.name for found in layout.find(tmp_path / "m")] == ["m"]


def test_one_onnx_file_is_version_1_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "digits.onnx"
    file.write_bytes(b"graph")
    (found,) = layout.find(file)
    plan = layout.read(found)
    assert (plan.config.name, plan.backend) == ("digits", modelconfig.ONNX)
    assert plan.versions == [layout.Version(1, file)]


def test_a_path_without_models_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="no model: neither"):
        layout.find(tmp_path)
    with pytest.raises(Misconfigured, match="there is no such file or folder"):
        layout.find(tmp_path / "absent")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(Misconfigured, match=r"weights\.bin: neither a folder, an \.onnx file"):
        layout.find(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("", [12]),
        ("latest { num_versions: 2 }", [3, 12]),
        ("all {}", [1, 3, 12]),
        ("specific { versions: [1, 3] }", [1, 3]),
    ],
)
def test_the_version_policy_chooses(tmp_path: Path, policy: str, expected: list[int]) -> None:
    versions = ("1", "3", "12", "007", "next")
    folder = put(tmp_path / "m", f"version_policy {{ {policy} }}", versions)
    assert numbers(read(folder)) == expected


def test_a_specific_version_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "m", "version_policy { specific { versions: [1, 5] } }")
    with pytest.raises(Misconfigured, match=r"asks for \[5\], there are \[1\]"):
        read(folder)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('name: "m"\nmax_batch: 8\n', r'config\.pbtxt, line 2: .*no field named "max_batch"'),
        ('name: "m"\n\ninput {\n', r"config\.pbtxt, line 3"),
        ("max_batch_size: many", r"config\.pbtxt, line 1"),
        ('platform: "tensorflow_graphdef"', "platform 'tensorflow_graphdef' is not served here"),
        ('backend: "tensorrt"', "backend 'tensorrt' is not served here"),
        ('default_model_filename: "net.onnx"', r"m/1/net\.onnx: there is no such file"),
        ('default_model_filename: "net.bin"', r"there is no net\.bin to tell it by"),
    ],
)
def test_a_bad_configuration_is_told_with_its_place(
    tmp_path: Path, config: str, problem: str
) -> None:
    folder = put(tmp_path / "m", config)
    with pytest.raises(Misconfigured, match=problem):
        read(folder)


def test_a_folder_without_versions_says_so(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text('name: "m"')
    with pytest.raises(Misconfigured, match="no version: a folder named 1 holds the first"):
        read(tmp_path / "m")


def test_a_graph_completes_what_the_configuration_leaves_out() -> None:
    full = modelconfig.completed(ModelConfig(name="m"), PLAIN)
    assert full.max_batch_size == Batching().max_batch_size
    assert [(one.name, list(one.dims)) for one in full.input] == [("x", [4])]
    assert modelconfig.signature_of(full) == PLAIN


def test_a_graph_without_free_rows_is_not_batched() -> None:
    fixed = Signature([Tensor("x", "FP32", [1, 4])], [Tensor("y", "FP32", [1, 2])])
    full = modelconfig.completed(ModelConfig(name="m"), fixed)
    assert full.max_batch_size == 0
    assert modelconfig.signature_of(full) == fixed


def test_tensors_listed_without_max_batch_size_have_no_rows() -> None:
    config = parsed(TENSORS.replace("[4]", "[-1, 4]").replace("[2]", "[-1, 2]"))
    full = modelconfig.completed(config, PLAIN)
    assert full.max_batch_size == 0
    assert modelconfig.signature_of(full) == PLAIN


def test_control_inputs_are_not_the_clients() -> None:
    config = parsed(
        "max_batch_size: 8 sequence_batching { control_input { "
        'name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } } }'
    )
    full = modelconfig.completed(config, GRAPH)
    assert [one.name for one in full.input] == ["x"]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (TENSORS.replace('"x"', '"z"'), "input z: the graph has x"),
        ("max_batch_size: 8 " + TENSORS.replace("FP32 dims: [4]", "INT32 dims: [4]"), "TYPE_INT32"),
        ("max_batch_size: 8 " + TENSORS.replace("[4]", "[5]"), r"dims \[5\] .* \[-1, 4\]"),
        (TENSORS, r"dims \[4\] with max_batch_size 0 mean the shape \[4\]"),
    ],
)
def test_what_contradicts_the_graph_is_refused(config: str, problem: str) -> None:
    with pytest.raises(Misconfigured, match=problem):
        modelconfig.completed(parsed(config), PLAIN)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('name: "n" ' + TENSORS, "must be the name of the model's folder, 'm'"),
        ('name: "m"', "input and output must be listed"),
        ('name: "m" max_batch_size: -1 ' + TENSORS, "max_batch_size -1 is negative"),
        (
            'name: "m" max_batch_size: 4 dynamic_batching { preferred_batch_size: [8] }' + TENSORS,
            "preferred_batch_size 8 must lie between 1 and max_batch_size, 4",
        ),
        ('name: "m" ensemble_scheduling {} ' + TENSORS, "ensemble_scheduling is not served here"),
        ('name: "m" ' + TENSORS.replace("[4]", "[0]"), r"input 'x': dims \[0\]"),
        ('name: "m" ' + TENSORS.replace("[4]", "[4] optional: true"), "optional is not served"),
        ('name: "m" ' + TENSORS.replace("data_type: TYPE_FP32 dims: [2]", ""), "data_type is miss"),
    ],
)
def test_what_cannot_be_served_is_named(config: str, problem: str) -> None:
    with pytest.raises(Misconfigured, match=problem):
        modelconfig.check(parsed(config), "m")


def test_triton_s_batching_settings_are_ours() -> None:
    config = parsed(
        "max_batch_size: 16 dynamic_batching { preferred_batch_size: [8, 4] "
        "max_queue_delay_microseconds: 100 priority_levels: 3 default_priority_level: 2 "
        "default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 "
        "allow_timeout_override: false max_queue_size: 7 } }"
    )
    assert modelconfig.batching_of(config) == Batching(
        max_batch_size=16,
        preferred_batch_size=(4, 8),
        max_queue_delay_microseconds=100,
        max_queue_size=7,
        priority_levels=3,
        default_priority_level=2,
        default_timeout_microseconds=5,
        allow_timeout_override=False,
        timeout_action="DELAY",
    )


def test_without_dynamic_batching_nobody_waits_and_batches_form_all_the_same() -> None:
    assert modelconfig.batching_of(parsed("max_batch_size: 16")) == Batching(max_batch_size=16)
    assert modelconfig.batching_of(parsed("")).max_batch_size == 1


def test_labels_are_read_line_by_line(tmp_path: Path) -> None:
    config = parsed(TENSORS.replace("[2]", '[2] label_filename: "names.txt"'))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert layout.labels_of(config, tmp_path) == {"y": ["cat", "dog"]}
    (tmp_path / "names.txt").unlink()
    with pytest.raises(Misconfigured, match=r"label_filename: .*names\.txt"):
        layout.labels_of(config, tmp_path)


def settings(folder: Path, **said: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "net.onnx").write_bytes(b"graph")
    path = folder / mlserver.FILE
    path.write_text(json.dumps(said))
    return folder


def test_mlserver_s_settings_name_graph_version_and_batching(tmp_path: Path) -> None:
    folder = settings(
        tmp_path / "m",
        name="digits",
        implementation="any.Runtime",
        parameters={"uri": "./net.onnx", "version": "v3"},
        max_batch_size=32,
        max_batch_time=0.01,
    )
    plan = read(folder)
    assert (plan.config.name, plan.versions) == ("digits", [layout.Version(3, folder / "net.onnx")])
    limits = modelconfig.batching_of(modelconfig.completed(plan.config, PLAIN))
    assert (limits.max_batch_size, limits.max_queue_delay_microseconds) == (32, 10_000)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (
            {"implementation": "mlserver_sklearn.SKLearnModel", "parameters": {"uri": "m.joblib"}},
            "implementation 'mlserver_sklearn.SKLearnModel' with parameters.uri 'm.joblib'",
        ),
        ({"parameters": {"uri": "s3://bucket/net.onnx"}}, "only local files are read"),
        ({"parameters": {"uri": "absent.onnx"}}, r"parameters\.uri: there is no .*absent\.onnx"),
        ({"parameters": []}, r"\$\.parameters"),
        ({"max_batch_size": "many"}, r"\$\.max_batch_size"),
    ],
)
def test_mlserver_settings_that_cannot_be_served_name_the_field(
    tmp_path: Path, said: dict[str, object], problem: str
) -> None:
    with pytest.raises(Misconfigured, match=problem):
        read(settings(tmp_path / "m", **said))


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        ({"name": "z", "datatype": "FP32", "shape": [-1, 4]}, "inputs: no 'z' in the graph"),
        ({"name": "x", "datatype": "INT32", "shape": [-1, 4]}, "inputs: 'x' datatype INT32"),
        ({"name": "x", "datatype": "FP32", "shape": [-1, 5]}, r"inputs: 'x' shape \[-1, 5\]"),
    ],
)
def test_the_graph_is_what_mlserver_s_settings_promise(
    tmp_path: Path, tensor: dict[str, object], problem: str
) -> None:
    folder = settings(tmp_path / "m", parameters={"uri": "net.onnx"}, inputs=[tensor])
    plan = read(folder)
    assert plan.promised is not None
    with pytest.raises(Misconfigured, match=problem):
        mlserver.check(plan.promised, PLAIN)


def test_a_change_of_any_file_changes_the_stamp(tmp_path: Path) -> None:
    folder = put(tmp_path / "m")
    before = layout.stamp_of(folder)
    assert layout.stamp_of(folder) == before
    (folder / "config.pbtxt").write_text("max_batch_size: 2")
    assert layout.stamp_of(folder) != before
