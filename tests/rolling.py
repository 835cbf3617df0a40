"""Steady load on every door at once, of clients that try nothing twice, and what became of it."""

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import httpx
import pyarrow.parquet as pq
from pyarrow import BufferReader

from libs.bus import PublishFailed
from libs.bus.jetstream import JetStreamBus
from libs.contracts.protos import (
    ingest_pb2,
    ingest_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
    preprocess_pb2,
    preprocess_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)
from libs.objectstore import ObjectStore
from tests.running import Stack, digits

LEPTONIC = Path(sys.executable).with_name("leptonic")
MODEL = "digits"
DATASET = "rolled"
ROWS = 50
JOBS_MAX = 300
PAGE = 1000
PAUSE_S = 0.03
"""Of a caller between two requests: a steady load leaves room for what takes over to start."""
TIMEOUT_S = 60.0
"""Longer than anything waits: what is slow is told, not failed."""
FAILURES = (grpc.aio.AioRpcError, httpx.HTTPError, PublishFailed, AssertionError)

Call = Callable[[int], Awaitable[None]]
"""Makes the so manieth request of its caller; raises one of `FAILURES`."""
Connect = Callable[["Load", contextlib.AsyncExitStack], Awaitable[Call]]


@dataclass
class Tally:
    """What became of the requests at one door."""

    sent: int = 0
    failed: list[str] = field(default_factory=list)
    slowest_s: float = 0.0


def pipeline() -> dict[str, Any]:
    """A dataset whose records say which they are, and which nothing is made of."""
    schema = {"serial": {"type": "int64"}, "label": {"type": "int64", "role": "label"}}
    return {
        "pipeline": DATASET,
        "dataset": {"name": DATASET, "schema": schema},
        "preprocess": [{"split": {"test": 0.2, "seed": 7}}],
        "train": {"recipe": "mlp"},
        "deployment": {"model": DATASET},
        "triggers": {"records": 1_000_000_000},
    }


class Load:
    """Callers at every door, until told to end."""

    def __init__(self, stack: Stack, bus: JetStreamBus) -> None:
        self.stack = stack
        self.bus = bus
        self.tallies: dict[str, Tally] = {}
        self.ended = asyncio.Event()
        self.rows = [row["pixels"] for row in digits(1000, ROWS)]
        self.expected: list[int] = []
        self.serial = 0
        self.acked: set[int] = set()
        """Serials of records that some door has accepted."""
        self.jobs: set[str] = set()
        """Names of jobs that the scheduler has accepted."""

    @property
    def sent(self) -> int:
        return sum(tally.sent for tally in self.tallies.values())

    @property
    def failed(self) -> list[str]:
        return [f"{door}: {one}" for door, t in self.tallies.items() for one in t.failed]

    async def ask(self, door: str, call: Call) -> None:
        """One request after the other, each tried once."""
        tally = self.tallies.setdefault(door, Tally())
        number = 0
        while not self.ended.is_set():
            began = monotonic()
            try:
                await call(number)
            except FAILURES as error:
                tally.failed.append(f"{type(error).__name__}: {error}"[:300])
            number += 1
            tally.sent += 1
            tally.slowest_s = max(tally.slowest_s, monotonic() - began)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self.ended.wait()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as connections, asyncio.TaskGroup() as group:
            self.expected = await labels_before(self, connections)
            for door, (count, connect) in DOORS.items():
                for _ in range(count):
                    call = await connect(self, connections)
                    group.create_task(self.ask(door, call))
            try:
                yield
            finally:
                self.ended.set()

    def next_serial(self) -> int:
        self.serial += 1
        return self.serial

    def is_right(self, number: int, label: int) -> None:
        assert label == self.expected[number % ROWS], f"{label} for row {number % ROWS}"


async def http(load: Load, connections: contextlib.AsyncExitStack, name: str) -> httpx.AsyncClient:
    """One keep-alive connection."""
    client = httpx.AsyncClient(
        base_url=load.stack.endpoint(name),
        timeout=TIMEOUT_S,
        limits=httpx.Limits(max_connections=1),
    )
    return await connections.enter_async_context(client)


async def channel(
    load: Load, connections: contextlib.AsyncExitStack, name: str
) -> grpc.aio.Channel:
    """One connection, as any client opens it: no retry policy, no options."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.insecure_channel(load.stack.endpoint(f"{name}_grpc"), options=own)
    return await connections.enter_async_context(channel)


async def infer_over_http(load: Load, connections: contextlib.AsyncExitStack) -> Call:
    client = await http(load, connections, "inference_http")

    async def call(number: int) -> None:
        row = load.rows[number % ROWS]
        tensor = {"name": "pixels", "datatype": "FP32", "shape": [1, len(row)], "data": row}
        answer = await client.post(f"/v2/models/{MODEL}/infer", json={"inputs": [tensor]})
        answer.raise_for_status()
        outputs = {one["name"]: one["data"] for one in answer.json()["outputs"]}
        load.is_right(number, outputs["label"][0])

    return call


async def infer_over_grpc(load: Load, connections: contextlib.AsyncExitStack) -> Call:
    stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(
        await channel(load, connections, "inference")
    )

    async def call(number: int) -> None:
        row = load.rows[number % ROWS]
        answer = await stub.ModelInfer(oip_request(row), timeout=TIMEOUT_S)
        (label,) = [one for one in answer.outputs if one.name == "label"]
        load.is_right(number, label.contents.int64_contents[0])

    return call


def oip_request(row: Sequence[float]) -> open_inference_pb2.ModelInferRequest:
    tensor = open_inference_pb2.ModelInferRequest.InferInputTensor(
        name="pixels",
        datatype="FP32",
        shape=[1, len(row)],
        contents=open_inference_pb2.InferTensorContents(fp32_contents=row),
    )
    return open_inference_pb2.ModelInferRequest(model_name=MODEL, inputs=[tensor])


async def labels_before(load: Load, connections: contextlib.AsyncExitStack) -> list[int]:
    """What the model says when nothing happens to it."""
    stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(
        await channel(load, connections, "inference")
    )
    answers = [await stub.ModelInfer(oip_request(row)) for row in load.rows]
    labels = [one for a in answers for one in a.outputs if one.name == "label"]
    return [one.contents.int64_contents[0] for one in labels]


async def publish_on_the_bus(load: Load, _: contextlib.AsyncExitStack) -> Call:
    async def call(_: int) -> None:
        serial = load.next_serial()
        payload = json.dumps({"serial": serial, "label": 0}).encode()
        await load.bus.publish(f"records.default.{DATASET}", payload, id=f"bus-{serial}")
        load.acked.add(serial)

    return call


async def publish_over_http(load: Load, connections: contextlib.AsyncExitStack) -> Call:
    client = await http(load, connections, "ingest")

    async def call(_: int) -> None:
        serial = load.next_serial()
        url = f"/v1/projects/default/datasets/{DATASET}/records"
        answer = await client.post(url, json={"serial": serial, "label": 0})
        assert answer.status_code == 202, answer.text
        assert answer.json()["accepted"] == 1
        load.acked.add(serial)

    return call


async def submit_jobs(load: Load, connections: contextlib.AsyncExitStack) -> Call:
    """Of a kind that no node runs: each is asked for once, later ones are looked at."""
    stub = scheduler_pb2_grpc.SchedulerStub(await channel(load, connections, "scheduler"))

    async def call(number: int) -> None:
        name = f"job-{number % JOBS_MAX}"
        if name in load.jobs:
            request = scheduler_pb2.GetJobRequest(project="rolled", job=name)
            job = await stub.GetJob(request, timeout=TIMEOUT_S)
        else:
            asked = scheduler_pb2.SubmitJobRequest(project="rolled", job=name, kind="nothing")
            job = await stub.SubmitJob(asked, timeout=TIMEOUT_S)
        assert (job.job, job.state) == (name, "waiting")
        load.jobs.add(name)

    return call


def get(service: str, path: str) -> Connect:
    async def connect(load: Load, connections: contextlib.AsyncExitStack) -> Call:
        client = await http(load, connections, service)

        async def call(_: int) -> None:
            (await client.get(path)).raise_for_status()

        return call

    return connect


def rpc(
    service: str, stub: Callable[[grpc.aio.Channel], Any], method: str, request: Any
) -> Connect:
    async def connect(load: Load, connections: contextlib.AsyncExitStack) -> Call:
        ask = getattr(stub(await channel(load, connections, service)), method)

        async def call(_: int) -> None:
            await ask(request, timeout=TIMEOUT_S)

        return call

    return connect


LIST_PARTS = ingest_pb2.GetDatasetRequest(project="default", dataset=DATASET)
LIST_VERSIONS = preprocess_pb2.ListDatasetVersionsRequest(project="default", dataset=MODEL)
LIST_RUNS = trainer_pb2.ListRunsRequest(project="default")
LIST_MODELS = registry_pb2.ListModelsRequest(project="default")
DOORS: Mapping[str, tuple[int, Connect]] = {
    "inference, OIP over gRPC": (3, infer_over_grpc),
    "inference, OIP over HTTP": (3, infer_over_http),
    "inference, HTTP JSON": (1, get("inference_api", "/v1/projects/default/endpoints")),
    "inference, metrics": (1, get("inference_metrics", "/metrics")),
    "records on the bus": (1, publish_on_the_bus),
    "records over HTTP": (1, publish_over_http),
    "ingest, gRPC": (1, rpc("ingest", ingest_pb2_grpc.IngestStub, "GetDataset", LIST_PARTS)),
    "preprocess, gRPC": (
        1,
        rpc("preprocess", preprocess_pb2_grpc.PreprocessStub, "ListDatasetVersions", LIST_VERSIONS),
    ),
    "preprocess, HTTP": (1, get("preprocess", f"/v1/projects/default/datasets/{MODEL}/versions")),
    "trainer, gRPC": (1, rpc("trainer", trainer_pb2_grpc.TrainerStub, "ListRuns", LIST_RUNS)),
    "trainer, HTTP": (1, get("trainer", "/v1/projects/default/runs")),
    "registry, gRPC": (
        1,
        rpc("registry", registry_pb2_grpc.RegistryStub, "ListModels", LIST_MODELS),
    ),
    "registry, HTTP": (1, get("registry", "/v1/projects/default/models")),
    "scheduler, gRPC": (1, submit_jobs),
    "scheduler, HTTP": (1, get("scheduler", "/v1/nodes")),
}
"""Door -> (callers, each on a connection of its own; how a caller is made)."""


async def landed(stack: Stack) -> Counter[int]:
    """How often each record is in a part that is counted."""
    keys = stack.state["secrets"]
    objects = ObjectStore(
        stack.endpoint("s3"), keys["s3_access_key"], keys["s3_secret_key"], "leptonic"
    )
    found: Counter[int] = Counter()
    after = 0
    while True:
        path = f"/v1/projects/default/datasets/{DATASET}/parts?after={after}&limit={PAGE}"
        parts = (await stack.get("ingest", path))["parts"]
        if not parts:
            return found
        for part in parts:
            table = pq.read_table(BufferReader(await objects.get(part["key"])))
            found.update(table["serial"].to_pylist())
        after = int(parts[-1]["number"])


def table(load: Load) -> str:
    """As in docs/reliability.md."""
    lines = ["| door | requests | failed | slowest |", "|---|---|---|---|"]
    for door, one in load.tallies.items():
        cells = (door, f"{one.sent:,}", f"{len(one.failed)}", f"{one.slowest_s:.2f} s")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| together | {load.sent:,} | {len(load.failed)} | |")
    return "\n".join(lines)


async def roll(stack: Stack, *services: str) -> dict[str, Any]:
    """`leptonic up --roll`, as an operator says it."""
    where = ("--stack", stack.kind, "--data-dir", str(stack.data_dir))
    command = (str(LEPTONIC), "up", "--roll", "--json", *where)
    process = await asyncio.create_subprocess_exec(*command, *services, stdout=PIPE, stderr=PIPE)
    said, problem = await process.communicate()
    assert process.returncode == 0, problem.decode()
    answer: dict[str, Any] = json.loads(said)
    return answer
