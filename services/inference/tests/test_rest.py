"""The protocol over HTTP, on a real port: what Triton's and KServe's clients read and send."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from libs.doors.serve import MESSAGE_BYTES_MAX
from services.inference import httpbody
from services.inference.tensors import DTYPES
from services.inference.tests.desk import Desk, echo
from services.inference.tests.web import INFER, asked, listening, served, tensor
from stack.testing import eventually

LENGTH = "Inference-Header-Content-Length"


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Desk]:
    async with served() as one:
        yield one


@pytest_asyncio.fixture
async def http(desk: Desk) -> AsyncIterator[httpx.AsyncClient]:
    async with listening(desk) as client:
        yield client


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


async def test_bodies_on_their_way_are_bounded_over_all_clients(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(httpbody, "HELD_BYTES_MAX", 100_000)
    first, over = asyncio.Event(), asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b" " * 90_000
        first.set()
        await over.wait()
        yield json.dumps(asked()).encode()

    async with listening(desk) as http:
        slow = asyncio.create_task(http.post(INFER, content=slowly()))
        await first.wait()
        await eventually(lambda: httpbody.COMING.held >= 90_000)
        refused = await http.post(INFER, content=b" " * 20_000)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        over.set()
        assert (await slow).status_code == 200
    assert httpbody.COMING.held == 0


async def test_tokens_are_asked_for_but_not_by_health(desk: Desk) -> None:
    async with listening(desk, "first", "second", "dritté") as http:
        for path in ("/v2", "/v2/models/double", "/v2/nowhere", "/v2/models/stats"):
            refused = await http.get(path)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"] == "send the header 'authorization: Bearer <token>'"
        for wrong in ("Bearer third", "Basic first", "first", "Bearer", "Bearer first second"):
            headers = {"Authorization": wrong}
            assert (await http.post(INFER, json=asked(), headers=headers)).status_code == 401
        for token in ("Bearer first", "bearer second", "Bearer dritté"):
            said = {b"authorization": token.encode()}
            assert (await http.post(INFER, json=asked(), headers=said)).status_code == 200
        for path in ("/v2/health/live", "/v2/health/ready", "/health/ready", "/openapi.json"):
            assert (await http.get(path)).status_code == 200
        document = (await http.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
