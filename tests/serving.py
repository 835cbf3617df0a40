"""The stand-alone server as a process, on a model repository that the test writes."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import onnx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto, helper, numpy_helper

from libs.contracts.protos import open_inference_pb2 as oip
from libs.contracts.protos import open_inference_pb2_grpc
from services.inference import native
from stack import ports
from stack.testing import eventually

NATIVE = pytest.mark.skipif(not native.available(), reason="leptonic_native is not built")
FRONTS = ("python", pytest.param("native", marks=NATIVE))
"""What a test of a running server is parametrised over."""
CALLERS = 64
WIDTH = 4
STOP_S = 30.0
STEP = 1000
"""Version n of `adding` answers with x + n * STEP."""
ADDING = """
max_batch_size: {rows}
backend: "onnxruntime"
input [{{ name: "x" data_type: TYPE_FP32 dims: [ {width} ] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [ {width} ] }}]
version_policy {{ specific {{ versions: [ {versions} ] }} }}
"""
PYTHON = """
backend: "python"
max_batch_size: {rows}
input [{{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [ 4 ] }}]
version_policy {{ latest {{ num_versions: 1 }} }}
"""


SLOW = """
import threading
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        threading.Event().wait(0.02)
        tensors = [pb_utils.get_input_tensor_by_name(one, "x") for one in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x.as_numpy())]) for x in tensors]
"""


def adding(version: int, weights: int = 0) -> bytes:
    """y = x + version * STEP, and as many more weights as it is told to hold."""
    info = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDTH]) for name in "xy"
    ]
    ballast = np.zeros(weights, np.float32)
    held = {"offset": np.float32(version * STEP), "ballast": ballast, "none": np.float32(0)}
    nodes = [
        helper.make_node("ReduceSum", ["ballast"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "none"], ["zero"]),
        helper.make_node("Add", ["x", "offset"], ["sure"]),
        helper.make_node("Add", ["sure", "zero"], ["y"]),
    ]
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()]
    made = helper.make_graph(nodes, "adding", info[:1], info[1:], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def write_adding(root: Path, versions: Sequence[int], name: str = "adding", rows: int = 64) -> None:
    (root / name).mkdir(parents=True)
    listed = ", ".join(map(str, versions))
    config = ADDING.format(rows=rows, width=WIDTH, versions=listed)
    (root / name / "config.pbtxt").write_text(config)
    for version in versions:
        (root / name / str(version)).mkdir()
        (root / name / str(version) / "model.onnx").write_bytes(adding(version, weights=1 << 20))


def write_python(root: Path, name: str, sources: dict[int, str], rows: int = 64) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(PYTHON.format(rows=rows))
    for version, source in sources.items():
        (root / name / str(version)).mkdir()
        (root / name / str(version) / "model.py").write_text(source)


class Server:
    """What a user knows of a running server: its doors and its process."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        log: Path,
        http: int,
        grpc_port: int,
        metrics: int,
    ) -> None:
        self.process = process
        self.log = log
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http}")
        self.metrics = httpx.AsyncClient(base_url=f"http://127.0.0.1:{metrics}")
        self.address = f"127.0.0.1:{grpc_port}"
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.health = health_pb2_grpc.HealthStub(self.channel)

    async def is_ready(self) -> bool:
        assert self.process.returncode is None, self.log.read_text()
        with contextlib.suppress(grpc.aio.AioRpcError):
            found = await self.health.Check(health_pb2.HealthCheckRequest())
            return bool(found.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    async def waiting(self) -> int:
        """Requests in the queues right now."""
        text = (await self.metrics.get("/metrics")).text
        lines = [one for one in text.splitlines() if one.startswith("nv_inference_pending_requ")]
        return sum(int(float(line.rpartition(" ")[2])) for line in lines)

    async def load(self, model: str, *versions: int) -> None:
        """Returns once these and no others are served."""
        asked = oip.RepositoryModelLoadRequest(model_name=model)
        config = {
            "name": model,
            "backend": "onnxruntime",
            "max_batch_size": 64,
            "version_policy": {"specific": {"versions": versions}},
        }
        asked.parameters["config"].string_param = json.dumps(config)
        await self.stub.RepositoryModelLoad(asked)

    async def infer(self, *rows: float, model: str = "adding", version: str = "") -> Any:
        return await self.stub.ModelInfer(request(*rows, model=model, version=version))

    def resident_mib(self) -> float:
        """Of the process and of those it started, shared pages divided among them."""
        return sum(pss_kib(pid) for pid in family(self.process.pid)) / 1024


def request(*rows: float, model: str = "adding", version: str = "") -> oip.ModelInferRequest:
    asked = oip.ModelInferRequest(model_name=model, model_version=version)
    asked.inputs.add(name="x", datatype="FP32", shape=[len(rows), WIDTH])
    asked.raw_input_contents.append(np.repeat(np.array(rows, np.float32), WIDTH).tobytes())
    return asked


def answer(response: oip.ModelInferResponse) -> list[float]:
    """The first number of each row."""
    flat = np.frombuffer(response.raw_output_contents[0], np.float32)
    return [float(one) for one in flat.reshape(-1, WIDTH)[:, 0]]


def family(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid, *(one for child in path.read_text().split() for one in family(int(child)))]


def pss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


class Load:
    """Callers that ask again and again; every answer is checked."""

    def __init__(self, server: Server, model: str) -> None:
        self.server = server
        self.model = model
        self.numbers = count()
        self.allowed = {"1"}
        """Versions that may answer a request that is sent now."""
        self.answered = 0
        self.wrong: list[str] = []

    async def call(self) -> None:
        while True:
            number, allowed = float(next(self.numbers) % STEP), set(self.allowed)
            response = await self.server.infer(number, model=self.model)
            allowed |= self.allowed
            expected = [number + int(response.model_version) * STEP]
            if response.model_version not in allowed or answer(response) != expected:
                self.wrong.append(f"{number}: version {response.model_version}: {answer(response)}")
            self.answered += 1

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A call that fails ends the block with its error."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.call()) for _ in range(CALLERS)]
            yield
            for task in tasks:
                task.cancel()

    async def some_more(self, answers: int = CALLERS) -> None:
        wanted = self.answered + answers
        await eventually(lambda: self.answered >= wanted)


@contextlib.asynccontextmanager
async def serving(
    root: Path, folder: Path, *options: str, front: str = "auto"
) -> AsyncIterator[Server]:
    """Runs until the block ends. `folder` takes its log."""
    http_port, grpc_port, metrics_port = ports.free(3)
    doors = [f"--http-port={http_port}", f"--grpc-port={grpc_port}"]
    command = [sys.executable, "-m", "services.inference.serve", str(root), *doors]
    log = folder / "serve.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            f"--metrics-port={metrics_port}",
            *options,
            env={**os.environ, "LEPTONIC_INFERENCE_FRONT": front},
            stdout=output,
            stderr=output,
        )
    server = Server(process, log, http_port, grpc_port, metrics_port)
    try:
        await eventually(server.is_ready, timeout_s=STOP_S)
        yield server
    finally:
        await server.channel.close()
        await server.http.aclose()
        await server.metrics.aclose()
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_S):
            await process.wait()
