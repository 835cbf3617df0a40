"""Both doors, on a real registry: what they answer and what they refuse."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf import json_format

from libs.contracts.events import PipelineApplied
from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.doors.serve import grpc_door, http_app
from services.registry.app import SERVICE
from services.registry.tests.conftest import YAML, Desk


@pytest_asyncio.fixture
async def http(desk: Desk) -> AsyncIterator[httpx.AsyncClient]:
    app = http_app("registry", [(desk.registry, SERVICE)], desk.context.db.ready)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://registry") as client:
        yield client


@pytest_asyncio.fixture
async def stub(desk: Desk) -> AsyncIterator[Any]:
    def add(server: grpc.aio.Server) -> None:
        registry_pb2_grpc.add_RegistryServicer_to_server(desk.registry, server)

    async with (
        grpc_door("127.0.0.1", 0, add, [SERVICE], desk.context.db.ready) as port,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield registry_pb2_grpc.RegistryStub(channel)


async def test_the_same_pipeline_is_the_same_revision(desk: Desk) -> None:
    first = await desk.apply()
    again = await desk.apply(YAML.replace("0.9, ", "0.90,  "))
    assert (first.revision, again.revision, again.applied_at) == (1, 1, first.applied_at)
    (event,) = await desk.emitted()
    assert isinstance(event, PipelineApplied)
    assert event.spec["train"]["recipe"] == "mlp"
    assert event.spec["deployment"]["canary"]["trafficPercent"] == 25


async def test_another_pipeline_is_the_next_revision(desk: Desk) -> None:
    await desk.apply()
    assert (await desk.apply(YAML.replace("epochs: 2", "epochs: 3"))).revision == 2
    assert (await desk.apply()).revision == 3, "back again is a change too"
    async with desk.context.db.transaction() as tx:
        rows = await tx.all("select revision from pipeline_revision order by revision")
    assert [row["revision"] for row in rows] == [1, 2, 3]
    events = await desk.emitted()
    assert [e.revision for e in events if isinstance(e, PipelineApplied)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("old", "new", "field", "problem"),
    [
        ("recipe: mlp", "recipe: mlp, epoch: 1", "$.train.epoch", "unknown key"),
        ("standardize", "standardise", "$.preprocess[0].standardise", "unknown step"),
        ("accuracy", "acuracy", "$.gates[0].metric", "no metric 'acuracy' is measured"),
        ("recipe: mlp", "recipe: mpl", "$.train.recipe", "unknown recipe 'mpl'"),
    ],
)
async def test_a_wrong_pipeline_names_its_field(
    stub: Any, http: httpx.AsyncClient, desk: Desk, old: str, new: str, field: str, problem: str
) -> None:
    yaml = YAML.replace(old, new)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.ApplyPipeline(pb.ApplyPipelineRequest(project="default", yaml=yaml))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"{field}: {problem}" in (refused.value.details() or "")
    answer = await http.post("/v1/projects/default/pipelines", json={"yaml": yaml})
    assert (answer.status_code, answer.json()["field"]) == (400, field)
    assert await desk.emitted() == []
    assert (await http.get("/v1/projects/default/pipelines")).json() == {"pipelines": []}


async def test_a_model_belongs_to_one_pipeline(http: httpx.AsyncClient, desk: Desk) -> None:
    await desk.apply()
    other = YAML.replace("pipeline: digits", "pipeline: other")
    answer = await http.post("/v1/projects/default/pipelines", json={"yaml": other})
    assert (answer.status_code, answer.json()["field"]) == (409, "$.deployment.model")
    assert "belongs to pipeline 'digits'" in answer.json()["error"]
    assert (await desk.apply()).revision == 1


async def test_every_door_reads_the_same(stub: Any, http: httpx.AsyncClient, desk: Desk) -> None:
    await desk.apply()
    await desk.handle(await desk.trained("job-1"), "e1")
    base = "/v1/projects/default"
    one = pb.GetModelVersionRequest(project="default", model="digits", version="1")
    deployment = pb.GetDeploymentRequest(project="default", model="digits")
    for path, answer in (
        (f"{base}/models/digits/versions/1", await stub.GetModelVersion(one)),
        (f"{base}/deployments/digits", await stub.GetDeployment(deployment)),
        (
            f"{base}/pipelines/digits",
            await stub.GetPipeline(pb.GetPipelineRequest(project="default", pipeline="digits")),
        ),
        (f"{base}/models", await stub.ListModels(pb.ListModelsRequest(project="default"))),
        (
            f"{base}/models/digits/versions",
            await stub.ListModelVersions(
                pb.ListModelVersionsRequest(project="default", model="digits")
            ),
        ),
        (
            f"{base}/deployments",
            await stub.ListDeployments(pb.ListDeploymentsRequest(project="default")),
        ),
        (f"{base}/pipelines", await stub.ListPipelines(pb.ListPipelinesRequest(project="default"))),
    ):
        body = (await http.get(path)).json()
        assert json_format.ParseDict(body, type(answer)()) == answer
    models = (await http.get(f"{base}/models")).json()["models"]
    assert models == [
        {"project": "default", "model": "digits", "versions": "1", "aliases": {"champion": "1"}}
    ]
    manifest = (await http.get(f"{base}/models/digits/versions/@champion")).json()["manifest"]
    assert manifest["lineage"]["pipeline"] == "digits"
    assert manifest["signature"]["inputs"][0]["shape"] == [-1, 64]


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("models/digits/versions/2", 404, "version"),
        ("models/digits/versions/@challenger", 404, "version"),
        ("models/digits/versions/latest", 400, "version"),
        ("models/digits/versions/@a.b", 400, "version"),
        ("models/digits/versions/99999999999", 400, "version"),
        ("models/letters/versions/1", 404, "version"),
        ("models/a.b/versions/1", 400, "model"),
        ("deployments/letters", 404, "model"),
        ("pipelines/letters", 404, "pipeline"),
        ("pipelines/a%20b", 400, "pipeline"),
    ],
)
async def test_what_is_not_there_names_its_field(
    http: httpx.AsyncClient, desk: Desk, path: str, status: int, field: str
) -> None:
    await desk.apply()
    await desk.handle(await desk.trained("job-1"), "e1")
    answer = await http.get(f"/v1/projects/default/{path}")
    assert (answer.status_code, answer.json()["field"]) == (status, field)


async def test_names_are_checked_on_every_method(stub: Any) -> None:
    for method, request in (
        (stub.ApplyPipeline, pb.ApplyPipelineRequest(project="a.b")),
        (stub.ListPipelines, pb.ListPipelinesRequest(project="")),
        (stub.ListModels, pb.ListModelsRequest(project="*")),
        (stub.ListModelVersions, pb.ListModelVersionsRequest(project="a", model=">")),
        (stub.ListDeployments, pb.ListDeploymentsRequest(project="x" * 64)),
        (stub.SetAlias, pb.SetAliasRequest(project="a", model="b", alias="@", number=1)),
        (stub.SetAlias, pb.SetAliasRequest(project="a", model="b", alias="c", number=0)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await method(request)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_aliases_move_by_hand(http: httpx.AsyncClient, desk: Desk) -> None:
    await desk.apply()
    await desk.handle(await desk.trained("job-1"), "e1")
    await desk.handle(await desk.trained("job-2", champion=1), "e2")
    await desk.handle(await desk.trained("job-3", accuracy=0.1, champion=1), "e3")
    base = "/v1/projects/default/models/digits/aliases"
    staged = (await http.post(f"{base}/staging", json={"number": "1"})).json()
    assert staged["aliases"] == ["champion", "staging"]
    assert await desk.shares() == [(1, 75), (2, 25)]
    promoted = (await http.post(f"{base}/champion", json={"number": 2})).json()
    assert (promoted["state"], promoted["aliases"]) == ("serving", ["champion"])
    assert await desk.shares() == [(2, 100)]
    for alias, number, status, said in (
        ("champion", 3, 409, "number: version 3 did not pass its gate: accuracy 0.1 is not"),
        ("champion", 9, 404, "number: model 'digits' has no version 9"),
        ("challenger", 1, 409, "alias: a version becomes challenger by passing its gate"),
    ):
        answer = await http.post(f"{base}/{alias}", json={"number": number})
        assert answer.status_code == status
        assert answer.json()["error"].startswith(said)
    assert await desk.shares() == [(2, 100)]


async def test_concurrent_applies_make_every_revision_once(desk: Desk) -> None:
    texts = [YAML.replace("epochs: 2", f"epochs: {count}") for count in range(1, 9)]
    answers = await asyncio.gather(*(desk.apply(text) for text in texts))
    assert sorted(answer.revision for answer in answers) == list(range(1, 9))
