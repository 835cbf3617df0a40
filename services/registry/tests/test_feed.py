"""The feed shows events and dead letters as they lie on the bus."""

from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from libs.bus.memory import MemoryBus
from libs.contracts.envelope import encode
from libs.contracts.events import JobCancelled, subject_of
from libs.doors import Refused
from libs.doors.gateway import on_refused
from services.registry.feed import routes


async def publish(bus: MemoryBus, project: str, job: str) -> int:
    event = JobCancelled(project=project, job=job)
    payload = encode(event, id=job, service="test", time="2026-11-21T00:00:00Z", traceparent="t")
    return await bus.publish(subject_of(event), payload, id=job)


async def get(bus: MemoryBus, path: str) -> httpx.Response:
    app = Starlette(routes=routes(bus), exception_handlers={Refused: on_refused})
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://feed") as client:
        return await client.get(path)


async def test_events_of_a_project_after_a_sequence() -> None:
    bus = MemoryBus()
    first = await publish(bus, "a", "one")
    await publish(bus, "b", "two")
    third = await publish(bus, "a", "three")
    body: dict[str, Any] = (await get(bus, f"/v1/events?project=a&after={first}")).json()
    assert body["last"] == third
    (event,) = body["events"]
    assert (event["sequence"], event["subject"]) == (third, "events.a.job.cancelled")
    assert event["data"] == {"project": "a", "job": "three", "reason": ""}
    assert (event["type"], event["traceparent"]) == ("ai.leptonic.job.cancelled.v1", "t")
    again = (await get(bus, f"/v1/events?after={third}")).json()
    assert again == {"events": [], "last": third}


async def test_the_last_events_are_read_with_a_negative_after() -> None:
    bus = MemoryBus()
    for job in ("one", "two", "three"):
        await publish(bus, "a", job)
    events = (await get(bus, "/v1/events?after=-2")).json()["events"]
    assert [event["data"]["job"] for event in events] == ["two", "three"]


async def test_dead_letters_carry_reason_trace_and_payload() -> None:
    bus = MemoryBus()
    headers = {
        "Leptonic-Reason": "$.label: missing",
        "Leptonic-Subject": "records.a.digits",
        "Leptonic-Sequence": "7",
        "traceparent": "t",
    }
    await bus.publish("dlq.records.a.digits", b'{"x": 1}', id="d", headers=headers)
    (letter,) = (await get(bus, "/v1/dead-letters")).json()["dead_letters"]
    assert (letter["reason"], letter["from_sequence"]) == ("$.label: missing", 7)
    assert (letter["payload"], letter["traceparent"]) == ('{"x": 1}', "t")


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("after=soon", "after"),
        ("limit=0", "limit"),
        ("limit=x", "limit"),
        ("project=a.b", "project"),
    ],
)
async def test_a_bad_query_names_its_field(query: str, field: str) -> None:
    answer = await get(MemoryBus(), f"/v1/events?{query}")
    assert (answer.status_code, answer.json()["field"]) == (400, field)
