"""The whole Open Inference Protocol over gRPC, as a client meets it."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from libs.contracts.protos import open_inference_pb2 as oip
from services.inference.sharedmemory import FOLDER
from services.inference.streams import PENDING_MAX
from services.inference.tensors import CONTENTS, DTYPES, to_raw, to_values
from services.inference.tests.desk import (
    BROKEN,
    RATES,
    STATEFUL,
    Desk,
    counter,
    double,
    echo,
    number,
    opened,
    request,
    row,
    running_sum,
)
from stack.testing import eventually

VALUES = {"BOOL": [[True, False]], "BYTES": [[b"a\0b", "é".encode()]]}


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with opened() as made:
        await made.serve("double", double())
        await made.serve("counter", counter())
        await made.serve("sum", running_sum(), STATEFUL)
        yield made


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code().name, error.value.details() or ""


def numbers(answer: oip.ModelInferResponse, kind: Any = np.float32) -> list[Any]:
    return list(np.frombuffer(answer.raw_output_contents[0], kind))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("datatype", sorted(DTYPES))
async def test_every_datatype_goes_both_ways(datatype: str, batched: bool) -> None:
    array = np.array(VALUES.get(datatype, [[1, 2]]), DTYPES[datatype])
    raw = to_raw(datatype, array)
    async with opened() as desk:
        await desk.serve("echo", echo(datatype, [-1 if batched else 1, 2], batched=batched))
        answer = await desk.stub.ModelInfer(request("echo", raw, [1, 2], datatype))
        (output,) = answer.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("y", datatype, [1, 2])
        assert list(answer.raw_output_contents) == [raw]
        if datatype in CONTENTS:
            asked = oip.ModelInferRequest(model_name="echo")
            contents = {CONTENTS[datatype]: to_values(datatype, array)}
            asked.inputs.add(name="x", datatype=datatype, shape=[1, 2], contents=contents)
            answer = await desk.stub.ModelInfer(asked)
            assert not answer.raw_output_contents
            assert answer.outputs[0].contents == oip.InferTensorContents(**contents)


async def test_a_server_and_its_models_are_described(desk: Desk) -> None:
    live = await desk.stub.ServerLive(oip.ServerLiveRequest())
    ready = await desk.stub.ServerReady(oip.ServerReadyRequest())
    assert (live.live, ready.ready) == (True, True)
    server = await desk.stub.ServerMetadata(oip.ServerMetadataRequest())
    assert (server.name, "classification" in server.extensions) == ("triton", True)
    for name, is_ready in (("double", True), ("nobody", False)):
        found = await desk.stub.ModelReady(oip.ModelReadyRequest(name=name))
        assert found.ready is is_ready
    model = await desk.stub.ModelMetadata(oip.ModelMetadataRequest(name="sum"))
    assert (model.platform, list(model.versions)) == ("python", ["1"])
    assert [(one.name, list(one.shape)) for one in model.inputs] == [("x", [-1, 1])]


async def test_a_configuration_is_the_one_given_or_made_from_what_is_served(desk: Desk) -> None:
    given = await desk.stub.ModelConfig(oip.ModelConfigRequest(name="sum"))
    assert given.config.sequence_batching.state[0].output_name == "after"
    made = (await desk.stub.ModelConfig(oip.ModelConfigRequest(name="double"))).config
    assert (made.name, made.max_batch_size, list(made.input[0].dims)) == ("double", 8, [2])
    assert made.dynamic_batching.default_queue_policy.max_queue_size == 1024


async def test_statistics_are_what_happened(desk: Desk) -> None:
    for rows in (1, 3):
        await desk.stub.ModelInfer(request("double", row(*[1] * 2 * rows), [rows, 2]))
    await refused(desk.stub.ModelInfer(request("double", row(BROKEN, 0), [1, 2])))
    await refused(desk.stub.ModelInfer(request("double", row(1), [1, 1])))
    asked = oip.ModelStatisticsRequest(name="double", version="1")
    (found,) = (await desk.stub.ModelStatistics(asked)).model_stats
    assert (found.inference_count, found.execution_count) == (4, 2)
    stats = found.inference_stats
    assert (stats.success.count, stats.fail.count, stats.queue.count) == (2, 2, 2)
    assert stats.compute_infer.count == 2
    assert stats.success.ns >= stats.queue.ns + stats.compute_infer.ns > 0
    assert [(one.batch_size, one.compute_infer.count) for one in found.batch_stats] == [
        (1, 1),
        (3, 1),
    ]
    assert found.last_inference > 0
    every = await desk.stub.ModelStatistics(oip.ModelStatisticsRequest())
    assert {one.name for one in every.model_stats} == {"double", "counter", "sum"}


def with_output(**parameters: int | str) -> oip.ModelInferRequest:
    asked = request("double", row(1, 2), [1, 2])
    output = asked.outputs.add(name="y")
    for name, value in parameters.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(output.parameters[name], kind, value)
    return asked


def changed(change: Any) -> oip.ModelInferRequest:
    asked = request("double", row(1, 2), [1, 2])
    change(asked)
    return asked


def typed_too(asked: oip.ModelInferRequest) -> None:
    asked.inputs[0].contents.fp32_contents.extend([1, 2])


def in_the_wrong_field(asked: oip.ModelInferRequest) -> None:
    del asked.raw_input_contents[:]
    asked.inputs[0].contents.int_contents.extend([1, 2])


BAD: list[tuple[oip.ModelInferRequest, str, str]] = [
    (request("nobody", b"", [1]), "NOT_FOUND", "Request for unknown model: 'nobody' is not found"),
    (request("counter", b"", [1]), "UNIMPLEMENTED", "decoupled transaction policy"),
    (request("double", row(1), [1, 2]), "INVALID_ARGUMENT", "Expected 8, got 4"),
    (request("double", row(1), [1, 1]), "INVALID_ARGUMENT", "unexpected shape for input 'x'"),
    (request("double", row(1, 2), [1, 2], "FP64"), "INVALID_ARGUMENT", "data-type is 'FP64'"),
    (request("double", row(*[1] * 18), [9, 2]), "INVALID_ARGUMENT", "batch-size must be <= 8"),
    (request("double", row(BROKEN, 0), [1, 2]), "INTERNAL", "'double' version 1 failed: it cannot"),
    (request("sum", number(1), [1, 1], "INT32"), "INVALID_ARGUMENT", "non-empty correlation ID"),
    (
        request("sum", number(1), [1, 1], "INT32", sequence_id=4),
        "INVALID_ARGUMENT",
        "sequence 4 to model 'sum' must specify the START flag",
    ),
    (
        request("sum", number(1) * 2, [2, 1], "INT32", sequence_id=4, sequence_start=True),
        "INVALID_ARGUMENT",
        "must specify batch-size 1 due to requirements of sequence",
    ),
    (
        request("double", row(1, 2), [1, 2], triton_new=True),
        "INVALID_ARGUMENT",
        "parameter keys starting with 'triton_' are reserved",
    ),
    (
        request("double", row(1, 2), [1, 2], triton_enable_empty_final_response=1),
        "INVALID_ARGUMENT",
        "expected bool_param",
    ),
    (request("double", row(1, 2), [1, 2], timeout=-1), "INVALID_ARGUMENT", "parameters.timeout"),
    (changed(typed_too), "INVALID_ARGUMENT", "contents field must not be specified when using"),
    (changed(in_the_wrong_field), "INVALID_ARGUMENT", "belong into fp32_contents"),
    (
        changed(lambda asked: asked.raw_input_contents.append(b"")),
        "INVALID_ARGUMENT",
        "raw_input_contents: got 2 buffers for 1 inputs",
    ),
    (
        changed(lambda asked: asked.ClearField("raw_input_contents")),
        "INVALID_ARGUMENT",
        "unable to find data for input tensor 'x' for model 'double' in request.",
    ),
    (
        changed(lambda asked: asked.parameters["key"].Clear()),
        "INVALID_ARGUMENT",
        "invalid value type for 'key' parameter",
    ),
    (
        changed(lambda asked: asked.outputs.add(name="z")),
        "INVALID_ARGUMENT",
        "unexpected inference output 'z' for model 'double'",
    ),
    (with_output(classification=0), "INVALID_ARGUMENT", "must be at least 1"),
    (
        with_output(shared_memory_region="no", shared_memory_byte_size=8),
        "NOT_FOUND",
        "Unable to find shared memory region: 'no'",
    ),
]


@pytest.mark.parametrize(("asked", "code", "said"), BAD)
async def test_what_is_wrong_is_told_in_the_protocols_words(
    desk: Desk, asked: oip.ModelInferRequest, code: str, said: str
) -> None:
    found = await refused(desk.stub.ModelInfer(asked))
    assert found[0] == code
    assert said in found[1]


async def test_classes_are_answered_instead_of_the_tensor(desk: Desk) -> None:
    answer = await desk.stub.ModelInfer(with_output(classification=2))
    (output,) = answer.outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", [1, 2])
    told = [b"4.000000:1:right", b"2.000000:0:left"]
    assert answer.raw_output_contents[0] == to_raw("BYTES", np.array(told, object))


@pytest.fixture
def file() -> Iterator[Path]:
    path = FOLDER / f"leptonic-protocol-{os.getpid()}"
    path.write_bytes(row(0, 1, 2, 3))
    yield path
    path.unlink()


async def test_tensors_lie_in_shared_memory(desk: Desk, file: Path) -> None:
    register = oip.SystemSharedMemoryRegisterRequest(name="r", key=file.name, byte_size=16)
    await desk.stub.SystemSharedMemoryRegister(register)
    asked = with_output(shared_memory_region="r", shared_memory_byte_size=8, shared_memory_offset=8)
    del asked.raw_input_contents[:]
    said = asked.inputs[0].parameters
    said["shared_memory_region"].string_param = "r"
    said["shared_memory_byte_size"].int64_param = 8
    answer = await desk.stub.ModelInfer(asked)
    assert list(answer.raw_output_contents) == [b""]
    parameters = answer.outputs[0].parameters
    assert parameters["shared_memory_region"].string_param == "r"
    assert parameters["shared_memory_offset"].int64_param == 8
    window = desk.service.memory.within("r", 16, 0)
    assert window.read() == row(0, 1, 0, 2)
    small = with_output(shared_memory_region="r", shared_memory_byte_size=4)
    assert await refused(desk.stub.ModelInfer(small)) == (
        "INTERNAL",
        "shared memory size specified with the request for output 'y' (4 bytes) should be at "
        "least 8 bytes to hold the results",
    )
    status = await desk.stub.SystemSharedMemoryStatus(oip.SystemSharedMemoryStatusRequest())
    assert status.regions["r"] == oip.SystemSharedMemoryStatusResponse.RegionStatus(
        name="r", key=file.name, byte_size=16
    )
    again = await refused(desk.stub.SystemSharedMemoryRegister(register))
    assert again == ("ALREADY_EXISTS", "shared memory region 'r' already in manager")
    await desk.stub.SystemSharedMemoryUnregister(oip.SystemSharedMemoryUnregisterRequest(name="r"))
    gone = desk.stub.SystemSharedMemoryStatus(oip.SystemSharedMemoryStatusRequest(name="r"))
    assert (await refused(gone))[0] == "NOT_FOUND"


async def test_there_is_no_memory_of_a_gpu(desk: Desk) -> None:
    status = await desk.stub.CudaSharedMemoryStatus(oip.CudaSharedMemoryStatusRequest())
    assert not status.regions
    await desk.stub.CudaSharedMemoryUnregister(oip.CudaSharedMemoryUnregisterRequest())
    register = oip.CudaSharedMemoryRegisterRequest(name="r", byte_size=8)
    code, said = await refused(desk.stub.CudaSharedMemoryRegister(register))
    assert (code, "GPUs not supported" in said) == ("INVALID_ARGUMENT", True)
    named = desk.stub.CudaSharedMemoryStatus(oip.CudaSharedMemoryStatusRequest(name="r"))
    assert (await refused(named))[0] == "NOT_FOUND"


async def streamed(desk: Desk, *asked: oip.ModelInferRequest) -> list[oip.ModelStreamInferResponse]:
    return [one async for one in desk.stub.ModelStreamInfer(iter(asked))]


def is_final(answer: oip.ModelStreamInferResponse) -> bool:
    return answer.infer_response.parameters["triton_final_response"].bool_param


async def test_a_stream_answers_in_order_and_shares_batches(desk: Desk) -> None:
    count = 3 * PENDING_MAX
    model = desk.endpoints.served("double", "").model
    asked = [request("double", row(n, 0), [1, 2]) for n in range(count)]
    for n, one in enumerate(asked):
        one.id = f"r{n}"
    answers = await streamed(desk, *asked)
    assert [one.infer_response.id for one in answers] == [f"r{n}" for n in range(count)]
    assert [numbers(one.infer_response)[0] for one in answers] == [2 * n for n in range(count)]
    assert all(is_final(one) for one in answers)
    assert max(model.rows) > 1  # type: ignore[attr-defined]


async def test_an_error_in_a_stream_is_an_answer(desk: Desk) -> None:
    bad = request("nobody", b"", [1])
    bad.id = "mine"
    answers = await streamed(desk, request("double", row(1, 2), [1, 2]), bad, bad)
    assert [bool(one.error_message) for one in answers] == [False, True, True]
    assert answers[1].error_message == "Request for unknown model: 'nobody' is not found"
    assert answers[1].infer_response.id == "mine"


@pytest.mark.parametrize("empty_final", [True, False])
async def test_a_decoupled_model_answers_as_often_as_it_likes(
    desk: Desk, empty_final: bool
) -> None:
    said = {"triton_enable_empty_final_response": empty_final}
    asked = [request("counter", number(n), [1], "INT32", **said) for n in (3, 0)]
    asked[0].id, asked[1].id = "three", "none"
    answers = [one.infer_response for one in await streamed(desk, *asked)]
    three = [one for one in answers if one.id == "three"]
    assert [numbers(one, np.int32) for one in three if one.outputs] == [[0], [1], [2]]
    finals = [one.id for one in answers if one.parameters["triton_final_response"].bool_param]
    assert sorted(finals) == (["none", "three"] if empty_final else [])
    assert all(one.model_version == "1" for one in answers)


async def test_a_decoupled_model_that_fails_says_so(desk: Desk) -> None:
    (answer,) = await streamed(desk, request("counter", number(BROKEN), [1], "INT32"))
    assert answer.error_message == "model 'counter' version 1 failed: it cannot"


async def test_many_answers_wait_for_a_slow_reader(desk: Desk) -> None:
    stream = desk.stub.ModelStreamInfer(iter([request("counter", number(500), [1], "INT32")]))
    found = [numbers((await stream.read()).infer_response, np.int32)[0] for _ in range(500)]
    assert found == list(range(500))
    stream.cancel()


async def test_a_sequence_keeps_its_state_over_a_stream_and_over_calls(desk: Desk) -> None:
    asked = [
        request("sum", number(x), [1, 1], "INT32", sequence_id=sequence, **said)
        for x, said in ((1, {"sequence_start": True}), (2, {}), (3, {"sequence_end": True}))
        for sequence in (7, "seven")
    ]
    answers = [numbers(one.infer_response, np.int32)[0] for one in await streamed(desk, *asked)]
    assert answers == [1, 1, 3, 3, 6, 6]
    calls = [numbers(await desk.stub.ModelInfer(one), np.int32)[0] for one in asked]
    assert calls == [1, 1, 3, 3, 6, 6]


async def test_deployments_decide_what_is_loaded(desk: Desk) -> None:
    index = await desk.stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=True))
    assert {(one.name, one.version, one.state) for one in index.models} == {
        ("double", "1", "READY"),
        ("counter", "1", "READY"),
        ("sum", "1", "READY"),
    }
    load = desk.stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="m"))
    assert await refused(load) == (
        "FAILED_PRECONDITION",
        "failed to load 'm': deployments decide what is served here",
    )
    unload = desk.stub.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="m"))
    assert (await refused(unload))[0] == "FAILED_PRECONDITION"
    named = oip.RepositoryIndexRequest(repository_name="other")
    assert (await refused(desk.stub.RepositoryIndex(named)))[0] == "UNIMPLEMENTED"


class Shelf:
    """A repository that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def load(self, name: str, config: str = "", files: Mapping[str, bytes] = {}) -> None:
        self.asked.append((name, config, dict(files)))

    async def unload(self, name: str) -> None:
        self.asked.append(name)

    def index(self, ready_only: bool) -> list[tuple[str, str, str, str]]:
        return [("m", "", "UNAVAILABLE", "unloaded")]


async def test_a_repository_is_told_what_to_load() -> None:
    shelf = Shelf()
    async with opened(shelf) as desk:
        load = oip.RepositoryModelLoadRequest(model_name="m")
        load.parameters["config"].string_param = "{}"
        load.parameters["file:1/model.onnx"].bytes_param = b"graph"
        await desk.stub.RepositoryModelLoad(load)
        unload = oip.RepositoryModelUnloadRequest(model_name="m")
        unload.parameters["unload_dependents"].bool_param = True
        await desk.stub.RepositoryModelUnload(unload)
        assert shelf.asked == [("m", "{}", {"file:1/model.onnx": b"graph"}), "m"]
        index = await desk.stub.RepositoryIndex(oip.RepositoryIndexRequest())
        assert index.models[0].reason == "unloaded"
        load.parameters["config"].bytes_param = b"{}"
        code, said = await refused(desk.stub.RepositoryModelLoad(load))
        expected = "invalid value type for 'config' parameter, expected string_param."
        assert (code, said) == ("INVALID_ARGUMENT", expected)
        load.parameters["other"].bool_param = True
        assert (await refused(desk.stub.RepositoryModelLoad(load)))[0] == "INVALID_ARGUMENT"


async def trace(desk: Desk, model: str = "", **changes: list[str]) -> dict[str, list[str]]:
    asked = oip.TraceSettingRequest(model_name=model)
    for name, values in changes.items():
        asked.settings[name].value.extend(values)
        asked.settings[name].SetInParent()
    found = await desk.stub.TraceSetting(asked)
    return {name: list(one.value) for name, one in found.settings.items()}


async def test_trace_settings_change_what_is_traced(desk: Desk) -> None:
    def rates(model: str) -> float:
        return desk.endpoints.served(model, "").rates.traces_per_s

    before = await trace(desk)
    assert before == {
        "trace_level": ["TIMESTAMPS"],
        "trace_rate": ["1"],
        "trace_count": ["-1"],
        "log_frequency": ["0"],
        "trace_file": [""],
        "trace_mode": ["opentelemetry"],
    }
    assert (await trace(desk, trace_rate=["3"]))["trace_rate"] == ["3"]
    assert rates("double") == rates("sum") == RATES.traces_per_s / 3
    assert (await trace(desk, "double", trace_level=["OFF"]))["trace_level"] == ["OFF"]
    assert (rates("double"), rates("sum")) == (0, RATES.traces_per_s / 3)
    await desk.serve("double", double(), version="2")
    assert rates("double") == 0
    assert (await trace(desk, "double", trace_level=[]))["trace_level"] == ["TIMESTAMPS"]
    assert await trace(desk, trace_rate=[]) == before
    assert rates("double") == RATES.traces_per_s


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("", {"trace_rate": ["0"]}, "trace_rate: one whole number from 1"),
        ("", {"trace_rate": ["1", "2"]}, "trace_rate: one whole number"),
        ("", {"trace_level": ["TENSORS"]}, "trace_level: OFF or TIMESTAMPS, got TENSORS"),
        ("", {"trace_file": ["/tmp/x"]}, "trace_file is '' here and cannot be changed"),  # noqa: S108 - refused
        ("", {"trace_count": ["5"]}, "trace_count is '-1' here"),
        ("", {"else": ["5"]}, "unknown trace setting: 'else'"),
        ("nobody", {}, "Request for unknown model: 'nobody'"),
    ],
)
async def test_trace_settings_that_mean_nothing_are_refused(
    desk: Desk, model: str, changes: dict[str, list[str]], said: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await trace(desk, model, **changes)
    assert said in str(error.value.details())


@pytest.fixture
def log_level() -> Iterator[None]:
    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    yield
    logging.getLogger().setLevel(before)


async def log(desk: Desk, **changes: Any) -> dict[str, Any]:
    asked = oip.LogSettingsRequest()
    for name, value in changes.items():
        kinds = {bool: "bool_param", int: "uint32_param", str: "string_param"}
        setattr(asked.settings[name], kinds[type(value)], value)
    found = await desk.stub.LogSettings(asked)
    return {n: getattr(v, v.WhichOneof("parameter_choice")) for n, v in found.settings.items()}


async def test_log_settings_change_what_is_written(log_level: None) -> None:
    root = logging.getLogger()
    async with opened() as desk:
        assert await log(desk) == {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
        }
        assert (await log(desk, log_verbose_level=1))["log_verbose_level"] == 1
        assert root.level == logging.DEBUG
        assert not (await log(desk, log_verbose_level=0, log_info=False))["log_info"]
        assert root.level == logging.WARNING
        await log(desk, log_warning=False, log_error=False)
        assert not root.isEnabledFor(logging.CRITICAL)
        for name, value in {
            "log_file": "x",
            "log_info": 1,
            "log_verbose_level": "1",
            "no": 1,
        }.items():
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                await log(desk, **{name: value})


async def test_a_client_that_goes_takes_its_stream_with_it(desk: Desk) -> None:
    asked = asyncio.Event()

    async def requests() -> AsyncIterator[oip.ModelInferRequest]:
        yield request("counter", number(1_000_000), [1], "INT32")
        asked.set()
        await asyncio.Event().wait()

    stream = desk.stub.ModelStreamInfer(requests())
    await stream.read()
    await asked.wait()
    stream.cancel()
    served = desk.endpoints.served("counter", "")
    await eventually(lambda: served.streams == 0)
