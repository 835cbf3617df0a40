"""The protocol over HTTP, on a real port: what Triton's and KServe's clients read and send."""

import asyncio
import base64
import contextlib
import gzip
import json
import mmap
import threading
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from time import monotonic_ns
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.doors.serve import MESSAGE_BYTES_MAX, http_door
from services.inference.rest import app_of
from services.inference.tensors import DTYPES, Arrays
from services.inference.tests import desk as desks
from services.inference.tests.desk import Desk, Own, double, echo, row
from stack.testing import eventually

LENGTH = "Inference-Header-Content-Length"
INFER = "/v2/models/double/infer"
FOLDER = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lies


class Shelf:
    """A repository that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def load(self, name: str, config: str = "", files: Mapping[str, bytes] = {}) -> None:
        self.told.append((name, config, dict(files)))

    async def unload(self, name: str) -> None:
        self.told.append(name)

    def index(self, ready_only: bool) -> list[tuple[str, str, str, str]]:
        rows = [("double", "1", "READY", ""), ("other", "", "UNAVAILABLE", "no graph")]
        return rows[:1] if ready_only else rows


class Gate:
    """A model whose runs wait until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        signature = Signature([Tensor("x", "FP32", [-1, 1])], [Tensor("y", "FP32", [-1, 1])])
        self.model = Own(signature, self.run)

    def run(self, inputs: Arrays) -> Arrays:
        assert self.opened.wait(60)
        return {"y": inputs["x"]}


@contextlib.asynccontextmanager
async def listening(desk: Desk, *tokens: str) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        http_door("127.0.0.1", 0, app_of(desk.service, tokens)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        yield client


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Desk]:
    async with desks.opened(Shelf()) as one:
        await one.serve("double", double())
        await one.serve("counter", desks.counter())
        await one.serve("sum", desks.running_sum(), desks.STATEFUL)
        yield one


@pytest_asyncio.fixture
async def http(desk: Desk) -> AsyncIterator[httpx.AsyncClient]:
    async with listening(desk) as client:
        yield client


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2], **changes}


def asked(*tensors: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"inputs": list(tensors or [tensor()]), **fields}


def binary(document: dict[str, Any], *raws: bytes) -> tuple[bytes, dict[str, str]]:
    head = json.dumps(document).encode()
    return head + b"".join(raws), {LENGTH: str(len(head))}


async def test_server_and_models_are_described(http: httpx.AsyncClient) -> None:
    async def get(path: str) -> Any:
        answer = await http.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
        return answer.json()

    assert await get("/v2/health/live") == {"live": True}
    assert await get("/v2/health/ready") == {"ready": True}
    assert (await get("/v2"))["name"] == (await get("/v2/"))["name"] == "triton"
    assert "binary_tensor_data" in (await get("/v2"))["extensions"]
    for path in ("/v2/models/double", "/v2/models/double/versions/1"):
        described = await get(path)
        assert (described["versions"], described["platform"]) == (["1"], "python")
        assert described["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
        assert await get(f"{path}/ready") == {"name": "double", "ready": True}
        assert (await get(f"{path}/config"))["max_batch_size"] == 8
    await http.post(INFER, json=asked())
    (known,) = (await get("/v2/models/double/versions/1/stats"))["model_stats"]
    assert known["inference_stats"]["success"]["count"] == known["inference_count"] == 1
    names = {one["name"] for one in (await get("/v2/models/stats"))["model_stats"]}
    assert names == {"double", "counter", "sum"}


async def test_json_in_and_out(http: httpx.AsyncClient) -> None:
    nested = tensor(shape=[2, 2], data=[[1, 2], [3, 4]])
    answer = (await http.post(INFER, json=asked(nested, id="mine"))).json()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("double", "1", "mine")
    (output,) = answer["outputs"]
    assert output == {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [2, 4, 6, 8]}


@pytest.mark.parametrize("datatype", sorted(DTYPES))
async def test_every_datatype_goes_both_ways_as_binary(desk: Desk, datatype: str) -> None:
    await desk.serve("echo", echo(datatype, [-1, 2]))
    raw = np.zeros(2, DTYPES[datatype]).tobytes()
    if datatype == "BYTES":
        raw = b"\x03\x00\x00\x00cat\x00\x00\x00\x00"
    one: dict[str, Any] = {"name": "x", "datatype": datatype, "shape": [1, 2]}
    one["parameters"] = {"binary_data_size": len(raw)}
    body, headers = binary({"inputs": [one], "parameters": {"binary_data_output": True}}, raw)
    async with listening(desk) as http:
        answer = await http.post("/v2/models/echo/infer", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[LENGTH])
    assert answer.headers["content-type"] == "application/octet-stream"
    (output,) = json.loads(answer.content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": len(raw)}
    assert answer.content[length:] == raw


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_bodies(http: httpx.AsyncClient, coding: str, pack: Any) -> None:
    rows = np.arange(16, dtype=np.float32)
    one = tensor(shape=[8, 2], parameters={"binary_data_size": rows.nbytes})
    del one["data"]
    body, headers = binary(asked(one), rows.tobytes())
    headers |= {"Content-Encoding": coding, "Accept-Encoding": coding}
    answer = await http.post(INFER, content=pack(body), headers=headers)
    assert answer.json()["outputs"][0]["data"] == (rows * 2).tolist()
    assert "content-encoding" not in answer.headers, "too short to be worth it"


async def test_long_answers_are_compressed_as_asked(desk: Desk) -> None:
    await desk.serve("echo", echo("FP32", [-1, 100_000]))
    raw = np.arange(100_000, dtype=np.float32).tobytes()
    one: dict[str, Any] = {"name": "x", "datatype": "FP32", "shape": [1, 100_000]}
    one["parameters"] = {"binary_data_size": len(raw)}
    body, headers = binary({"inputs": [one], "parameters": {"binary_data_output": True}}, raw)
    async with listening(desk) as http:
        for coding in ("gzip", "deflate"):
            headers["Accept-Encoding"] = coding
            answer = await http.post("/v2/models/echo/infer", content=body, headers=headers)
            assert answer.headers["content-encoding"] == coding
            assert answer.headers["vary"] == "Accept-Encoding"
            assert int(answer.headers["content-length"]) < len(raw)
            assert answer.content[int(answer.headers[LENGTH]) :] == raw


BOMB = gzip.compress(bytes(MESSAGE_BYTES_MAX + 1), 1)
REFUSALS: list[tuple[str, Any, dict[str, str], int, str]] = [
    ("/v2/models/x/infer", asked(), {}, 404, "Request for unknown model: 'x' is not found"),
    ("/v2/models/double/versions/9/infer", asked(), {}, 404, "version 9 is not found"),
    ("/v2/models/double/versions/one/infer", asked(), {}, 400, "failed to get model version"),
    (INFER, b"", {}, 400, "failed to parse the request JSON"),
    (INFER, b"{", {}, 400, "failed to parse the request JSON"),
    (INFER, b"[" * 100_000, {}, 400, "failed to parse the request JSON"),
    (INFER, b'{"inputs": [NaN]}', {}, 400, "failed to parse the request JSON"),
    (INFER, b'{"id": "\xff", "inputs": []}', {}, 400, "failed to parse the request JSON"),
    (INFER, asked(tensor(name="z")), {}, 400, "unexpected inference input 'z'"),
    (INFER, asked(tensor(shape=[1, 3])), {}, 400, "unexpected shape for input 'x'"),
    (INFER, asked(tensor(shape=[1 << 62, 2])), {}, 400, "input 'x'"),
    (INFER, asked(tensor(shape=[9, 2], data=[0] * 18)), {}, 400, "batch-size must be <= 8"),
    (INFER, asked(tensor(data=["1", 2])), {}, 400, "holds a str"),
    (INFER, asked(tensor(data=[1e300, 2])), {}, 400, "out of range"),
    (INFER, asked(outputs=[{"name": "z"}]), {}, 400, "unexpected inference output 'z'"),
    (INFER, asked(parameters={"timeout": 1 << 63}), {}, 400, "parameters.timeout"),
    (INFER, asked(parameters={"timeout": -1}), {}, 400, "parameters.timeout"),
    (INFER, asked(), {LENGTH: "9999"}, 400, "Inference-Header-Content-Length: '9999'"),
    (INFER, b"no gzip", {"Content-Encoding": "gzip"}, 400, "the body is not gzip"),
    (INFER, b"", {"Content-Encoding": "br"}, 415, "'br' is not one of gzip, deflate"),
    (INFER, BOMB, {"Content-Encoding": "gzip"}, 413, "more than 67108864 bytes"),
    (INFER, bytes(MESSAGE_BYTES_MAX + 1), {}, 413, "more than 67108864 bytes"),
    (INFER, asked(tensor(data=[-1, 0])), {}, 500, "it cannot"),
    ("/v2/models/counter/infer", asked(), {}, 501, "any number of answers"),
    ("/v2/models/sum/infer", asked(tensor(datatype="INT32")), {}, 400, "shape"),
    ("/v2/cudasharedmemory/region/r/register", {"key": "r"}, {}, 400, "raw_handle"),
]


async def test_a_refusal_has_a_status_and_names_what_is_wrong(http: httpx.AsyncClient) -> None:
    for path, body, headers, status, said in REFUSALS:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await http.post(path, content=content, headers=headers)
        assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
        assert set(answer.json()) == {"error"}
        good = await http.post(INFER, json=asked())
        assert good.status_code == 200, "and the door is still open"


async def test_other_paths_and_verbs(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v2/models/x/ready")).status_code == 404
    assert (await http.get("/v2/models/%00%0a/ready")).status_code == 404
    assert (await http.get("/v2/nowhere")).json() == {"error": "Not Found"}
    wrong = await http.delete("/v2/trace/setting")
    assert (wrong.status_code, wrong.json()) == (405, {"error": "Method Not Allowed"})
    assert set(wrong.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


async def test_a_full_queue_is_503_and_says_when_to_try_again(desk: Desk) -> None:
    gate = Gate()
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    served.configure(Batching(max_batch_size=1, max_queue_size=1), 0)
    one = asked(tensor(shape=[1, 1], data=[1]))
    async with listening(desk) as http:
        tasks = [
            asyncio.create_task(http.post("/v2/models/gate/infer", json=one)) for _ in range(40)
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "exceeds maximum queue size" in refused.json()["error"]
        gate.opened.set()
        codes = {(await task).status_code for task in tasks}
    assert codes == {200, 503}


async def test_who_waits_too_long_in_the_queue_is_told(desk: Desk) -> None:
    gate = Gate()
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    served.configure(Batching(max_batch_size=1), 0)
    one = asked(tensor(shape=[1, 1], data=[1]))
    async with listening(desk) as http:

        def ask(**parameters: int) -> "asyncio.Task[httpx.Response]":
            body = {**one, "parameters": parameters}
            return asyncio.create_task(http.post("/v2/models/gate/infer", json=body))

        running = [ask() for _ in served.threads]
        await eventually(lambda: len(gate.model.rows) == len(served.threads))
        late = ask(timeout=1000)
        await eventually(lambda: served.counts().waiting == 1)
        over_ns = monotonic_ns() + 1_000_000
        await eventually(lambda: monotonic_ns() > over_ns)
        gate.opened.set()
        assert {(await task).status_code for task in running} == {200}
        answer = await late
    assert (answer.status_code, answer.json()) == (503, {"error": "Request timeout expired"})


async def test_who_has_gone_leaves_the_queue(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    served.configure(Batching(max_batch_size=1), 0)
    one = asked(tensor(shape=[1, 1], data=[1]))
    async with listening(desk) as http:

        def ask() -> "asyncio.Task[httpx.Response]":
            return asyncio.create_task(http.post("/v2/models/gate/infer", json=one))

        running = [ask() for _ in served.threads]
        await eventually(lambda: len(gate.model.rows) == len(served.threads))
        gone = ask()
        await eventually(lambda: served.counts().waiting == 1)
        gone.cancel()
        await eventually(lambda: served.counts().waiting == 0)
        await half_a_request(http)
        gate.opened.set()
        assert {(await task).status_code for task in running} == {200}
    assert sum(gate.model.rows) == len(served.threads)
    assert "Exception" not in caplog.text


async def half_a_request(http: httpx.AsyncClient) -> None:
    """And then nothing."""
    assert http.base_url.port is not None
    _, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
    head = "POST /v2/models/gate/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
    writer.write(head.encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()


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
    many = await http.post("/v2/models/counter/generate", json={"x": 3})
    assert (many.status_code, "exactly 1 response, got 3" in many.text) == (400, True)
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


async def test_tokens_are_asked_for_but_not_by_health(desk: Desk) -> None:
    async with listening(desk, "first", "second") as http:
        for path in ("/v2", "/v2/models/double", "/v2/nowhere", "/v2/models/stats"):
            refused = await http.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"] == "send the header 'authorization: Bearer <token>'"
        for wrong in ("Bearer third", "Basic first", "first", "Bearer", "Bearer first second"):
            headers = {"Authorization": wrong}
            assert (await http.post(INFER, json=asked(), headers=headers)).status_code == 401
        for token in ("Bearer first", "bearer second"):
            headers = {"Authorization": token}
            assert (await http.post(INFER, json=asked(), headers=headers)).status_code == 200
        for path in ("/v2/health/live", "/v2/health/ready", "/health/ready", "/openapi.json"):
            assert (await http.get(path)).status_code == 200
        document = (await http.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


async def test_requests_of_http_share_batches(desk: Desk) -> None:
    gate = Gate()
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    one = asked(tensor(shape=[1, 1], data=[1]))
    async with listening(desk) as http:
        tasks = [
            asyncio.create_task(http.post("/v2/models/gate/infer", json=one)) for _ in range(20)
        ]
        busy = len(served.threads)
        await eventually(lambda: served.counts().waiting >= 20 - busy * 8)
        gate.opened.set()
        assert {(await task).status_code for task in tasks} == {200}
    assert sum(gate.model.rows) == 20
    assert max(gate.model.rows) > 1
