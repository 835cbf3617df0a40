"""Triton's extensions over HTTP: sequences, shared memory, repository, settings, generate."""

import base64
import json
import mmap
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.inference.tests.desk import Desk, row
from services.inference.tests.web import INFER, Shelf, asked, listening, served, tensor

FOLDER = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Desk]:
    async with served() as one:
        yield one


@pytest_asyncio.fixture
async def http(desk: Desk) -> AsyncIterator[httpx.AsyncClient]:
    async with listening(desk) as client:
        yield client


async def test_a_sequence_keeps_its_state(http: httpx.AsyncClient) -> None:
    async def add(value: int, sequence: int | str, **said: bool) -> int:
        one = tensor(datatype="INT32", shape=[1, 1], data=[value])
        parameters = {"sequence_id": sequence, **said}
        answer = await http.post("/v2/models/sum/infer", json=asked(one, parameters=parameters))
        assert answer.status_code == 200, answer.text
        total: int = answer.json()["outputs"][0]["data"][0]
        return total

    assert await add(1, 7, sequence_start=True) == 1
    assert await add(10, "other", sequence_start=True) == 10
    assert await add(2, 7) == 3
    assert await add(3, 7, sequence_end=True) == 6
    assert await add(20, "other", sequence_end=True) == 30


@pytest.fixture
def file() -> Iterator[Path]:
    path = FOLDER / f"test-rest-{uuid.uuid4().hex}"
    path.write_bytes(bytes(32))
    yield path
    path.unlink()


async def test_tensors_lie_in_shared_memory(http: httpx.AsyncClient, file: Path) -> None:
    root = "/v2/systemsharedmemory"
    body = {"key": f"/{file.name}", "offset": 0, "byte_size": 32}
    assert (await http.post(f"{root}/region/r/register", json=body)).content == b""
    again = await http.post(f"{root}/region/r/register", json=body)
    assert (again.status_code, "already in manager" in again.text) == (409, True)
    known = [{"name": "r", **body}]
    assert (await http.get(f"{root}/status")).json() == known
    assert (await http.get(f"{root}/region/r/status")).json() == known
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 32) as memory:
        memory[:8] = row(3, 4)
        place = {"shared_memory_region": "r", "shared_memory_byte_size": 8}
        there = tensor(parameters=place)
        del there["data"]
        back = {"name": "y", "parameters": {**place, "shared_memory_offset": 16}}
        answer = (await http.post(INFER, json=asked(there, outputs=[back]))).json()
        (output,) = answer["outputs"]
        assert "data" not in output
        assert output["parameters"] == {**place, "shared_memory_offset": 16}
        assert memory[16:24] == row(6, 8)
    assert (await http.post(f"{root}/region/r/unregister")).status_code == 200
    assert (await http.get(f"{root}/region/r/status")).status_code == 404
    assert (await http.post(f"{root}/unregister")).status_code == 200
    cuda = "/v2/cudasharedmemory"
    assert (await http.get(f"{cuda}/status")).json() == []
    assert (await http.post(f"{cuda}/unregister")).status_code == 200
    handle = {"raw_handle": {"b64": "AA=="}, "device_id": 0, "byte_size": 8}
    refused = await http.post(f"{cuda}/region/c/register", json=handle)
    assert (refused.status_code, "GPUs not supported" in refused.text) == (400, True)


async def test_the_repository_is_told(desk: Desk, http: httpx.AsyncClient) -> None:
    shelf = desk.service.repository
    assert isinstance(shelf, Shelf)
    index = (await http.post("/v2/repository/index")).json()
    assert index[1] == {
        "name": "other",
        "version": "",
        "state": "UNAVAILABLE",
        "reason": "no graph",
    }
    assert len((await http.post("/v2/repository/index", json={"ready": True})).json()) == 1
    file = base64.b64encode(b"graph").decode()
    parameters = {"config": '{"max_batch_size": 4}', "file:1/model.onnx": file}
    load = "/v2/repository/models/other/load"
    answer = await http.post(load, json={"parameters": parameters})
    assert (answer.status_code, answer.content) == (200, b"")
    assert (await http.post(load)).status_code == 200
    unload = {"parameters": {"unload_dependents": True}}
    assert (await http.post("/v2/repository/models/other/unload", json=unload)).status_code == 200
    files = {"file:1/model.onnx": b"graph"}
    assert shelf.told == [("other", '{"max_batch_size": 4}', files), ("other", "", {}), "other"]
    for wrong in ({"file:1/model.onnx": "no base64"}, {"config": 1}, {"other": "x"}):
        assert (await http.post(load, json={"parameters": wrong})).status_code == 400


async def test_trace_and_log_settings_are_read_and_changed(http: httpx.AsyncClient) -> None:
    trace = "/v2/trace/setting"
    before = (await http.get(trace)).json()
    assert (before["trace_level"], before["trace_rate"]) == (["TIMESTAMPS"], "1")
    changed = (await http.post(trace, json={"trace_rate": "5", "trace_level": ["OFF"]})).json()
    assert (changed["trace_level"], changed["trace_rate"]) == (["OFF"], "5")
    of_model = "/v2/models/double/trace/setting"
    assert (await http.post(of_model, json={"trace_rate": "7"})).json()["trace_rate"] == "7"
    assert (await http.get(trace)).json()["trace_rate"] == "5"
    back = (await http.post(trace, json={"trace_rate": None, "trace_level": None})).json()
    assert back == before
    for wrong in ({"trace_shape": "round"}, {"trace_rate": "0" * 10 + "1" * 5000}):
        assert (await http.post(trace, json=wrong)).status_code == 400
    assert (await http.get(trace)).json() == before
    assert (await http.get("/v2/models/x/trace/setting")).status_code == 404
    log = "/v2/logging"
    known = (await http.get(log)).json()
    assert (known["log_error"], known["log_file"]) == (True, "")
    assert (await http.post(log, json=known)).json() == known
    assert (await http.post(log, json={"log_verbose_level": 1.5})).status_code == 400


async def test_a_flat_object_is_generated_from(http: httpx.AsyncClient) -> None:
    flat = (await http.post("/v2/models/double/generate", json={"x": [1, 2]})).json()
    assert flat == {"model_name": "double", "model_version": "1", "y": [2, 4]}
    many = await http.post("/v2/models/counter/generate", json={"x": 2_000_000_000})
    assert (many.status_code, "exactly 1 response, got more" in many.text) == (400, True)
    one = (await http.post("/v2/models/counter/generate", json={"parameters": {"x": 1}})).json()
    assert one["y"] == 0
    for wrong in (
        {},
        {"x": "one"},
        {"x": [1, 2, 3]},
        {"x": [1, 2], "other": []},
        {"parameters": 1},
    ):
        assert (await http.post("/v2/models/double/generate", json=wrong)).status_code == 400


async def test_answers_come_as_events(http: httpx.AsyncClient) -> None:
    async def events(model: str, body: Any) -> list[dict[str, Any]]:
        answer = await http.post(f"/v2/models/{model}/generate_stream", json=body)
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        lines = [line for line in answer.text.split("\n\n") if line]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    assert [one["y"] for one in await events("counter", {"x": 3})] == [0, 1, 2]
    assert await events("counter", {"x": 0}) == []
    assert [one["y"] for one in await events("double", {"x": [1, 2]})] == [[2, 4]]
    early = await http.post("/v2/models/counter/generate_stream", json={"x": -1})
    assert (early.status_code, "it cannot" in early.json()["error"]) == (500, True)
