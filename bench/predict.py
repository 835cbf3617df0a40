"""One prediction over gRPC, against onnxruntime in this process and against an empty grpc.aio echo.

Server and echo run on one core, the client on the other. All three answer the same batch-1 requests
for the digits MLP; the rounds alternate.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

import grpc
import msgspec
import numpy as np
import onnxruntime

from libs.contracts.artifacts import ModelManifest
from libs.contracts.protos.open_inference_pb2 import ModelInferRequest
from libs.objectstore import ObjectStore
from tests.running import Stack, digits, digits_pipeline, publish, stranger

MODEL = "bench-predict"
ROUNDS = 5
ONE_BY_ONE = 1000
CONCURRENT = 4000
CONCURRENCY = 16
Call = Callable[[], Awaitable[Any]]


async def measure(stack: Stack) -> list[dict[str, Any]]:
    await stack.apply(digits_pipeline(MODEL, 600))
    async with stranger(stack) as bus:
        await publish(bus, MODEL, digits(0, 600))
    await stack.event("deployment.ready", lambda data: data["model"] == MODEL)
    session = await session_of(stack)
    row = np.array([digits(1000, 1)[0]["pixels"]], dtype=np.float32)
    cores = sorted(os.sched_getaffinity(0))
    pin(stack.pid("inference"), cores[-1])
    with pinned(cores[0]), echo_server(cores[-1]) as port:
        async with (
            grpc.aio.insecure_channel(stack.endpoint("inference_grpc")) as served,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as empty,
        ):
            return await compare(session, row, calls(served, row), calls(empty, row))


async def session_of(stack: Stack) -> onnxruntime.InferenceSession:
    secrets = stack.state["secrets"]
    objects = ObjectStore(
        stack.endpoint("s3"), secrets["s3_access_key"], secrets["s3_secret_key"], "leptonic"
    )
    found = await stack.get("registry", f"/v1/projects/default/models/{MODEL}/versions/@champion")
    manifest = msgspec.json.decode(await objects.get_blob(found["digest"]), type=ModelManifest)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(await objects.get_blob(manifest.graph.digest), options)


def calls(channel: grpc.aio.Channel, row: np.ndarray[Any, Any]) -> Call:
    """Ready-made bytes, so that the client costs the same towards every server."""
    request = ModelInferRequest(model_name=MODEL)
    request.inputs.add(name="pixels", datatype="FP32", shape=row.shape)
    request.raw_input_contents.append(row.tobytes())
    body = request.SerializeToString()
    method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
    method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    return lambda: method(body)


async def compare(
    session: onnxruntime.InferenceSession, row: np.ndarray[Any, Any], ours: Call, echo: Call
) -> list[dict[str, Any]]:
    latency: dict[str, list[float]] = {"ours": [], "echo": [], "onnxruntime": []}
    rate: dict[str, list[float]] = {"ours": [], "echo": [], "onnxruntime": []}
    for _ in range(ROUNDS):
        for name, call in (("echo", echo), ("ours", ours)):
            latency[name].append(await p50_us(call))
            rate[name].append(await requests_a_second(call))
        spent = [timed(lambda: session.run(None, {"pixels": row})) for _ in range(ONE_BY_ONE)]
        latency["onnxruntime"].append(median(spent) * 1e6)
        rate["onnxruntime"].append(ONE_BY_ONE / sum(spent))
    rows = []
    for floor, label in (
        ("echo", "empty grpc.aio echo"),
        ("onnxruntime", "onnxruntime in process"),
    ):
        rows.append(row_of(f"predict p50, us, against {label}", latency, floor))
        rows.append(row_of(f"predict requests/s x{CONCURRENCY}, against {label}", rate, floor))
    return rows


def row_of(what: str, figures: dict[str, list[float]], floor: str) -> dict[str, Any]:
    ratio = median(a / b for a, b in zip(figures["ours"], figures[floor], strict=True))
    return {
        "what": what,
        "ours": f"{median(figures['ours']):,.0f}",
        "floor": f"{median(figures[floor]):,.0f}",
        "ratio": f"{ratio:.3f}",
        "against": floor,
    }


def timed(work: Callable[[], Any]) -> float:
    started = perf_counter()
    work()
    return perf_counter() - started


async def p50_us(call: Call) -> float:
    spent = []
    for _ in range(ONE_BY_ONE):
        started = perf_counter()
        await call()
        spent.append(perf_counter() - started)
    return median(spent) * 1e6


async def requests_a_second(call: Call) -> float:
    async def many() -> None:
        for _ in range(CONCURRENT // CONCURRENCY):
            await call()

    started = perf_counter()
    await asyncio.gather(*(many() for _ in range(CONCURRENCY)))
    return CONCURRENT / (perf_counter() - started)


def pin(pid: int, core: int) -> None:
    """Every thread of the process."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def echo_server(core: int) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.echo"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        pin(process.pid, core)
        yield port
    finally:
        process.terminate()
        process.wait()
