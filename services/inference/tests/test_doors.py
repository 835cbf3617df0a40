"""The Open Inference Protocol on both doors, with everything a client can do wrong."""

import json
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from libs.contracts.protos import open_inference_pb2 as oip
from libs.objectstore import ObjectStore
from services.inference.tensors import CONTENTS
from services.inference.tests import stage
from services.inference.tests.conftest import ROW, Replica, labels, request
from services.inference.tests.stage import Platform
from stack.testing import eventually


@pytest.fixture
async def digits(replica: Replica, platform: Platform, objects: ObjectStore) -> Replica:
    """Serves version 1 of digits, batches of at most 8."""
    await platform.place()
    target = await stage.register(objects, 1, 100, stage.digits())
    await platform.deploy(1, target, max_batch_size=8)
    await replica.until_announced(1)
    return replica


def tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": ROW, **changes}


async def test_grpc_answers_in_the_form_it_was_asked(digits: Replica) -> None:
    answer = await digits.infer(ROW, ROW[::-1], id="mine")
    assert labels(answer) == [1, 2]
    assert (answer.id, answer.model_name, answer.model_version) == ("mine", "digits", "1")
    asked = request(ROW)
    asked.inputs[0].ClearField("contents")
    asked.raw_input_contents.append(np.array(ROW, np.float32).tobytes())
    raw = await digits.oip.ModelInfer(asked)
    assert np.frombuffer(raw.raw_output_contents[0], np.int64).tolist() == [1]
    assert [list(output.shape) for output in raw.outputs] == [[1], [1, 4]]
    assert len(raw.id) == 32, "an id is made where the client has none"


BAD_CALLS: list[tuple[dict[str, Any], str, str]] = [
    ({"model_name": "x"}, "NOT_FOUND", "Request for unknown model: 'x' is not found"),
    ({"model_version": "9"}, "NOT_FOUND", "unknown model: 'digits' version 9 is not found"),
    (
        {"model_version": "one"},
        "INVALID_ARGUMENT",
        "model_version: failed to get model version",
    ),
    ({"id": "x" * 257}, "INVALID_ARGUMENT", "id: at most 256 printable characters, got 257"),
    ({"inputs": [{"name": "pixel"}]}, "INVALID_ARGUMENT", "unexpected inference input 'pixel'"),
    ({"inputs": [{"shape": [1, 3]}]}, "INVALID_ARGUMENT", "Expected [-1,4], got [1,3]"),
    ({"inputs": [{"datatype": "INT64"}]}, "INVALID_ARGUMENT", "INT64 values belong into int64"),
    ({"inputs": []}, "INVALID_ARGUMENT", "expected 1 inputs but got 0 inputs"),
    ({"outputs": ["odds"]}, "INVALID_ARGUMENT", "unexpected inference output 'odds'"),
    ({"rows": 9}, "INVALID_ARGUMENT", "batch-size must be <= 8 for 'digits', got 9"),
    ({"raw": bytes(12)}, "INVALID_ARGUMENT", "Expected 16, got 12"),
    ({"raw": bytes(16), "twice": True}, "INVALID_ARGUMENT", "got 2 buffers for 1 inputs"),
    ({"raw": bytes(16), "both": True}, "INVALID_ARGUMENT", "contents field must not be"),
    ({"timeout": 1}, "UNAVAILABLE", "Request timeout expired"),
]


def bad_call(changes: dict[str, Any]) -> oip.ModelInferRequest:
    asked = request(*[ROW] * changes.get("rows", 1))
    for name in ("model_name", "model_version", "id"):
        setattr(asked, name, changes.get(name, getattr(asked, name)))
    for change in changes.get("inputs", []):
        for name in ("name", "datatype"):
            setattr(asked.inputs[0], name, change.get(name, getattr(asked.inputs[0], name)))
        asked.inputs[0].shape[:] = change.get("shape", asked.inputs[0].shape)
    if changes.get("inputs") == []:
        del asked.inputs[:]
    for name in changes.get("outputs", []):
        asked.outputs.add(name=name)
    if "raw" in changes:
        asked.raw_input_contents.extend([changes["raw"]] * (2 if "twice" in changes else 1))
        if "both" not in changes:
            asked.inputs[0].ClearField("contents")
    if "timeout" in changes:
        asked.parameters["timeout"].int64_param = changes["timeout"]
    return asked


async def test_grpc_refuses_with_a_code_and_the_name_of_what_is_wrong(digits: Replica) -> None:
    for changes, code, said in BAD_CALLS:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await digits.oip.ModelInfer(bad_call(changes))
        assert error.value.code().name == code, error.value.details()
        assert said in (error.value.details() or "")
        assert labels(await digits.infer(ROW)) == [1], "and the door is still open"


async def test_a_stream_answers_each_and_goes_on_after_an_error(digits: Replica) -> None:
    async def asked() -> Any:
        yield request(ROW, id="a")
        yield request(ROW[:3], id="b")
        yield request(ROW[::-1], id="c")

    answers = [answer async for answer in digits.oip.ModelStreamInfer(asked())]
    assert [one.infer_response.id for one in answers] == ["a", "b", "c"]
    assert "Expected [-1,4], got [1,3]" in answers[1].error_message
    assert labels(answers[2].infer_response) == [2]


async def test_grpc_describes_itself(digits: Replica) -> None:
    assert (await digits.oip.ServerLive(oip.ServerLiveRequest())).live
    assert (await digits.oip.ServerReady(oip.ServerReadyRequest())).ready
    assert (await digits.oip.ModelReady(oip.ModelReadyRequest(name="digits"))).ready
    assert not (await digits.oip.ModelReady(oip.ModelReadyRequest(name="x"))).ready
    server = await digits.oip.ServerMetadata(oip.ServerMetadataRequest())
    assert server.name == "leptonic"
    model = await digits.oip.ModelMetadata(oip.ModelMetadataRequest(name="digits"))
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [
        ("pixels", "FP32", [-1, 4])
    ]
    assert list(model.versions) == ["1"]
    await digits.infer(ROW, ROW)
    statistics = await digits.oip.ModelStatistics(oip.ModelStatisticsRequest(name="digits"))
    (known,) = statistics.model_stats
    assert (known.name, known.version, known.inference_count) == ("digits", "1", 2)
    assert (known.execution_count, known.inference_stats.success.count) == (1, 1)
    assert [one.batch_size for one in known.batch_stats] == [2]
    index = await digits.oip.RepositoryIndex(oip.RepositoryIndexRequest())
    assert [(m.name, m.version, m.state) for m in index.models] == [("digits", "1", "READY")]


async def test_health_and_reflection_are_on(digits: Replica) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{digits.settings.grpc_port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService")

        async def serving() -> bool:
            return bool((await health.Check(asked)).status == 1)

        await eventually(serving)
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        listing = reflection_pb2.ServerReflectionRequest(list_services="")

        async def once() -> Any:
            yield listing

        (answer,) = [one async for one in reflection.ServerReflectionInfo(once())]
        names = {service.name for service in answer.list_services_response.service}
        assert {"inference.GRPCInferenceService", "leptonic.v1.Inference"} <= names


async def test_http_answers_json(digits: Replica) -> None:
    answer = await digits.http.post("/v2/models/digits/infer", json={"inputs": [tensor()]})
    body = answer.json()
    assert (answer.status_code, body["model_name"], body["model_version"]) == (200, "digits", "1")
    label, probabilities = body["outputs"]
    assert (label["data"], label["datatype"], label["shape"]) == ([1], "INT64", [1])
    assert sum(probabilities["data"]) == pytest.approx(1)
    nested = tensor(shape=[2, 4], data=[ROW, ROW[::-1]])
    asked = {"id": "mine", "inputs": [nested], "outputs": [{"name": "label"}]}
    path = "/v2/models/digits/versions/1/infer"
    body = (await digits.http.post(path, json=asked)).json()
    assert (body["id"], [one["data"] for one in body["outputs"]]) == ("mine", [[1, 2]])


async def test_http_takes_and_gives_binary_tensors(digits: Replica) -> None:
    raw = np.array(ROW, np.float32).tobytes()
    asked: dict[str, Any] = {
        "inputs": [
            {
                "name": "pixels",
                "datatype": "FP32",
                "shape": [1, 4],
                "parameters": {"binary_data_size": 16},
            }
        ],
        "outputs": [
            {"name": "label"},
            {"name": "probabilities", "parameters": {"binary_data": True}},
        ],
    }
    head = json.dumps(asked).encode()
    answer = await digits.http.post(
        "/v2/models/digits/infer",
        content=head + raw,
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    length = int(answer.headers["Inference-Header-Content-Length"])
    body = json.loads(answer.content[:length])
    assert body["outputs"][0]["data"] == [1]
    assert body["outputs"][1]["parameters"] == {"binary_data_size": 16}
    assert np.frombuffer(answer.content[length:], np.float32).argmax() == 1


INFER = "/v2/models/digits/infer"
BAD_POSTS: list[tuple[str, Any, dict[str, str], int, str]] = [
    ("/v2/models/x/infer", {"inputs": [tensor()]}, {}, 404, "unknown model: 'x' is not found"),
    (INFER, b"{", {}, 400, "body: failed to parse the request JSON"),
    (INFER, b"[" * 100_000, {}, 400, "body: failed to parse"),
    (INFER, {"inputs": [{"name": "pixels"}]}, {}, 400, "$.inputs[0]"),
    (
        INFER,
        {"inputs": [tensor(data=ROW[:3])]},
        {},
        400,
        "got 3 values, expected 4 for FP32 [1,4]",
    ),
    (
        INFER,
        {"inputs": [tensor(data=["1", 2, 3, 4])]},
        {},
        400,
        "input 'pixels' holds a str, expected FP32 values",
    ),
    (
        INFER,
        {"inputs": [tensor(data=[1e300, 0, 0, 0])]},
        {},
        400,
        "input 'pixels' holds a value out of range for FP32",
    ),
    (
        INFER,
        {"inputs": [tensor(data=None, parameters={"binary_data_size": 16})]},
        {},
        400,
        "input 'pixels' says binary_data_size 16, 0 bytes are left",
    ),
    (
        INFER,
        {"inputs": [tensor()]},
        {"Inference-Header-Content-Length": "9999"},
        400,
        "Inference-Header-Content-Length: '9999' of a body of",
    ),
    (
        INFER,
        {"inputs": [tensor()]},
        {"Content-Encoding": "br"},
        415,
        "Content-Encoding",
    ),
    (INFER, bytes(65 << 20), {}, 413, "more than 67108864 bytes"),
]


async def test_http_refuses_with_a_status_and_the_name_of_what_is_wrong(digits: Replica) -> None:
    for path, body, headers, status, said in BAD_POSTS:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await digits.http.post(path, content=content, headers=headers)
        assert (answer.status_code, said in answer.json()["error"]) == (status, True), answer.text
        good = await digits.http.post(INFER, json={"inputs": [tensor()]})
        assert good.status_code == 200, "and the door is still open"


async def test_http_describes_itself(digits: Replica) -> None:
    async def get(path: str) -> Any:
        return (await digits.http.get(path)).json()

    assert await get("/v2/health/live") == {"live": True}
    assert await get("/v2/health/ready") == {"ready": True}
    assert (await get("/v2"))["name"] == "leptonic"
    assert (await get("/v2/models/digits"))["inputs"][0] == {
        "name": "pixels",
        "datatype": "FP32",
        "shape": [-1, 4],
    }
    assert await get("/v2/models/digits/versions/1/ready") == {"name": "digits", "ready": True}
    assert (await digits.http.get("/v2/models/x/ready")).status_code == 404
    await digits.infer(ROW)
    (known,) = (await get("/v2/models/digits/stats"))["model_stats"]
    assert (known["version"], known["inference_count"]) == ("1", 1)
    index = (await digits.http.post("/v2/repository/index")).json()
    assert index == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]


async def test_metrics_count_by_model_and_version(digits: Replica) -> None:
    await digits.infer(ROW)
    port = digits.settings.metrics_port
    text = (await digits.http.get(f"http://127.0.0.1:{port}/metrics")).text
    assert 'leptonic_inference_requests_total{model="digits",version="1"}' in text
    assert 'leptonic_inference_latency_seconds_count{model="digits",version="1"}' in text
    assert 'leptonic_inference_batch_rows_bucket{le="1.0",model="digits",version="1"}' in text


async def test_every_datatype_goes_through_both_ways(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    target = await stage.register(objects, 1, 100, stage.every_type(), stage.EVERY_TYPE, "types")
    await platform.place("types")
    await platform.deploy(1, target, model="types")
    await replica.until_announced(1, "types")
    values: dict[str, Any] = {
        "bool": [True, False],
        "uint8": [0, 255],
        "int32": [-(2**31), 2**31 - 1],
        "int64": [-(2**63), 2**63 - 1],
        "fp32": [0.5, -1.0],
        "fp64": [1e300, -0.1],
        "bytes": ["", "grüße"],
    }
    asked = {
        "inputs": [
            {"name": name, "datatype": name.upper(), "shape": [1, 2], "data": data}
            for name, data in values.items()
        ]
    }
    body = (await replica.http.post("/v2/models/types/infer", json=asked)).json()
    assert {one["name"].removesuffix("_out"): one["data"] for one in body["outputs"]} == values
    message = oip.ModelInferRequest(model_name="types")
    for name, data in values.items():
        one = message.inputs.add(name=name, datatype=name.upper(), shape=[1, 2])
        coded = [text.encode() for text in data] if name == "bytes" else data
        getattr(one.contents, CONTENTS[name.upper()]).extend(coded)
    answer = await replica.oip.ModelInfer(message)
    for output in answer.outputs:
        name = output.name.removesuffix("_out")
        back = list(getattr(output.contents, CONTENTS[name.upper()]))
        assert (back if name != "bytes" else [one.decode() for one in back]) == values[name]
