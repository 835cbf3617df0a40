"""A model repository is followed: what can be served is, what cannot says why, and a version is
changed under load without a failed request.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from libs.doors import Invalid, NotFound, Unavailable
from services.inference import python_front
from services.inference.calls import Answer, Call
from services.inference.endpoints import Endpoints
from services.inference.notes import Notes
from services.inference.repository import Mode, Repository
from services.inference.served import Rates
from services.inference.tensors import Given

SWAPS = 10
SETTINGS = """
{"name": "theirs", "implementation": "their.own.Runtime", "max_batch_size": 4,
 "parameters": {"uri": "./net.onnx", "version": "v2"},
 "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]}
"""
CALLERS = 8


def graph(factor: float, rows: str | int = "rows", inner: tuple[int, ...] = (2,)) -> bytes:
    """y = factor * x."""
    shape = [rows, *inner]
    made = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["y"])],
        "scaled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor")],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString()


def put(root: Path, name: str, version: int = 1, factor: float = 1, config: str = "") -> None:
    folder = root / name / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(graph(factor))
    if config:
        (root / name / "config.pbtxt").write_text(config)


@pytest.fixture
async def endpoints() -> AsyncIterator[Endpoints]:
    front = python_front.PythonFront(lambda call: None, [])
    made = Endpoints(front, Notes(None, "test", Rates(0, 0)), "default")
    yield made
    await made.close()


async def started(root: Path, endpoints: Endpoints, mode: Mode = "none", *names: str) -> Repository:
    repository = Repository(root, mode, endpoints)
    await repository.start(names)
    return repository


async def ask(endpoints: Endpoints, model: str, version: str = "") -> Answer:
    given = [Given("x", "FP32", [1, 2], values=[1.0, 2.0])]
    return await endpoints.infer(Call(model, version, "", given, [], 0, ""))


async def factor_of(endpoints: Endpoints, model: str, version: str = "") -> float:
    answer = await ask(endpoints, model, version)
    ((_, array),) = answer.outputs
    return float(array[0, 0])


async def states(repository: Repository) -> dict[tuple[str, str], str]:
    return {(name, version): state for name, version, state, _ in await repository.index(False)}


async def reason(repository: Repository, name: str) -> str:
    rows = await repository.index(False)
    return next(why for model, _, _, why in rows if model == name)


async def test_one_bad_model_never_stops_the_others(tmp_path: Path, endpoints: Endpoints) -> None:
    put(tmp_path, "good", factor=3)
    put(tmp_path, "typo", config="max_batch: 8")
    put(tmp_path, "broken")
    (tmp_path / "broken" / "1" / "model.onnx").write_bytes(b"no graph")
    repository = await started(tmp_path, endpoints)
    assert await factor_of(endpoints, "good") == 3
    assert await states(repository) == {
        ("good", "1"): "READY",
        ("typo", ""): "UNAVAILABLE",
        ("broken", "1"): "UNAVAILABLE",
    }
    assert 'config.pbtxt, line 1: Message type "inference.ModelConfig"' in await reason(
        repository, "typo"
    )
    assert "failed to load 'broken'" in await reason(repository, "broken")
    assert [row[0] for row in await repository.index(True)] == ["good"]


async def test_the_newest_version_answers_and_older_ones_by_number(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    put(tmp_path, "m", 2, 2)
    put(tmp_path, "m", 10, 10, "version_policy { all {} }")
    await started(tmp_path, endpoints)
    assert await factor_of(endpoints, "m") == 10
    assert await factor_of(endpoints, "m", "2") == 2


async def test_an_mlserver_folder_is_served_as_it_is(tmp_path: Path, endpoints: Endpoints) -> None:
    folder = tmp_path / "any"
    folder.mkdir()
    (folder / "net.onnx").write_bytes(graph(3))
    (folder / "model-settings.json").write_text(SETTINGS)
    await started(tmp_path, endpoints)
    assert await factor_of(endpoints, "theirs", "2") == 3
    assert endpoints.served("theirs", "").rows_max == 4


async def test_models_are_loaded_and_unloaded_on_demand(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    put(tmp_path, "a", factor=2)
    put(tmp_path, "b")
    repository = await started(tmp_path, endpoints, "explicit", "b")
    assert await states(repository) == {("a", ""): "", ("b", "1"): "READY"}
    await repository.load("a")
    assert await factor_of(endpoints, "a") == 2
    await repository.unload("a")
    assert not endpoints.is_ready("a", "")
    assert await reason(repository, "a") == "unloaded"
    with pytest.raises(NotFound, match="Request for unknown model: 'a'"):
        await ask(endpoints, "a")
    with pytest.raises(NotFound, match="Request for unknown model: 'z'"):
        await repository.unload("z")
    with pytest.raises(Invalid, match=r"failed to load 'z', .*holds no 'z'"):
        await repository.load("z")


async def test_a_config_may_be_given_with_the_request(tmp_path: Path, endpoints: Endpoints) -> None:
    put(tmp_path, "m", factor=2, config="max_batch_size: 8")
    repository = await started(tmp_path, endpoints, "explicit", "*")
    assert endpoints.served("m", "").limits.max_batch_size == 8
    await repository.load("m", '{"max_batch_size": "16"}')
    assert endpoints.served("m", "").config.max_batch_size == 16
    with pytest.raises(Invalid, match="failed to load 'm', the config given is not a ModelConfig"):
        await repository.load("m", '"parameters": {{')
    with pytest.raises(Invalid, match="name 'other' must be the name of the model's folder"):
        await repository.load("m", '{"name": "other"}')
    assert await factor_of(endpoints, "m") == 2
    await repository.load("m")
    assert endpoints.served("m", "").config.max_batch_size == 8


async def test_files_may_be_given_with_the_request(tmp_path: Path, endpoints: Endpoints) -> None:
    put(tmp_path, "m")
    repository = await started(tmp_path, endpoints, "explicit")
    files = {"file:7/model.onnx": graph(7)}
    await repository.load("m", "{}", files)
    assert (await ask(endpoints, "m")).version == "7"
    assert await factor_of(endpoints, "m") == 7
    for path in ("A" * 256, "../up", "/etc/passwd", "1//x"):
        with pytest.raises(Invalid, match="Invalid file path"):
            await repository.load("m", "{}", {f"file:{path}": b"a"})
    with pytest.raises(Invalid, match="a `config` is needed"):
        await repository.load("m", "", files)
    assert await factor_of(endpoints, "m") == 7


@pytest.mark.parametrize("mode", ["none", "poll"])
async def test_only_the_explicit_mode_takes_demands(
    tmp_path: Path, endpoints: Endpoints, mode: Mode
) -> None:
    put(tmp_path, "m")
    repository = await started(tmp_path, endpoints, mode)
    with pytest.raises(Unavailable, match="explicit model load / unload is not allowed"):
        await repository.load("m")
    with pytest.raises(Unavailable, match="explicit model load / unload is not allowed"):
        await repository.unload("m")


async def test_changed_files_are_loaded_again(tmp_path: Path, endpoints: Endpoints) -> None:
    put(tmp_path, "m", 1, 1)
    put(tmp_path, "gone")
    repository = await started(tmp_path, endpoints, "poll")
    before = endpoints.served("m", "")
    await repository.look()
    assert endpoints.served("m", "") is before

    put(tmp_path, "m", 2, 2)
    put(tmp_path, "new", factor=5)
    (tmp_path / "gone" / "1" / "model.onnx").unlink()
    (tmp_path / "gone" / "1").rmdir()
    (tmp_path / "gone").rmdir()
    await repository.look()
    assert await factor_of(endpoints, "m") == 2
    assert await factor_of(endpoints, "new") == 5
    assert await states(repository) == {("m", "2"): "READY", ("new", "1"): "READY"}


async def test_what_serves_goes_on_when_its_successor_is_broken(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    put(tmp_path, "m", 1, 4)
    repository = await started(tmp_path, endpoints, "poll")
    put(tmp_path, "m", 2)
    (tmp_path / "m" / "2" / "model.onnx").write_bytes(b"half a fi")
    await repository.look()
    assert await factor_of(endpoints, "m") == 4
    assert await states(repository) == {("m", "1"): "READY", ("m", "2"): "UNAVAILABLE"}
    (tmp_path / "m" / "2" / "model.onnx").write_bytes(graph(2))
    await repository.look()
    assert await factor_of(endpoints, "m") == 2
    assert await states(repository) == {("m", "2"): "READY"}


@pytest.mark.parametrize("kept", [False, True], ids=["next version", "same version"])
async def test_models_are_swapped_under_load_without_a_failed_request(
    tmp_path: Path, endpoints: Endpoints, kept: bool
) -> None:
    """And no answer of an older one after the newer one is in its place."""
    put(tmp_path, "m", 1, 1)
    repository = await started(tmp_path, endpoints, "explicit", "m")
    newest, answered = 1, 0
    over = asyncio.Event()

    async def call() -> None:
        nonlocal answered
        while not over.is_set():
            at_least = newest
            assert await factor_of(endpoints, "m") >= at_least
            answered += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(CALLERS):
            group.create_task(call())
        for factor in range(2, SWAPS + 2):
            if kept:
                (tmp_path / "m" / "1" / "model.onnx").write_bytes(graph(factor))
            else:
                put(tmp_path, "m", factor, factor)
            await repository.load("m")
            newest = factor
        over.set()
    assert answered >= SWAPS
    assert list(endpoints.find("m").served) == ["1" if kept else str(SWAPS + 1)]


async def test_a_quarantined_version_gives_way_to_the_one_before(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    put(tmp_path, "m", 1, 1)
    put(tmp_path, "m", 3, 3)
    repository = await started(tmp_path, endpoints)
    endpoints.on_quarantine = repository.step_back
    served = endpoints.served("m", "")
    assert served.version == "3"
    for _ in range(3):
        endpoints.crashed(endpoints.find("m"), served, "segmentation fault")
    await asyncio.gather(*endpoints.replacing)
    assert await factor_of(endpoints, "m") == 1
    assert await states(repository) == {("m", "1"): "READY", ("m", "3"): "UNAVAILABLE"}


async def test_a_tensor_has_the_shape_its_clients_see(tmp_path: Path, endpoints: Endpoints) -> None:
    """As Triton's densenet_onnx: a graph with a fixed first dimension and two more at the end."""
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.onnx").write_bytes(graph(2, 1, (2, 1, 1)))
    (tmp_path / "m" / "config.pbtxt").write_text(
        'input { name: "x" data_type: TYPE_FP32 dims: [2] reshape { shape: [1, 2, 1, 1] } } '
        'output { name: "y" data_type: TYPE_FP32 dims: [2] reshape { shape: [1, 2, 1, 1] } }'
    )
    await started(tmp_path, endpoints)
    given = [Given("x", "FP32", [2], values=[1.0, 2.0])]
    answer = await endpoints.infer(Call("m", "", "", given, [], 0, ""))
    assert answer.outputs[0][1].tolist() == [2.0, 4.0]


async def test_a_decoupled_python_model_answers_as_often_as_it_likes(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "model.py").write_text(
        "import triton_python_backend_utils as pb_utils\n"
        "class TritonPythonModel:\n"
        "    def execute(self, requests):\n"
        "        for request in requests:\n"
        "            sender = request.get_response_sender()\n"
        "            for value in pb_utils.get_input_tensor_by_name(request, 'x').as_numpy():\n"
        "                out = pb_utils.Tensor('y', value.reshape(1))\n"
        "                sender.send(pb_utils.InferenceResponse([out]))\n"
        "            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)\n"
    )
    (tmp_path / "m" / "config.pbtxt").write_text(
        'backend: "python" model_transaction_policy { decoupled: true } '
        'input { name: "x" data_type: TYPE_INT32 dims: [-1] } '
        'output { name: "y" data_type: TYPE_INT32 dims: [1] }'
    )
    repository = await started(tmp_path, endpoints)
    assert await states(repository) == {("m", "1"): "READY"}
    given = [Given("x", "INT32", [3], values=[5, 6, 7])]
    call = Call("m", "", "", given, [], 0, "")
    answers = [one.outputs[0][1].tolist() async for one in endpoints.stream(call)]
    assert answers == [[5], [6], [7]]
