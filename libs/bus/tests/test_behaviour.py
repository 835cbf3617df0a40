"""What every bus does, shown on the real one and on its twin."""

import asyncio

import pytest

from libs.bus import (
    EVENTS,
    FEEDBACK,
    RECORDS,
    Backlog,
    Bus,
    NoAnswer,
    Outgoing,
    PublishFailed,
    Reply,
    Request,
)
from libs.bus.jetstream import JetStreamBus
from libs.bus.memory import MemoryBus


@pytest.fixture(params=["jetstream", "memory"])
def either(request: pytest.FixtureRequest, bus: JetStreamBus) -> Bus:
    return MemoryBus() if request.param == "memory" else bus


async def test_publish_returns_growing_sequences(either: Bus) -> None:
    first = await either.publish("records.p.d", b"1", id="a")
    second = await either.publish("records.p.d", b"2", id="b")
    assert second == first + 1


async def test_the_same_id_is_stored_once(either: Bus) -> None:
    first = await either.publish("records.p.d", b"1", id="same")
    again = await either.publish("records.p.d", b"1", id="same")
    other = await either.publish("records.p.d", b"1", id="other")
    assert (again, other) == (first, first + 1)


async def test_many_are_stored_in_order_and_each_once(either: Bus) -> None:
    place = {"traceparent": "t"}
    many = [Outgoing("events.p.a.x", b"%d\r\n" % n, f"id {n}", place) for n in range(1500)]
    await either.publish("events.p.a.x", b"7\r\n", id="id 7")
    await either.publish_all(many[:1000])
    await either.publish_all(many[900:])
    await either.publish_all([])
    stored = await either.read(EVENTS, "events.>", 0, 2000)
    assert [one.payload for one in stored] == [
        b"7\r\n",
        *(one.payload for one in many if one.id != "id 7"),
    ]
    last = stored[-1]
    assert (last.subject, dict(last.headers)) == (
        "events.p.a.x",
        {"traceparent": "t", "Nats-Msg-Id": "id 1499"},
    )


async def test_one_of_many_that_no_stream_takes_is_said(either: Bus) -> None:
    many = [Outgoing(subject, b"", subject, {}) for subject in ("records.a", "nowhere.at.all")]
    with pytest.raises(PublishFailed, match="nowhere"):
        await either.publish_all([*many, Outgoing("records.b", b"", "b", {})])
    stored = await either.read(RECORDS, "records.>", 0, 10)
    assert [one.subject for one in stored] == ["records.a", "records.b"]


async def test_a_subject_no_stream_takes_is_not_acked(either: Bus) -> None:
    with pytest.raises(PublishFailed, match="nowhere"):
        await either.publish("nowhere.at.all", b"", id="x")


async def test_a_consumer_sees_what_was_published_before_it_came(either: Bus) -> None:
    await either.publish("records.p.d", b"early", id="e", headers={"traceparent": "t"})
    subscription = await either.subscribe(RECORDS, "late", ["records.>"])
    (delivery,) = await subscription.fetch(10, 2.0)
    assert (delivery.subject, delivery.payload) == ("records.p.d", b"early")
    assert (delivery.headers["traceparent"], delivery.headers["Nats-Msg-Id"]) == ("t", "e")
    assert delivery.deliveries == 1
    await delivery.ack()


async def test_subjects_filter(either: Bus) -> None:
    await either.publish("events.p.job.requested", b"no", id="1")
    await either.publish("events.p.part.landed", b"yes", id="2")
    await either.publish("events.q.part.landed", b"too", id="3")
    subscription = await either.subscribe(EVENTS, "parts", ["events.*.part.landed"])
    payloads = [d.payload for d in await subscription.fetch(2, 2.0)]
    assert payloads == [b"yes", b"too"]


async def test_acked_never_comes_again_and_naked_does(either: Bus) -> None:
    await either.publish("feedback.p.m", b"keep", id="1")
    await either.publish("feedback.p.m", b"again", id="2")
    subscription = await either.subscribe(FEEDBACK, "f", ["feedback.>"])
    kept, again = await subscription.fetch(2, 2.0)
    await kept.ack()
    await again.nak(0.0)
    (redelivered,) = await subscription.fetch(2, 5.0)
    assert (redelivered.payload, redelivered.deliveries) == (b"again", 2)
    assert redelivered.sequence == again.sequence
    await redelivered.ack()
    assert await subscription.fetch(2, 0.3) == []
    assert (await subscription.backlog()).total == 0


async def test_reading_takes_nothing_and_starts_where_told(either: Bus) -> None:
    subjects = ["events.p.a.x", "events.q.a.x", "events.p.a.x", "events.p.a.x"]
    sequences = [await either.publish(s, b"", id=str(i)) for i, s in enumerate(subjects)]

    async def read(subject: str, after: int, limit: int) -> list[int]:
        return [d.sequence for d in await either.read(EVENTS, subject, after, limit)]

    assert await read("events.p.>", sequences[0], 10) == sequences[2:]
    assert await read("events.>", sequences[0], 2) == sequences[1:3]
    assert await read("events.>", -2, 10) == sequences[2:]
    assert await read("events.>", sequences[-1], 10) == []
    assert await read("events.none.>", 0, 10) == []
    assert await read("events.p.>", sequences[0], 10) == sequences[2:]


async def test_unacked_comes_again_after_the_ack_wait(either: Bus) -> None:
    await either.publish("feedback.p.m", b"x", id="1")
    subscription = await either.subscribe(FEEDBACK, "slow", ["feedback.>"], ack_wait_s=0.5)
    await subscription.fetch(1, 2.0)
    (redelivered,) = await subscription.fetch(1, 5.0)
    assert redelivered.deliveries == 2


async def test_a_durable_consumer_resumes_where_it_was(either: Bus) -> None:
    for number in range(3):
        await either.publish("records.p.d", b"%d" % number, id=str(number))
    first = await either.subscribe(RECORDS, "durable", ["records.>"])
    (delivery,) = await first.fetch(1, 2.0)
    await delivery.ack()
    second = await either.subscribe(RECORDS, "durable", ["records.>"])
    assert [d.payload for d in await second.fetch(2, 2.0)] == [b"1", b"2"]


async def test_two_consumers_each_get_everything(either: Bus) -> None:
    await either.publish("records.p.d", b"x", id="1")
    for durable in ("one", "two"):
        subscription = await either.subscribe(RECORDS, durable, ["records.>"])
        assert [d.payload for d in await subscription.fetch(1, 2.0)] == [b"x"]


async def test_pending_counts_the_waiting_and_the_unacked(either: Bus) -> None:
    for number in range(3):
        await either.publish("records.p.d", b"", id=str(number))
    subscription = await either.subscribe(RECORDS, "lag", ["records.>"])
    (delivery,) = await subscription.fetch(1, 2.0)
    assert await subscription.backlog() == Backlog(waiting=2, unacked=1)
    await delivery.ack()
    assert await (await either.subscribe(RECORDS, "lag", ["records.>"])).fetch(1, 2.0) != []


async def test_broadcast_reaches_whoever_listens(either: Bus) -> None:
    heard: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def listen() -> None:
        async for message in either.listen("heartbeats.>"):
            heard.put_nowait(message)

    task = asyncio.create_task(listen())
    while heard.empty():
        await either.broadcast("heartbeats.node", b"alive")
        await asyncio.sleep(0)
    assert heard.get_nowait() == ("heartbeats.node", b"alive")
    task.cancel()


async def test_a_request_is_answered_by_one_of_its_group(either: Bus) -> None:
    taken: list[str] = []

    async def upper(request: Request) -> Reply:
        taken.append(request.subject)
        return Reply(request.payload.upper(), {"echo": request.headers["sent"]})

    async with (
        either.respond("predict.p.m", "predict", upper),
        either.respond("predict.p.m", "predict", upper),
    ):
        for number in range(8):
            reply = await either.request("predict.p.m", b"a%d" % number, {"sent": "s"}, 5.0)
            assert (reply.payload, reply.headers["echo"]) == (b"A%d" % number, "s")
    assert taken == ["predict.p.m"] * 8


async def test_requests_are_answered_side_by_side(either: Bus) -> None:
    """Else they could not share a batch."""
    both = asyncio.Barrier(2)

    async def meet(request: Request) -> Reply:
        await both.wait()
        return Reply(request.payload, {})

    async with either.respond("predict.p.m", "predict", meet):
        replies = await asyncio.gather(
            *(either.request("predict.p.m", one, {}, 5.0) for one in (b"1", b"2"))
        )
    assert [reply.payload for reply in replies] == [b"1", b"2"]


async def test_what_was_accepted_is_answered_after_the_end(either: Bus) -> None:
    accepted, leaving = asyncio.Event(), asyncio.Event()

    async def slow(request: Request) -> Reply:
        accepted.set()
        await leaving.wait()
        return Reply(b"late", {})

    async with either.respond("predict.p.m", "predict", slow):
        asked = asyncio.create_task(either.request("predict.p.m", b"", {}, 10.0))
        await accepted.wait()
        asyncio.get_running_loop().call_soon(leaving.set)
    assert (await asked).payload == b"late"
    with pytest.raises(NoAnswer, match=r"predict\.p\.m"):
        await either.request("predict.p.m", b"", {}, 1.0)


async def test_an_answer_that_raises_is_logged_and_the_next_is_answered(
    either: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    async def picky(request: Request) -> Reply:
        if not request.payload:
            raise ValueError("empty")
        return Reply(request.payload, {})

    async with either.respond("predict.p.m", "predict", picky):
        with pytest.raises(NoAnswer):
            await either.request("predict.p.m", b"", {}, 0.2)
        assert (await either.request("predict.p.m", b"x", {}, 5.0)).payload == b"x"
    assert "a request was not answered" in caplog.text
