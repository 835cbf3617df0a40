"""One contract, two doors: paths, queries and bodies become the message, refusals become JSON."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from libs.contracts.protos import (
    inference_pb2,
    ingest_pb2,
    preprocess_pb2,
    registry_pb2,
    scheduler_pb2,
    trainer_pb2,
)
from libs.contracts.protos import registry_pb2 as pb
from libs.doors import Conflict, Exhausted, Invalid, NotFound, Refused, Unavailable, gateway
from libs.doors.gateway import BODY_BYTES_MAX, openapi, rule_of
from libs.doors.serve import http_app
from libs.doors.tests.desk import SERVICE, Desk

ALIAS = "/v1/projects/p/models/m/aliases/a"
FILES = (inference_pb2, ingest_pb2, preprocess_pb2, registry_pb2, scheduler_pb2, trainer_pb2)
SERVICES = [one for file in FILES for one in file.DESCRIPTOR.services_by_name.values()]


@pytest_asyncio.fixture
async def desk() -> Desk:
    return Desk()


@pytest_asyncio.fixture
async def http(desk: Desk) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=http_app("desk", [(desk, SERVICE)], desk.ready))
    async with httpx.AsyncClient(transport=transport, base_url="http://desk") as client:
        yield client


async def test_path_and_body_become_one_message(http: httpx.AsyncClient, desk: Desk) -> None:
    answer = await http.post(ALIAS, json={"number": "3"})
    assert answer.status_code == 200
    assert desk.request == pb.SetAliasRequest(project="p", model="m", alias="a", number=3)
    assert answer.json()["number"] == "3", "an int64 is text in JSON"
    assert answer.json()["aliases"] == [], "what is empty is said"


async def test_the_path_wins_over_query_and_body(http: httpx.AsyncClient, desk: Desk) -> None:
    await http.post(f"{ALIAS}?project=query", json={"project": "body", "alias": "body"})
    assert desk.request == pb.SetAliasRequest(project="p", model="m", alias="a")


async def test_an_empty_body_is_an_empty_object(http: httpx.AsyncClient, desk: Desk) -> None:
    assert (await http.post(ALIAS)).status_code == 200
    assert desk.request == pb.SetAliasRequest(project="p", model="m", alias="a")


async def test_an_encoded_path_is_decoded(http: httpx.AsyncClient, desk: Desk) -> None:
    await http.get("/v1/projects/p/models/a%20b/versions/@champion")
    assert desk.request == pb.GetModelVersionRequest(project="p", model="a b", version="@champion")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"\xff\xfe", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b"3", "body"),
        (b"{", "body"),
        (b"[" * 100_000, "body"),
        (b'{"a":' * 100_000, "body"),
        (b'{"number": NaN}', "body"),
        (b'{"nope": 1}', "nope"),
        (b'{"number": 1.5}', "number"),
        (b'{"number": "three"}', "number"),
        (b'{"number": 99999999999999999999}', "number"),
        (b'{"number": [1]}', "number"),
        (b'{"number": {}}', "number"),
    ],
    ids=lambda value: str(value)[:24],
)
async def test_a_body_that_is_wrong_names_its_field(
    http: httpx.AsyncClient, desk: Desk, body: bytes, field: str
) -> None:
    answer = await http.post("/v1/projects/p/models/m/aliases/a", content=body)
    refused = answer.json()
    assert (answer.status_code, refused["code"]) == (400, "INVALID_ARGUMENT")
    assert refused["field"] == field
    assert refused["error"].startswith(f"{field}: ")
    assert desk.request is None


async def test_a_query_nobody_knows_names_itself(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/projects/p/models?limit=3")
    assert (answer.status_code, answer.json()["field"]) == (400, "limit")


async def test_a_body_is_bounded(http: httpx.AsyncClient, desk: Desk) -> None:
    answer = await http.post(ALIAS, content=b" " * (BODY_BYTES_MAX + 1))
    assert (answer.status_code, answer.json()["field"]) == (429, "body")
    assert desk.request is None


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Invalid("no", "here"), 400, "INVALID_ARGUMENT"),
        (NotFound("no", "here"), 404, "NOT_FOUND"),
        (Conflict("no", "here"), 409, "FAILED_PRECONDITION"),
        (Exhausted("no", "here"), 429, "RESOURCE_EXHAUSTED"),
        (Unavailable("no", "here"), 503, "UNAVAILABLE"),
    ],
)
async def test_a_refusal_is_json(
    http: httpx.AsyncClient, desk: Desk, error: Refused, status: int, code: str
) -> None:
    desk.refusal = error
    answer = await http.get("/v1/projects/p/models")
    assert answer.status_code == status
    assert answer.json() == {"error": "here: no", "code": code, "field": "here"}


async def test_a_path_or_a_verb_nobody_takes_is_json(http: httpx.AsyncClient) -> None:
    unknown = await http.get("/v1/nowhere")
    assert (unknown.status_code, unknown.json()) == (404, {"error": "Not Found"})
    other = await http.delete("/health/live")
    assert (other.status_code, other.json()) == (405, {"error": "Method Not Allowed"})
    assert set(other.headers["allow"].split(", ")) == {"GET", "HEAD"}


async def test_health_says_what_is_so(http: httpx.AsyncClient, desk: Desk) -> None:
    assert (await http.get("/health/live")).json() == {"live": True}
    for state, status in ((True, 200), (False, 503)):
        desk.is_ready = state
        answer = await http.get("/health/ready")
        assert (answer.status_code, answer.json()) == (status, {"ready": state})


async def test_openapi_is_served_and_lists_every_method(http: httpx.AsyncClient) -> None:
    document: dict[str, Any] = (await http.get("/openapi.json")).json()
    assert operations(document) == {f"Registry.{method.name}" for method in SERVICE.methods}
    assert (await http.get("/metrics")).status_code == 200


def operations(document: dict[str, Any]) -> set[str]:
    return {one["operationId"] for path in document["paths"].values() for one in path.values()}


def test_openapi_of_the_whole_platform_refers_only_to_what_it_defines() -> None:
    document = openapi("all", SERVICES)
    methods = {f"{service.name}.{m.name}" for service in SERVICES for m in service.methods}
    assert operations(document) == methods
    defined = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert references(document) <= defined


def references(value: Any) -> set[str]:
    if isinstance(value, list):
        return {found for one in value for found in references(one)}
    if isinstance(value, dict):
        inner = {found for one in value.values() for found in references(one)}
        return inner | ({value["$ref"]} if "$ref" in value else set())
    return set()


def test_every_parameter_in_a_path_is_a_field_of_its_request() -> None:
    for service in SERVICES:
        for method in service.methods:
            named = set(gateway.PLACEHOLDER.findall(rule_of(method)[1]))
            assert named <= {field.name for field in method.input_type.fields}, method.full_name


def test_no_two_methods_share_a_path() -> None:
    rules = [rule_of(method) for service in SERVICES for method in service.methods]
    assert len(set(rules)) == len(rules)
