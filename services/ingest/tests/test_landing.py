"""Records through a real NATS, Postgres and S3: each lands once, whatever happens between."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from libs import database
from libs.bus import DEAD_LETTERS, EVENTS, RECORDS, Delivery, Subscription
from libs.bus.jetstream import JetStreamBus
from libs.contracts.artifacts import digest_of
from libs.contracts.envelope import decode
from libs.contracts.events import PartLanded
from libs.database import Database
from libs.objectstore import ObjectStore
from services.ingest import store
from services.ingest.domain import Place, explain
from services.ingest.landing import Landing, build
from services.ingest.layout import layout_of
from services.ingest.store import MIGRATIONS
from services.ingest.tables import ipc_bytes
from services.ingest.tests.conftest import apply
from services.ingest.tests.pipelines import SCHEMAS, applied, digit, message
from stack import ports, servers
from stack.testing import Server, eventually

DIGITS = Place("default", "digits")
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


async def rows_of(db: Database, objects: ObjectStore, place: Place = DIGITS) -> list[Any]:
    """(sequence, index, label) of everything in the dataset's parts."""
    found: list[Any] = []
    for part in await store.parts(db, place, 0, 1000):
        payload = await objects.get(part["key"])
        assert digest_of(payload) == part["digest"]
        table = pq.read_table(pa.BufferReader(payload))
        assert len(table) == part["rows"]
        columns = ("_sequence", "_index", "label")
        found += zip(*(table[name].to_pylist() for name in columns), strict=True)
    dataset = await store.dataset(db, place)
    assert dataset is not None
    assert dataset["rows"] == len(found)
    return sorted(found)


async def dead_letters(bus: JetStreamBus) -> list[Delivery]:
    subscription = await bus.subscribe(DEAD_LETTERS, "test", ["dlq.>"])
    return await subscription.fetch(100, 0.2)


async def again(deliveries: list[Delivery], subscription: Subscription) -> list[Delivery]:
    """What a consumer that starts anew is given, without the wait for it."""
    for delivery in deliveries:
        await delivery.nak(0)
    back = await subscription.fetch(100, 5.0)
    assert [one.deliveries for one in back] == [2] * len(deliveries)
    return back


async def test_records_land_with_their_place_in_the_stream(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing, subscription: Any
) -> None:
    one = await bus.publish(DIGITS.subject, json.dumps(digit(1)).encode(), id="a")
    two = await bus.publish(DIGITS.subject, message(digit(2), digit(3)), id="b")
    table = pa.Table.from_pylist([digit(4), digit(5)])
    three = await bus.publish(DIGITS.subject, ipc_bytes(table), id="c")
    await landing.land(await landing.gather(subscription))
    expected = [(one, 0, 1), (two, 0, 2), (two, 1, 3), (three, 0, 4), (three, 1, 5)]
    assert await rows_of(db, objects) == expected
    (part,) = await store.parts(db, DIGITS, 0, 10)
    assert (part["first_sequence"], part["last_sequence"]) == (one, three)
    await eventually(lambda: is_done(subscription))


async def is_done(subscription: Subscription) -> bool:
    return (await subscription.backlog()).total == 0


async def test_the_part_is_announced_once_it_is_durable(
    bus: JetStreamBus, db: Database, landing: Landing, subscription: Any
) -> None:
    await bus.publish(DIGITS.subject, message(digit(1)), id="a")
    await landing.land(await landing.gather(subscription))
    assert await db.relay_once(bus) == 1
    (delivery,) = await (await bus.subscribe(EVENTS, "test", ["events.>"])).fetch(10, 1.0)
    _, event = decode(delivery.payload)
    (part,) = await store.parts(db, DIGITS, 0, 10)
    assert isinstance(event, PartLanded)
    assert (event.key, event.rows, event.digest) == (part["key"], 1, part["digest"])


async def test_malformed_records_are_dead_lettered_one_by_one_beside_good_ones(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing, subscription: Any
) -> None:
    bad = [{"pixels": [0.0] * 63, "label": 1}, {"label": 1}, {**digit(1), "label": "one"}]
    bad.append({"pixels": [float("nan")] * 64, "label": 1})
    headers = {"traceparent": TRACE}
    await bus.publish(DIGITS.subject, message(digit(1), *bad, digit(2)), id="a", headers=headers)
    await bus.publish(DIGITS.subject, b"not json", id="b")
    await landing.land(await landing.gather(subscription))
    assert [label for _, _, label in await rows_of(db, objects)] == [1, 2]
    letters = await dead_letters(bus)
    assert {one.subject for one in letters} == {"dlq.records.default.digits"}
    assert sorted(one.headers["Leptonic-Reason"] for one in letters) == [
        "record 0: not JSON: Expecting value: line 1 column 1 (char 0)",
        "record 1: pixels: expected shape [64], got [63]",
        "record 2: pixels: missing",
        "record 3: label: expected int64, got string 'one'",
        "record 4: pixels: value 0: nan is not a finite number",
    ]
    by_field = {one.headers.get("Leptonic-Field"): one for one in letters}
    assert json.loads(by_field["label"].payload) == bad[2]
    assert by_field["label"].headers["Leptonic-Msg-Id"] == "a"
    dataset = await store.dataset(db, DIGITS)
    assert dataset is not None
    assert dataset["dead_letters"] == 5


async def test_a_record_of_5_mb_is_dead_lettered_with_the_numbers(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing, subscription: Any
) -> None:
    big = json.dumps({**digit(1), "note": "x" * 5_000_000}).encode()
    await bus.publish(DIGITS.subject, big, id="big")
    await bus.publish(DIGITS.subject, message(digit(2)), id="good")
    await landing.land(await landing.gather(subscription))
    assert [label for _, _, label in await rows_of(db, objects)] == [2]
    (letter,) = await dead_letters(bus)
    assert letter.payload == big
    reason = f"record 0: {len(big)} bytes, the limit is 1048576 a record"
    assert letter.headers["Leptonic-Reason"] == reason


async def test_a_message_at_the_payload_limit_still_fits_into_a_dead_letter(
    bus: JetStreamBus, landing: Landing, subscription: Any
) -> None:
    await bus.publish(DIGITS.subject, b"x" * (8_388_608 - 100), id="huge")
    await landing.land(await landing.gather(subscription))
    (letter,) = await dead_letters(bus)
    assert letter.headers["Leptonic-Truncated-From-Bytes"] == str(8_388_608 - 100)


async def test_an_unknown_dataset_is_given_time_and_then_dead_lettered(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing, subscription: Any
) -> None:
    await bus.publish("records.default.later", message({"amount": 1, "label": 1}), id="a")
    await bus.publish("records.default.nowhere", message(digit(1)), id="b")
    await bus.publish("records.nonsense", message(digit(1)), id="c")
    landing.unknown_deliveries_max = 2
    await landing.land(await landing.gather(subscription))
    (letter,) = await dead_letters(bus)
    assert "not records.<project>.<dataset>" in letter.headers["Leptonic-Reason"]
    await apply(db, applied("later", schema=SCHEMAS["flat"]), "event-later")
    deliveries: list[Delivery] = []
    while len(deliveries) < 2:
        deliveries += await landing.gather(subscription)
    await landing.land(deliveries)
    assert len(await rows_of(db, objects, Place("default", "later"))) == 1
    (letter,) = await dead_letters(bus)
    assert letter.subject == "dlq.records.default.nowhere"
    assert "no dataset 'nowhere' in project 'default'" in letter.headers["Leptonic-Reason"]


async def test_an_id_seen_before_the_brokers_window_is_a_duplicate(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing, subscription: Any
) -> None:
    await bus.publish(DIGITS.subject, message(digit(1)), id="a")
    await landing.land(await landing.gather(subscription))
    await bus.context.purge_stream("RECORDS")
    # A server that forgot the id, as after its deduplication window: the ids of a stream are
    # dropped with it.
    await bus.context.delete_stream("RECORDS")
    await bus.create_streams()
    fresh = await bus.subscribe(RECORDS, "ingest", ["records.>"])
    await bus.publish(DIGITS.subject, message(digit(1)), id="a")
    await bus.publish(DIGITS.subject, message(digit(2)), id="b")
    await landing.land(await landing.gather(fresh))
    assert [label for _, _, label in await rows_of(db, objects)] == [1, 2]
    dataset = await store.dataset(db, DIGITS)
    assert dataset is not None
    assert (dataset["duplicates"], dataset["rows"]) == (1, 2)
    await eventually(lambda: is_done(fresh))


async def test_a_crash_between_commit_and_ack_lands_once(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing, subscription: Any
) -> None:
    await bus.publish(DIGITS.subject, message(digit(1), digit(2), "bad"), id="a")
    deliveries = await landing.gather(subscription)
    dataset = await store.dataset(db, DIGITS)
    assert dataset is not None
    await landing.write(DIGITS, layout_of(dataset["schema"].encode()), deliveries, [])
    await Landing(bus, db, objects).land(await again(deliveries, subscription))
    assert [label for _, _, label in await rows_of(db, objects)] == [1, 2]
    assert len(await dead_letters(bus)) == 1
    await eventually(lambda: is_done(subscription))


async def test_a_crash_between_part_and_commit_lands_once(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing, subscription: Any
) -> None:
    await bus.publish(DIGITS.subject, message(digit(1), digit(2)), id="a")
    deliveries = await landing.gather(subscription)
    dataset = await store.dataset(db, DIGITS)
    assert dataset is not None
    made, _ = build(DIGITS, layout_of(dataset["schema"].encode()), deliveries)
    assert made
    part, payload = made
    await objects.put(part.key, payload)
    await landing.land(await again(deliveries, subscription))
    assert [label for _, _, label in await rows_of(db, objects)] == [1, 2]
    assert await objects.list("parts/") == [part.key]


async def test_two_replicas_with_the_same_messages_land_them_once(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing, subscription: Any
) -> None:
    for number in range(6):
        await bus.publish(DIGITS.subject, message(digit(number)), id=f"m{number}")
    other = Landing(bus, db, objects)
    second = await bus.subscribe(RECORDS, "another", ["records.>"])
    mine, theirs = await landing.gather(subscription), await other.gather(second)
    await asyncio.gather(landing.land(mine[:4]), other.land(theirs[2:]))
    assert [label for _, _, label in await rows_of(db, objects)] == [0, 1, 2, 3, 4, 5]


async def test_a_message_that_is_twice_in_a_batch_lands_once(
    bus: JetStreamBus, db: Database, objects: ObjectStore, landing: Landing
) -> None:
    """As after a pause longer than the broker waits for an ack."""
    await bus.publish(DIGITS.subject, message(digit(1)), id="a")
    await bus.publish(DIGITS.subject, message(digit(2)), id="b")
    hasty = await bus.subscribe(RECORDS, "hasty", ["records.>"], ack_wait_s=0.1)
    batch = [*await hasty.fetch(2, 5.0), *await hasty.fetch(2, 5.0)]
    assert sorted(one.deliveries for one in batch) == [1, 1, 2, 2]
    async with asyncio.timeout(10):
        await landing.land(sorted(batch, key=lambda one: one.sequence))
    assert [label for _, _, label in await rows_of(db, objects)] == [1, 2]
    await eventually(lambda: is_done(hasty))


async def test_records_wait_while_s3_is_away(
    bus: JetStreamBus, db: Database, tmp_path: Path
) -> None:
    taken = ports.choose("auto", {}, ports.S3_PORTS)
    server = Server(servers.s3(tmp_path / "s3", taken, "key", "secret-key"), tmp_path / "s3.log")
    await server.start()
    objects = ObjectStore(f"{ports.LOOPBACK}:{taken['s3']}", "key", "secret-key", "parts")
    await objects.create_bucket()
    landing = Landing(bus, db, objects)
    task = asyncio.create_task(landing.run())
    try:
        await bus.publish(DIGITS.subject, message(digit(1)), id="before")
        await eventually(lambda: landed(db, 1), timeout_s=40)
        await server.kill()
        for number in range(2, 6):
            await bus.publish(DIGITS.subject, message(digit(number)), id=f"during-{number}")
        await eventually(lambda: landing.retrying)
        assert await landed(db, 1)
        await server.start()
        await eventually(lambda: landed(db, 5), timeout_s=60)
        assert [label for _, _, label in await rows_of(db, objects)] == [1, 2, 3, 4, 5]
        assert landing.retrying == 0
        await landing.drain()
        assert task.done()
    finally:
        task.cancel()
        await server.stop()


async def test_records_wait_while_postgres_is_away(
    bus: JetStreamBus, objects: ObjectStore, tmp_path: Path
) -> None:
    (port,) = ports.free(1)
    server = Server(servers.postgres(tmp_path / "pg", port, "secret"), tmp_path / "pg.log")
    await server.start()
    try:
        dsn = servers.postgres_dsn(port, "secret")
        async with database.connect(dsn, "ingest", MIGRATIONS) as db:
            await apply(db, applied("digits"), "event")
            landing = Landing(bus, db, objects)
            task = asyncio.create_task(landing.run())
            await server.kill()
            for number in range(1, 6):
                await bus.publish(DIGITS.subject, message(digit(number)), id=f"during-{number}")
            await eventually(lambda: landing.retrying, timeout_s=30)
            await server.start()
            await eventually(lambda: landed(db, 5), timeout_s=60)
            assert [label for _, _, label in await rows_of(db, objects)] == [1, 2, 3, 4, 5]
            await landing.drain()
            await task
    finally:
        await server.stop()


async def landed(db: Database, rows: int) -> bool:
    dataset = await store.dataset(db, DIGITS)
    assert dataset is not None
    return bool(dataset["rows"] == rows)


async def test_a_new_revisions_schema_holds_for_new_records(
    bus: JetStreamBus, db: Database, landing: Landing, subscription: Any
) -> None:
    wider = {**SCHEMAS["flat"], "extra": {"type": "bool", "nullable": True}}
    await apply(db, applied("flat", 2, wider), "event-2")
    await apply(db, applied("flat", 1), "event-1-late")
    row = await store.dataset(db, Place("default", "flat"))
    assert row is not None
    assert list(store.fields_of(row["schema"])) == ["amount", "label", "note", "extra"]
    assert explain({"amount": 1, "label": 2, "extra": True}, store.fields_of(row["schema"])) is None
