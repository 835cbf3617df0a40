"""The request log and the labels meet, whichever comes first, and count once."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from libs import database
from libs.bus import DEAD_LETTERS, REQUESTS, PublishFailed
from libs.bus.jetstream import JetStreamBus
from libs.contracts.events import DeploymentObserved
from libs.objectstore import ObjectStore
from services.inference import store
from services.inference.journal import ENTRY_BYTES_MAX, Entry, Journal
from services.inference.tensors import Array
from services.inference.tests import stage
from services.inference.tests.conftest import ROW, Replica
from services.inference.tests.stage import Platform, register
from stack.testing import eventually


@pytest.fixture
async def digits(replica: Replica, platform: Platform, objects: ObjectStore) -> Replica:
    await platform.place()
    await platform.deploy(1, await register(objects, 1, 100, stage.digits()))
    await replica.until_announced(1)
    return replica


async def send(replica: Replica, **body: Any) -> tuple[int, Any]:
    answer = await replica.http.post("/v1/feedback", json={"model": "digits", **body})
    return answer.status_code, answer.json()


async def prediction(replica: Replica, request_id: str) -> Any:
    answer = await replica.api.get(f"/v1/projects/default/predictions/{request_id}")
    return answer.json() if answer.status_code == 200 else None


async def labelled(replica: Replica, request_id: str) -> Any:
    found = await prediction(replica, request_id)
    return found if found and "label" in found else None


async def observed(platform: Platform) -> tuple[int, int, int]:
    events = await platform.seen(DeploymentObserved)
    last = events[-1].observations[0] if events else None
    return (last.requests, last.labelled, last.correct) if last else (0, 0, 0)


async def test_labels_meet_their_requests_in_any_order_and_count_once(
    digits: Replica, platform: Platform
) -> None:
    assert await send(digits, request_id="early", label=1) == (200, {})
    for request_id in ("early", "right", "wrong", "unlabelled"):
        await digits.infer(ROW, id=request_id)
    await send(digits, request_id="right", label=1)
    for _ in range(3):
        await send(digits, request_id="wrong", label=2)

    async def counted() -> bool:
        return await observed(platform) == (4, 3, 2)

    await eventually(counted)
    found = await eventually(lambda: labelled(digits, "wrong"))
    assert (found["model"], found["number"], found["label"]) == ("digits", "1", 2)
    assert (found["inputs"], found["outputs"]["label"]) == ({"pixels": [ROW]}, [1])
    assert "label" not in await prediction(digits, "unlabelled")
    (endpoint,) = (await digits.api.get("/v1/projects/default/endpoints")).json()["endpoints"]
    (target,) = endpoint["targets"]
    assert [target[n] for n in ("number", "percent", "requests", "labelled", "correct")] == [
        "1", 100, "4", "3", "2",
    ]  # fmt: skip


async def test_the_log_carries_what_drift_needs(digits: Replica, bus: JetStreamBus) -> None:
    await digits.infer(ROW, ROW[::-1], id="pair")
    (message,) = await eventually(lambda: bus.read(REQUESTS, "requests.default.digits", 0, 10))
    (row,) = json.loads(message.payload)
    assert (row["request_id"], row["model"], row["number"]) == ("pair", "digits", 1)
    assert row["inputs"] == {"pixels": [ROW, ROW[::-1]]}
    assert row["outputs"]["label"] == [1, 2]


async def test_bad_feedback_is_refused_and_names_the_field(digits: Replica) -> None:
    assert await send(digits, request_id="x", model="cats", label=1) == (
        404,
        {
            "error": "Request for unknown model: 'cats' is not found",
            "code": "NOT_FOUND",
            "field": "",
        },
    )
    _, refused = await send(digits, model="a b", request_id="x", label=1)
    assert refused["error"] == "model: 'a b' is not a name"
    assert (await digits.api.get("/v1/projects/default/predictions/%00")).status_code == 400
    assert (await digits.api.get("/v1/projects/default/predictions/none")).status_code == 404
    assert "request_id: 1 to 256" in (await send(digits, label=1))[1]["error"]
    assert (await send(digits, request_id="x"))[1]["error"] == "label: missing"
    assert (await send(digits, request_id=5, label=1))[0] == 400
    assert (await digits.http.post("/v1/feedback", content=b"{")).status_code == 400


async def test_malformed_feedback_on_the_bus_is_dead_lettered_with_its_reason(
    digits: Replica, bus: JetStreamBus, platform: Platform
) -> None:
    bad = {
        "digits": (b"{", b'{"request_id": "x"}', b'{"request_id": "", "label": 1}'),
        "cats": (b'{"request_id": "x", "label": 1}',),
    }
    for model, payloads in bad.items():
        for index, payload in enumerate(payloads):
            await bus.publish(f"feedback.default.{model}", payload, id=f"bad-{model}-{index}")
    await digits.infer(ROW, id="good")
    good = b'{"request_id": "good", "label": 1}'
    await bus.publish("feedback.default.digits", good, id="good")

    async def letters() -> list[tuple[str, str]]:
        found = await bus.read(DEAD_LETTERS, "dlq.feedback.>", 0, 10)
        return [(one.subject, one.headers["Leptonic-Reason"]) for one in found]

    async def all_there() -> bool:
        return len(await letters()) == 4

    await eventually(all_there)
    kept = await letters()
    subjects = {subject for subject, _ in kept}
    assert subjects == {"dlq.feedback.default.digits", "dlq.feedback.default.cats"}
    said = " | ".join(reason for _, reason in kept)
    for reason in ("truncated", "missing required field `label`", "request_id: 1 to", "'cats'"):
        assert reason in said
    assert (await eventually(lambda: labelled(digits, "good")))["label"] == 1


async def test_the_log_of_one_message_delivered_twice_is_kept_once(postgres_dsn: str) -> None:
    at = datetime(2026, 11, 21, tzinfo=UTC)
    row = store.Logged("r", "digits", 1, {"x": [[1]]}, {"label": [1]}, at, "", 1, "a")
    async with database.connect(postgres_dsn, "inference", store.MIGRATIONS) as db:
        for _ in range(2):
            async with db.transaction() as tx:
                await store.log_requests(tx, "default", "digits", [row])
                await store.add_label(tx, "default", "digits", "r", 1)
        async with db.transaction() as tx:
            tallies = await store.tallies(tx, stage.deployment(1))
            assert [(one.labelled, one.correct) for one in tallies.values()] == [(1, 1)]
            again = replace(row, number=2, at=at + timedelta(seconds=1))
            await store.log_requests(tx, "default", "digits", [again])
            found = await store.prediction(tx, "default", "r")
    assert found is not None
    assert (found["number"], found["label"]) == (2, None), "the id was used again"


async def test_old_requests_are_forgotten(postgres_dsn: str) -> None:
    async with (
        database.connect(postgres_dsn, "inference", store.MIGRATIONS) as db,
        db.transaction() as tx,
    ):
        await store.add_label(tx, "default", "digits", "r", 1)
        await tx.execute("update feedback set at = now() - interval '8 days'")
        await store.add_label(tx, "default", "digits", "s", 1)
        await store.forget_old(tx)
        rows = await tx.all("select request_id from feedback")
    assert [row["request_id"] for row in rows] == ["s"]


class Dam:
    """A bus that takes nothing until it is opened."""

    def __init__(self, bus: JetStreamBus) -> None:
        self.bus = bus
        self.open = asyncio.Event()
        self.tried = asyncio.Event()

    async def publish(self, subject: str, payload: bytes, *, id: str, headers: Any = None) -> int:
        self.tried.set()
        if not self.open.is_set():
            raise PublishFailed("dammed")
        return await self.bus.publish(subject, payload, id=id)


def entry(request_id: str, array: Array | None = None) -> Entry:
    pixels = {"pixels": np.array([ROW], np.float32) if array is None else array}
    return Entry(
        project="default", request_id=request_id, model="digits", number=1, generation=1,
        replica="a", inputs=pixels, outputs={}, traceparent="", at="2026-11-21T00:00:00+00:00",
    )  # fmt: skip


async def test_a_full_log_drops_and_counts_and_the_drain_delivers_the_rest(
    bus: JetStreamBus,
) -> None:
    dam = Dam(bus)
    journal = Journal(dam, entries_max=3)  # type: ignore[arg-type]
    async with journal.running():
        journal.put(entry("first"))
        async with asyncio.timeout(10):
            await dam.tried.wait()
        for number in range(5):
            journal.put(entry(str(number)))
        assert journal.dropped == 2
        dam.open.set()
    messages = await bus.read(REQUESTS, "requests.>", 0, 10)
    ids = [row["request_id"] for message in messages for row in json.loads(message.payload)]
    assert ids == ["first", "0", "1", "2"]


async def test_the_log_counts_the_bytes_of_texts_and_drops_what_is_too_long_at_once(
    bus: JetStreamBus,
) -> None:
    text = np.array([b"x" * 1000, "é" * 500], object)
    journal = Journal(bus, bytes_max=4096)
    for number in range(3):
        journal.put(entry(str(number), text))
    assert (len(journal.queue), journal.dropped) == (2, 1)
    assert journal.bytes == 2 * (2 * 8 + 2000)
    long = Journal(bus)
    long.put(entry("long", np.zeros(ENTRY_BYTES_MAX + 1, np.bool_)))
    assert (len(long.queue), long.bytes, long.dropped) == (0, 0, 1)
