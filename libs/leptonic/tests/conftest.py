"""Doors that speak the real contract: the platform's own gateway over servicers that remember."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from leptonic import Client
from leptonic.stackfile import Stack
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from libs.contracts.protos import inference_pb2 as inference
from libs.contracts.protos import ingest_pb2 as ingest
from libs.contracts.protos import preprocess_pb2 as preprocess
from libs.contracts.protos import registry_pb2 as registry
from libs.contracts.protos import scheduler_pb2 as scheduler
from libs.contracts.protos import trainer_pb2 as trainer
from libs.doors import Invalid, NotFound
from libs.doors.serve import http_app, http_door

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
DIGITS = "digits"


def struct(value: dict[str, Any]) -> Struct:
    return json_format.ParseDict(value, Struct())


class Platform:
    """Answers of every servicer, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.bodies: list[tuple[str, bytes]] = []
        self.events: list[dict[str, Any]] = []

    async def ListDatasets(self, request: Any, _: Any) -> Any:
        one = ingest.Dataset(dataset=DIGITS, rows=1200, parts=3, dead_letters=1)
        return ingest.ListDatasetsResponse(datasets=[one])

    async def GetDataset(self, request: Any, _: Any) -> Any:
        if request.dataset != DIGITS:
            raise NotFound(f"no dataset {request.dataset!r}", "dataset")
        schema = struct({"rows": {"type": "int64", "role": "12", "shape": [64]}})
        return ingest.Dataset(dataset=DIGITS, rows=1200, schema=schema)

    async def ListParts(self, request: Any, _: Any) -> Any:
        return ingest.ListPartsResponse()

    async def ListDatasetVersions(self, request: Any, _: Any) -> Any:
        one = preprocess.DatasetVersion(number=1, digest="d" * 64, rows=1200, reason="records")
        return preprocess.ListDatasetVersionsResponse(versions=[one])

    async def GetDatasetVersion(self, request: Any, _: Any) -> Any:
        return preprocess.DatasetVersion()

    async def BuildDatasetVersion(self, request: Any, _: Any) -> Any:
        return preprocess.DatasetVersion()

    async def GetDrift(self, request: Any, _: Any) -> Any:
        one = preprocess.FeatureDrift(source="records", feature="pixels", psi=0.5, window_rows=200)
        return preprocess.Drift(features=[one])

    async def ListJobs(self, request: Any, _: Any) -> Any:
        waits = scheduler.Job(job="train-b", kind="train", state="waiting", reason="needs 2 cpu")
        return scheduler.ListJobsResponse(jobs=[await self.GetJob(request, _), waits])

    async def GetJob(self, request: Any, _: Any) -> Any:
        resources = scheduler.Resources(cpu_milli=500, memory_mib=512)
        return scheduler.Job(
            job="train-a", kind="train", state="succeeded", attempt=1, resources=resources
        )

    async def SubmitJob(self, request: Any, _: Any) -> Any:
        return scheduler.Job()

    async def SubmitJobs(self, request: Any, _: Any) -> Any:
        return scheduler.SubmitJobsResponse()

    async def CancelJob(self, request: Any, _: Any) -> Any:
        return scheduler.Job()

    async def ListNodes(self, request: Any, _: Any) -> Any:
        capacity = scheduler.Resources(cpu_milli=2000, memory_mib=4096)
        node = scheduler.Node(node="local", health="Healthy", kinds=["train"], capacity=capacity)
        node.gpu_model, node.gpu_milli_fragmented = "A100", 300
        node.gpu_milli_free.extend([1000, 300])
        return scheduler.ListNodesResponse(nodes=[node], gpu_milli_bound=1700)

    async def ExplainJob(self, request: Any, _: Any) -> Any:
        advice = scheduler.Advice(says="end p/j-1", changes=[scheduler.Change(kind="end")])
        return scheduler.JobExplanation(
            job=request.job,
            state="waiting",
            position=2,
            waiting=3,
            constraint="free",
            reason="needs 1 x 1000 gpu_milli",
            price=0.5,
            price_unit="placed gpu_milli per unit of cpu_milli",
            advices=[advice],
        )

    async def ListQueues(self, request: Any, _: Any) -> Any:
        gpus = scheduler.QuotaUse(resource="gpu_milli", nominal=4000, used=6000, borrowed=2000)
        gpus.owes = -1500
        cpus = scheduler.QuotaUse(resource="cpu_milli", nominal=8000, left=5000)
        one = scheduler.Queue(queue="team", cohort="all", weight=1000, share=250_000)
        one.quotas.extend([cpus, gpus])
        default = scheduler.Queue(queue="default", waiting=1)
        serve = scheduler.Queue(queue="serve", running=3)
        digits = scheduler.Replicas(project="default", model="digits", wanted=4, running=3, lent=1)
        serve.replicas.append(digits)
        return scheduler.ListQueuesResponse(queues=[default, one, serve])

    async def ApplyQueue(self, request: Any, _: Any) -> Any:
        self.asked.append(request)
        return scheduler.Queue(queue="team", cohort="all", weight=1000)

    async def DeleteQueue(self, request: Any, _: Any) -> Any:
        self.asked.append(request)
        return scheduler.DeleteQueueResponse()

    async def ListRuns(self, request: Any, _: Any) -> Any:
        return trainer.ListRunsResponse()

    async def GetRun(self, request: Any, _: Any) -> Any:
        epochs = [trainer.Epoch(epoch=n, metrics={"loss": 1 / n}) for n in (1, 2)]
        return trainer.Run(job=request.job, state="succeeded", epochs=epochs)

    async def ApplyPipeline(self, request: Any, _: Any) -> Any:
        self.asked.append(request)
        if "recipy" in request.yaml:
            raise Invalid("Object contains unknown field `recipy`", "$.train")
        return registry.Pipeline(pipeline=DIGITS, revision=4)

    async def ListPipelines(self, request: Any, _: Any) -> Any:
        return registry.ListPipelinesResponse()

    async def GetPipeline(self, request: Any, _: Any) -> Any:
        return registry.Pipeline()

    async def ListModels(self, request: Any, _: Any) -> Any:
        one = registry.Model(model=DIGITS, versions=2, aliases={"champion": 2})
        return registry.ListModelsResponse(models=[one])

    async def ListModelVersions(self, request: Any, _: Any) -> Any:
        return registry.ListModelVersionsResponse(versions=[await self.GetModelVersion(request, _)])

    async def GetModelVersion(self, request: Any, _: Any) -> Any:
        return registry.ModelVersion(
            model=DIGITS,
            number=2,
            state="serving",
            aliases=["champion"],
            metrics={"accuracy": 0.97},
            checks=[struct({"metric": "accuracy", "passed": True})],
            manifest=struct({"lineage": {"dataset": DIGITS, "seed": 7}}),
            traceparent=TRACEPARENT,
        )

    async def SetAlias(self, request: Any, _: Any) -> Any:
        return registry.ModelVersion()

    async def ListDeployments(self, request: Any, _: Any) -> Any:
        targets = [registry.TrafficTarget(number=n, percent=p) for n, p in ((1, 80), (2, 20))]
        one = registry.Deployment(model=DIGITS, generation=3, targets=targets, state="canary")
        return registry.ListDeploymentsResponse(deployments=[one])

    async def GetDeployment(self, request: Any, _: Any) -> Any:
        return registry.Deployment()

    async def SendFeedback(self, request: Any, _: Any) -> Any:
        self.asked.append(request)
        return inference.SendFeedbackResponse()

    async def GetPrediction(self, request: Any, _: Any) -> Any:
        if request.request_id != "r-1":
            raise NotFound(f"no request {request.request_id!r}", "request_id")
        return inference.Prediction(request_id="r-1", trace_id=TRACE_ID, number=2)

    async def ListEndpoints(self, request: Any, _: Any) -> Any:
        target = inference.EndpointTarget(number=2, percent=20, requests=50, correct=48)
        one = inference.Endpoint(model=DIGITS, generation=3, targets=[target])
        return inference.ListEndpointsResponse(endpoints=[one])

    async def records(self, request: Request) -> Response:
        """The receipt that ingest gives; a line "bad" is refused."""
        body = await request.body()
        self.bodies.append((request.headers["content-type"], body))
        lines = body.splitlines()
        bad = [n for n, line in enumerate(lines) if line == b"bad"]
        refusals = [{"index": n, "field": "", "reason": "not JSON"} for n in bad]
        receipt = {"accepted": len(lines) - len(bad), "refused": len(bad), "refusals": refusals}
        return JSONResponse(receipt, status_code=202)

    async def feed(self, request: Request) -> Response:
        after = int(request.query_params["after"])
        found = [one for one in self.events if one["sequence"] > after]
        last = found[-1]["sequence"] if found else max(after, 0)
        return JSONResponse({"events": found, "last": last})

    async def dead_letters(self, request: Request) -> Response:
        letter = {
            "sequence": 7,
            "subject": "dlq.records.default.digits",
            "reason": "label: missing",
        }
        found = [letter] if int(request.query_params["after"]) < 7 else []
        return JSONResponse({"dead_letters": found, "last": 7})

    async def metadata(self, request: Request) -> Response:
        inputs = [{"name": "pixels", "datatype": "FP32", "shape": [-1, 2]}]
        return JSONResponse({"name": DIGITS, "inputs": inputs, "outputs": []})

    async def infer(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        rows = body["inputs"][0]["shape"][0]
        label = {"name": "label", "datatype": "INT64", "shape": [rows], "data": [1] * rows}
        chances = {"name": "probabilities", "shape": [rows, 2], "data": [0.25, 0.75] * rows}
        answer = {"id": body["id"], "model_name": DIGITS, "model_version": "2"}
        return JSONResponse({**answer, "outputs": [label, chances]})

    async def story(self, request: Request) -> Response:
        span = {
            "trace_id": request.path_params["trace_id"], "span_id": "b7ad6b7169203331",
            "parent_id": "", "service": "inference", "name": "ModelInfer", "kind": "server",
            "start_ns": 1, "end_ns": 2_000_001, "status": "unset", "status_message": "",
            "attributes": {}, "events": [], "links": [],
        }  # fmt: skip
        return JSONResponse({"trace_id": span["trace_id"], "spans": [span]})

    def routes(self) -> list[Route]:
        records = "/v1/projects/{project}/datasets/{dataset}/records"
        return [
            Route(records, self.records, methods=["POST"]),
            Route("/v1/events", self.feed),
            Route("/v1/dead-letters", self.dead_letters),
            Route("/v2/models/digits", self.metadata),
            Route("/v2/models/digits/infer", self.infer, methods=["POST"]),
            Route("/v1/story/{trace_id}", self.story),
        ]


MODULES = (ingest, preprocess, scheduler, trainer, registry, inference)
DOORS = (
    "ingest", "preprocess", "scheduler", "trainer", "registry",
    "inference_api", "inference_http", "traces",
)  # fmt: skip


def serve(platform: Platform, opened: Callable[[int], None], stop: threading.Event) -> None:
    """The doors on a port of their own until `stop`."""

    async def ready() -> bool:
        return True

    async def main() -> None:
        pairs = [(platform, s) for m in MODULES for s in m.DESCRIPTOR.services_by_name.values()]
        app = http_app("test", pairs, ready, platform.routes())
        async with http_door("127.0.0.1", 0, app) as port:
            opened(port)
            await asyncio.to_thread(stop.wait)

    asyncio.run(main())


@pytest.fixture(scope="session")
def served() -> Iterator[tuple[Platform, str]]:
    """(what answers, the URL at which every service answers)."""
    platform = Platform()
    port: list[int] = []
    opened, stop = threading.Event(), threading.Event()

    def told(number: int) -> None:
        port.append(number)
        opened.set()

    thread = threading.Thread(target=serve, args=(platform, told, stop))
    thread.start()
    assert opened.wait(10)
    yield platform, f"http://127.0.0.1:{port[0]}"
    stop.set()
    thread.join()


@pytest.fixture
def platform(served: tuple[Platform, str]) -> Platform:
    """As if nobody had asked it anything yet."""
    platform, _ = served
    platform.asked.clear()
    platform.bodies.clear()
    platform.events.clear()
    return platform


@pytest.fixture
def door(served: tuple[Platform, str], platform: Platform) -> str:
    return served[1]


@pytest.fixture
def stack(door: str) -> Stack:
    return Stack(source="test", endpoints=dict.fromkeys(DOORS, door))


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack) as opened:
        yield opened


@pytest.fixture
def endpoints_file(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What LEPTONIC_ENDPOINTS names, in a folder where no stack runs."""
    path = tmp_path / "endpoints.json"
    path.write_text(json.dumps(dict(stack.endpoints)))
    monkeypatch.setenv("LEPTONIC_ENDPOINTS", str(path))
    monkeypatch.chdir(tmp_path)
    return path
