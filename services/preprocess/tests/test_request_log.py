"""The request log on a real bus: measured once, told once, never a build."""

from typing import Any

import msgspec
import numpy as np

from libs.bus import DEAD_LETTERS, REQUESTS, Subscription
from libs.bus.jetstream import JetStreamBus
from libs.contracts.events import DatasetVersionCreated, DriftDetected
from libs.contracts.pipeline import Field
from services.preprocess import request_log
from services.preprocess.request_log import column_from_requests
from services.preprocess.tests.desk import Desk, applied
from services.preprocess.tests.digits import INK_MAX, PIXELS, part

SUBJECT = "requests.default.digits"


def logged(start: int, stop: int, inverted: bool) -> bytes:
    """One request a digit."""
    pixels = INK_MAX - PIXELS[start:stop] if inverted else PIXELS[start:stop]
    rows: list[dict[str, Any]] = [
        {
            "request_id": f"r{number}",
            "model": "digits",
            "number": 1,
            "inputs": {"pixels": [one.tolist()], "ink": [float(one.sum())]},
            "outputs": {"label": [1]},
            "traceparent": "",
            "at": "2026-11-21T00:00:00Z",
        }
        for number, one in enumerate(pixels, start=start)
    ]
    return msgspec.json.encode(rows)


async def take_all(bus: JetStreamBus, subscription: Subscription, desk: Desk) -> None:
    for one in await subscription.fetch(10, 2.0):
        await request_log.take(bus, one, desk.context)


async def take_all_twice(bus: JetStreamBus, subscription: Subscription, desk: Desk) -> None:
    """As after a crash between the effect and the ack."""
    for one in await subscription.fetch(10, 2.0):
        await request_log.on_requests(one, desk.context)
        await request_log.take(bus, one, desk.context)


async def test_a_drift_of_requests_is_told_once_and_builds_nothing(
    desk: Desk, bus: JetStreamBus
) -> None:
    await desk.handle(applied(triggers={"records": 1000}))
    await desk.land(part(0, 1000))
    await desk.work()
    subscription = await bus.subscribe(REQUESTS, request_log.DURABLE, ["requests.>"])
    for number, start in enumerate((1000, 1150, 1300, 1450)):
        await bus.publish(SUBJECT, logged(start, start + 150, True), id=str(number))
    await take_all_twice(bus, subscription, desk)
    (drift,) = await desk.emitted(DriftDetected)
    assert (drift.source, drift.window_rows) == ("requests", 300)
    await desk.work()
    assert len(await desk.emitted(DatasetVersionCreated)) == 1


async def test_a_message_counts_once_and_the_rest_stays_quiet(
    desk: Desk, bus: JetStreamBus
) -> None:
    await desk.handle(applied())
    await desk.land(part(0, 1000))
    await desk.work()
    subscription = await bus.subscribe(REQUESTS, request_log.DURABLE, ["requests.>"])
    await bus.publish(SUBJECT, logged(1000, 1150, False), id="one")
    await bus.publish("requests.default.unknown", logged(0, 1, False), id="two")
    await take_all_twice(bus, subscription, desk)
    row = await desk.one("select source, content->'rows' as rows from drift_window")
    assert row == {"source": "requests", "rows": 150}
    assert await desk.emitted(DriftDetected) == []


async def test_a_malformed_message_is_dead_lettered_with_its_reason(
    desk: Desk, bus: JetStreamBus
) -> None:
    await desk.handle(applied())
    await desk.land(part(0, 1000))
    await desk.work()
    subscription = await bus.subscribe(REQUESTS, request_log.DURABLE, ["requests.>"])
    await bus.publish(SUBJECT, b"[{", id="not json")
    await bus.publish(SUBJECT, b'[{"inputs":{"pixels":[1,2],"ink":[1]}}]', id="short")
    await take_all(bus, subscription, desk)
    letters = await bus.read(DEAD_LETTERS, "dlq.requests.>", 0, 10)
    reasons = [one.headers["Leptonic-Reason"] for one in letters]
    assert reasons[0].startswith("Input data was truncated")
    assert reasons[1] == "pixels: 2 logged values for records of [64]"
    assert (await subscription.backlog()).total == 0


def test_a_request_may_hold_one_record_or_a_batch() -> None:
    field = Field("float32", [2])
    column = column_from_requests("x", [[1, 2], [[3, 4], [5, 6]]], field)
    assert column.values.tolist() == [[1, 2], [3, 4], [5, 6]]
    scalars = column_from_requests("x", [1, [2, 3]], Field("int64"))
    assert scalars.values.tolist() == [1, 2, 3]
    assert scalars.values.dtype == np.int64
