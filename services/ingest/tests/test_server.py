"""The HTTP doors, asked over a socket."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from libs.bus import Subscription
from libs.bus.jetstream import JetStreamBus
from libs.contracts.protos import ingest_pb2
from libs.database import Database
from libs.doors.serve import http_app, http_door
from libs.objectstore import ObjectStore
from services.ingest import server
from services.ingest.domain import Place
from services.ingest.landing import Landing
from services.ingest.server import RecordsDoor, Servicer
from services.ingest.tables import ipc_bytes
from services.ingest.tests.pipelines import digit, message
from services.ingest.tests.test_landing import rows_of

DIGITS = "/v1/projects/default/datasets/digits/records"
FLAT = "/v1/projects/default/datasets/flat/records"
JSON = {"Content-Type": "application/json"}
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest_asyncio.fixture
async def client(bus: JetStreamBus, db: Database) -> AsyncIterator[httpx.AsyncClient]:
    service = ingest_pb2.DESCRIPTOR.services_by_name["Ingest"]
    app = http_app("Ingest", [(Servicer(db), service)], db.ready, [RecordsDoor(bus, db).route])
    async with (
        http_door("127.0.0.1", 0, app) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as opened,
    ):
        yield opened


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


BOTH = pa.Table.from_pylist([{"amount": 1.5, "label": 1}, {"amount": 2.5, "label": 2}])
WRONG = pa.Table.from_pylist([{"amount": 1.5, "label": 1}, {"amount": None, "label": 2}])


@pytest.mark.parametrize(
    ("content_type", "good", "mixed"),
    [
        (
            "application/json; charset=utf-8",
            json.dumps(BOTH.to_pylist()).encode(),
            json.dumps(WRONG.to_pylist()).encode(),
        ),
        (
            "application/x-ndjson",
            b'{"amount":1.5,"label":1}\n{"amount":2.5,"label":2}\n',
            b'{"amount":1.5,"label":1}\n{"amount":null,"label":2}\n',
        ),
        ("text/csv", b"amount,label\n1.5,1\n2.5,2\n", b"amount,label\n1.5,1\n,2\n"),
        ("application/vnd.apache.parquet", parquet(BOTH), parquet(WRONG)),
        ("application/vnd.apache.arrow.stream", ipc_bytes(BOTH), ipc_bytes(WRONG)),
    ],
)
async def test_every_format_lands_and_refuses(
    client: httpx.AsyncClient,
    db: Database,
    objects: ObjectStore,
    landing: Landing,
    subscription: Subscription,
    content_type: str,
    good: bytes,
    mixed: bytes,
) -> None:
    headers = {"Content-Type": content_type}
    answer = await client.post(FLAT, content=good, headers=headers)
    assert (answer.status_code, answer.json()) == (
        202,
        {"accepted": 2, "refused": 0, "refusals": []},
    )
    answer = await client.post(FLAT, content=mixed, headers=headers)
    refusal = {"index": 1, "field": "amount", "reason": "expected float32, got null"}
    assert answer.json() == {"accepted": 1, "refused": 1, "refusals": [refusal]}
    await landing.land(await landing.gather(subscription))
    landed = await rows_of(db, objects, Place("default", "flat"))
    assert [label for _, _, label in landed] == [1, 2, 1]


async def test_an_idempotency_key_makes_the_second_time_count_for_nothing(
    client: httpx.AsyncClient,
    db: Database,
    objects: ObjectStore,
    landing: Landing,
    subscription: Subscription,
) -> None:
    headers = {**JSON, "Idempotency-Key": "k1"}
    for _ in range(2):
        answer = await client.post(DIGITS, content=message(digit(1)), headers=headers)
        assert answer.status_code == 202
    await landing.land(await landing.gather(subscription))
    assert len(await rows_of(db, objects)) == 1


async def test_the_callers_trace_reaches_the_message(
    client: httpx.AsyncClient, subscription: Subscription
) -> None:
    headers = {**JSON, "traceparent": TRACE}
    await client.post(DIGITS, content=message(digit(1)), headers=headers)
    (delivery,) = await subscription.fetch(1, 1.0)
    assert delivery.headers["traceparent"].split("-")[1] == TRACE.split("-")[1]


async def test_a_large_body_is_published_in_chunks_below_the_payload_limit(
    client: httpx.AsyncClient, subscription: Subscription
) -> None:
    records = [digit(n % 10) for n in range(5000)]
    answer = await client.post(DIGITS, content=json.dumps(records), headers=JSON)
    assert answer.json()["accepted"] == 5000
    deliveries = await subscription.fetch(10, 1.0)
    assert len(deliveries) == 3
    assert max(len(one.payload) for one in deliveries) < 2 << 20


async def test_what_cannot_be_taken_has_its_status_and_field(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(path: str, content: bytes, content_type: str) -> tuple[int, Any, Any]:
        answer = await client.post(path, content=content, headers={"Content-Type": content_type})
        body = answer.json()
        return answer.status_code, body["field"], body["error"]

    nowhere = DIGITS.replace("digits", "nowhere")
    status, field, error = await refused(nowhere, b"{}", "application/json")
    assert (status, field) == (404, "dataset")
    assert "no dataset 'nowhere'" in error
    assert (await refused(DIGITS, b"{}", "text/plain"))[:2] == (415, "Content-Type")
    status, field, error = await refused(DIGITS, b"pixels,label\n", "text/csv")
    assert (status, field) == (400, "pixels")
    assert "shape [64] does not fit a CSV cell" in error
    assert (await refused(DIGITS, b"[{", "application/json"))[:2] == (400, "body")
    parquet_type = "application/vnd.apache.parquet"
    assert (await refused(DIGITS, b"rubbish", parquet_type))[:2] == (400, "body")
    monkeypatch.setattr(server, "BODY_BYTES_MAX", 10)
    assert (await refused(DIGITS, b"[1,2,3,4,5,6]", "application/json"))[:2] == (413, "body")


async def test_without_an_ack_the_answer_is_503(
    client: httpx.AsyncClient, bus: JetStreamBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bus.context.delete_stream("RECORDS")
    monkeypatch.setattr("libs.bus.jetstream.PUBLISH_TRIES", 2)
    answer = await client.post(DIGITS, content=message(digit(1)), headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (503, "UNAVAILABLE")
    await bus.create_streams()


async def test_refusals_are_bounded_and_counted_in_full(client: httpx.AsyncClient) -> None:
    answer = await client.post(DIGITS, content=message(*range(150)), headers=JSON)
    body = answer.json()
    assert (answer.status_code, body["refused"], len(body["refusals"])) == (202, 150, 100)


async def test_datasets_and_parts_over_http(
    client: httpx.AsyncClient, bus: JetStreamBus, landing: Landing, subscription: Subscription
) -> None:
    for number in range(3):
        await bus.publish("records.default.digits", message(digit(number), "bad"), id=f"{number}")
        await landing.land(await landing.gather(subscription))
    datasets = (await client.get("/v1/projects/default/datasets")).json()["datasets"]
    assert [one["dataset"] for one in datasets] == ["digits", "flat"]
    one = (await client.get("/v1/projects/default/datasets/digits")).json()
    assert (one["rows"], one["parts"], one["dead_letters"]) == ("3", "3", "3")
    assert one["schema"]["pixels"]["shape"] == [64]
    parts = f"{DIGITS.removesuffix('records')}parts"
    answer = (await client.get(parts, params={"after": 1, "limit": 1})).json()
    assert [part["number"] for part in answer["parts"]] == ["2"]
    assert (await client.get("/v1/projects/default/datasets/none")).status_code == 404
    assert (await client.get(parts, params={"limit": -1})).json()["field"] == "limit"
    metrics = (await client.get("/metrics")).text
    assert 'leptonic_ingest_records_landed_total{dataset="digits",project="default"}' in metrics
