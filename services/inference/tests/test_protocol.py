"""The Open Inference Protocol over gRPC, call by call, as a client meets it."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from libs.contracts.protos import open_inference_pb2 as oip
from services.inference.sharedmemory import FOLDER
from services.inference.tensors import CONTENTS, DTYPES, Arrays, to_raw, to_values
from services.inference.tests.desk import (
    BROKEN,
    Desk,
    double,
    doubled,
    echo,
    number,
    numbers,
    opened,
    refused,
    request,
    row,
    three,
)
from services.inference.tests.fronts import kinds
from stack.testing import eventually

VALUES = {"BOOL": [[True, False]], "BYTES": [[b"a\0b", "é".encode()]]}


@pytest.fixture(params=kinds())
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    async with three(request.param) as made:
        yield made


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("datatype", sorted(DTYPES))
async def test_every_datatype_goes_both_ways(kind: str, datatype: str, batched: bool) -> None:
    array = np.array(VALUES.get(datatype, [[1, 2]]), DTYPES[datatype])
    raw = to_raw(datatype, array)
    async with opened(kind=kind) as desk:
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


@pytest.mark.parametrize(
    "asked",
    [
        request("d" * 5_000_000, b"", [1]),
        request("double", row(1, 2), [1] * 100_000),
        request("double", b"", [1 << 62, 2]),
        request("double", b"", [-1, 2]),
        changed(lambda asked: asked.outputs.add(name="z" * 5_000_000)),
    ],
)
async def test_the_absurd_gets_a_short_answer_and_hurts_nobody(
    desk: Desk, asked: oip.ModelInferRequest
) -> None:
    """A text of megabytes in a header would end the connection of everybody behind it."""
    asked.id = "mine"
    beside = desk.stub.ModelStreamInfer()
    code, said = await refused(desk.stub.ModelInfer(asked))
    assert code in ("NOT_FOUND", "INVALID_ARGUMENT")
    assert 20 < len(said) < 1100
    await beside.write(asked)
    assert (await beside.read()).error_message == said
    await beside.write(request("double", row(1, 2), [1, 2]))
    assert numbers((await beside.read()).infer_response) == [2, 4]
    await beside.done_writing()


async def test_classes_are_answered_instead_of_the_tensor(desk: Desk) -> None:
    answer = await desk.stub.ModelInfer(with_output(classification=2))
    (output,) = answer.outputs
    assert (output.datatype, list(output.shape)) == ("BYTES", [1, 2])
    told = [b"4.000000:1:right", b"2.000000:0:left"]
    assert answer.raw_output_contents[0] == to_raw("BYTES", np.array(told, object))


async def test_a_version_that_is_unloaded_meanwhile_still_names_its_classes(desk: Desk) -> None:
    model, running, go_on = double(), threading.Event(), threading.Event()

    def slowly(inputs: Arrays) -> Arrays:
        running.set()
        assert go_on.wait(60)
        return doubled(inputs)

    model.function = slowly
    await desk.serve("double", model, version="2")
    asked = asyncio.ensure_future(desk.stub.ModelInfer(with_output(classification=1)))
    assert await asyncio.to_thread(running.wait, 60)
    endpoint = desk.endpoints.find("double")
    endpoint.direct({"1": 100})
    unloading = asyncio.create_task(endpoint.unload("2"))
    await eventually(lambda: "2" not in endpoint.served)
    go_on.set()
    told = np.array([b"4.000000:1:right"], object)
    assert (await asked).raw_output_contents[0] == to_raw("BYTES", told)
    await unloading


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
    assert window.read("y", "FP32", [4]) == row(0, 1, 0, 2)
    said["shared_memory_byte_size"].int64_param = 16
    assert await refused(desk.stub.ModelInfer(asked)) == (
        "INVALID_ARGUMENT",
        "input byte size mismatch for input 'x'. Expected 8, got 16",
    )
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
