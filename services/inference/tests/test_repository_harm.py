"""What a disk, a client or a crash does to one model of a repository stays with that model."""

import asyncio
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from libs.doors import Invalid
from services.inference import layout, loading
from services.inference.endpoints import Endpoints
from services.inference.isolated import Isolated
from services.inference.modelconfig import Misconfigured
from services.inference.tests import test_loading, test_repository
from services.inference.tests.test_models import graph as any_graph
from services.inference.tests.test_repository import factor_of, graph, put, reason, started, states
from stack.testing import eventually

endpoints = test_repository.endpoints
UNREADABLE = "/proc/self/mem"
"""A file that is there, may be opened by anybody, and gives nothing but an error."""


async def test_a_model_given_with_its_files_survives_its_crash(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    """Its next worker reads them again; they are gone once it is unloaded."""
    folder = test_loading.put(tmp_path / "sent", factor=3)
    files = {"file:1/model.py": (folder / "1" / "model.py").read_bytes()}
    repository = await started(tmp_path, endpoints, "explicit")
    config = (
        '{"backend": "python", "max_batch_size": 8,'
        ' "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [2]}],'
        ' "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [2]}],'
        ' "parameters": {"factor": {"string_value": "3"}}}'
    )
    await repository.load("scale", config, files)
    model = endpoints.served("scale", "").model
    assert isinstance(model, Isolated)
    place = Path(model.spec.folder)
    assert model.worker is not None
    os.kill(model.worker.process.pid, signal.SIGKILL)
    await eventually(lambda: model.crashes == 1 and model.up.is_set())
    assert await test_loading.ask(endpoints, [1, 2], 1, 2) == [3, 6]
    await repository.unload("scale")
    assert not is_there(place)
    assert not repository.unloaded


def is_there(place: Path) -> bool:
    return place.exists()


async def test_a_file_that_cannot_be_read_stops_its_own_model_only(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    put(tmp_path, "good", factor=3)
    put(tmp_path, "bad")
    file = tmp_path / "bad" / "1" / "model.onnx"
    file.unlink()
    file.symlink_to(UNREADABLE)
    repository = await started(tmp_path, endpoints, "poll")
    assert await factor_of(endpoints, "good") == 3
    assert "Input/output error" in await reason(repository, "bad")
    put(tmp_path, "good", 2, 5)
    file.unlink()
    file.symlink_to(file)
    await repository.look()
    assert await factor_of(endpoints, "good") == 5


async def test_a_folder_that_is_away_for_a_moment_unloads_nothing(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    root = tmp_path / "models"
    put(root, "m", factor=2)
    repository = await started(root, endpoints, "poll")
    root.rename(tmp_path / "aside")
    await repository.look()
    assert await factor_of(endpoints, "m") == 2
    (tmp_path / "aside").rename(root)
    await repository.look()
    assert await states(repository) == {("m", "1"): "READY"}
    shutil.rmtree(root / "m")
    await repository.look()
    assert await states(repository) == {}


async def test_a_model_that_was_unloaded_is_not_brought_back_by_its_quarantine(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    put(tmp_path, "m", 1, 1)
    put(tmp_path, "m", 3, 3)
    repository = await started(tmp_path, endpoints, "explicit", "m")
    endpoint = endpoints.find("m")
    async with repository.lock("m"):
        stepping = asyncio.create_task(repository.step_back(endpoint, "3"))
        await asyncio.sleep(0)
        await repository.drop("m")
    await stepping
    assert not endpoints.by_key
    assert not endpoint.served


async def test_a_broken_configuration_ends_no_step_back(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    put(tmp_path, "m", 1, 1)
    put(tmp_path, "m", 3, 3)
    repository = await started(tmp_path, endpoints)
    (tmp_path / "m" / "config.pbtxt").write_text("max_batch: 8")
    await repository.step_back(endpoints.find("m"), "3")
    assert list(endpoints.find("m").served) == ["3"]


async def test_names_that_only_clients_know_are_not_remembered(
    tmp_path: Path, endpoints: Endpoints
) -> None:
    put(tmp_path, "m")
    repository = await started(tmp_path, endpoints, "explicit")
    for number in range(5):
        with pytest.raises(Invalid):
            await repository.load(f"x{number}", "{}", {"file:1/model.onnx": b"no graph"})
    await repository.load("y", "{}", {"file:1/model.onnx": graph(7)})
    await repository.unload("y")
    assert not repository.problems
    assert not repository.unloaded
    assert not len(repository.locks)


@pytest.mark.parametrize(
    "files",
    [
        {"file:1/" + "é" * 200: b"", "file:1/model.onnx": b""},
        {"file:1": b"", "file:1/model.onnx": b""},
        {"file:1/model.onnx/x": b"", "file:1/model.onnx": b""},
    ],
    ids=["too long", "below a file", "a folder"],
)
async def test_files_that_no_folder_takes_are_refused(
    tmp_path: Path, endpoints: Endpoints, files: dict[str, bytes]
) -> None:
    put(tmp_path, "m")
    repository = await started(tmp_path, endpoints, "explicit")
    with pytest.raises(Invalid, match=r"failed to load 'm', 'file:1.* cannot be kept: "):
        await repository.load("m", "{}", files)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../other/labels.txt", "1/../../x"])
async def test_a_configuration_names_no_file_of_others(
    tmp_path: Path, endpoints: Endpoints, path: str
) -> None:
    put(tmp_path, "m", factor=2)
    repository = await started(tmp_path, endpoints, "explicit", "m")
    output = (
        f'[{{"name": "y", "data_type": "TYPE_FP32", "dims": [-1, 2], "label_filename": "{path}"}}]'
    )
    named = f'{{"backend": "onnxruntime", "default_model_filename": "{path}"}}'
    for config in (f'{{"output": {output}}}', named):
        with pytest.raises(Invalid, match=f"'{path}' leads out of the model's folder"):
            await repository.load("m", config)
    assert await factor_of(endpoints, "m") == 2


def test_a_worker_whose_model_is_refused_after_all_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "ops"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(any_graph("Identity", "FP32", ["rows", 2]))
    source = folder / "none.c"
    source.write_text("void *RegisterCustomOps(void *a, void *b) { return 0; }")
    library = folder / "libnone.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    (folder / "config.pbtxt").write_text(
        'backend: "onnxruntime" output { name: "z" data_type: TYPE_FP32 dims: [-1, 2] }'
        'model_operations { op_library_filename: "libnone.so" }'
    )
    plan = layout.read(layout.at_folder(folder))
    with pytest.raises(Misconfigured, match="output z: the graph has y"):
        loading.build(plan, plan.versions[0])
    assert "ops" not in [thread.name for thread in threading.enumerate()]
