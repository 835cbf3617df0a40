"""The bus loop over a bus that misbehaves: every event takes effect once, none is lost."""

import asyncio
import json
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from libs.bus import DEAD_LETTERS, EVENTS, PublishFailed
from libs.bus.loop import (
    ATTEMPTS_MAX,
    UNKNOWN_DELIVERIES_MAX,
    Handlers,
    Meta,
    backoff_s,
    run_once,
    subjects_of,
)
from libs.bus.memory import MemoryBus, Misbehaviour
from libs.contracts.envelope import encode
from libs.contracts.events import JobCancelled, PartLanded, subject_of

EVENT = JobCancelled(project="p", job="j")


class Effects:
    """An idempotent handler's memory: which events took effect, and how often it was called."""

    def __init__(
        self, failures: dict[str, int] | None = None, error: type[BaseException] = ValueError
    ):
        self.inbox: set[str] = set()
        self.effects: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.failures = failures or {}
        self.error = error


async def on_cancelled(event: JobCancelled, meta: Meta, context: Effects) -> None:
    context.calls[meta.id] += 1
    if context.calls[meta.id] <= context.failures.get(event.job, 0):
        raise context.error("not now")
    if meta.id not in context.inbox:
        context.inbox.add(meta.id)
        context.effects[event.job] += 1


HANDLERS: Handlers = {JobCancelled: on_cancelled}


async def publish(bus: MemoryBus, job: str) -> None:
    event = JobCancelled(project="p", job=job)
    payload = encode(event, id=job, service="test", time="2026-01-01T00:00:00Z")
    while True:
        try:
            await bus.publish(subject_of(event), payload, id=job)
        except PublishFailed:
            continue
        return


async def drain(bus: MemoryBus, context: Effects, clock: list[float]) -> None:
    """Runs the loop in virtual time until nothing is pending."""
    subscription = await bus.subscribe(EVENTS, "test", subjects_of(HANDLERS))
    for _ in range(10_000):
        await run_once(bus, subscription, "test", HANDLERS, context, transient=(OSError,))
        clock[0] += 60.0
        bus.wake()
        if (await subscription.backlog()).total == 0:
            return
    raise AssertionError("the loop does not come to rest")


def counted(outcome: str) -> float:
    labels = {"consumer": "test", "type": "job.cancelled", "outcome": outcome}
    return REGISTRY.get_sample_value("leptonic_consumer_messages_total", labels) or 0.0


def misbehaving(clock: list[float], misbehaviour: Misbehaviour) -> MemoryBus:
    return MemoryBus(misbehaviour, clock=lambda: clock[0])


@given(
    seed=st.integers(0, 2**16),
    probability=st.floats(0, 0.6),
    crashes=st.sets(st.integers(0, 30), max_size=3),
)
@settings(max_examples=50, deadline=None)
async def test_every_event_takes_effect_exactly_once(
    seed: int, probability: float, crashes: set[int]
) -> None:
    clock = [0.0]
    bus = misbehaving(clock, Misbehaviour(seed, probability, probability, probability, probability))
    context = Effects()
    for number in range(30):
        await publish(bus, f"job-{number}")
        if number in crashes:
            subscription = await bus.subscribe(EVENTS, "test", subjects_of(HANDLERS))
            await subscription.fetch(7, 0.0)
            bus.crash()
    await drain(bus, context, clock)
    assert context.effects == Counter({f"job-{number}": 1 for number in range(30)})


async def test_an_error_is_tried_again_and_then_dead_lettered_with_its_reason() -> None:
    clock = [0.0]
    bus = misbehaving(clock, Misbehaviour())
    context = Effects(failures={"poison": 1000, "shaky": 2})
    before = {one: counted(one) for one in ("handled", "retried", "dead_lettered")}
    await publish(bus, "poison")
    await publish(bus, "shaky")
    await drain(bus, context, clock)
    assert context.effects == {"shaky": 1}
    assert context.calls["poison"] == ATTEMPTS_MAX
    ended = {one: counted(one) - before[one] for one in before}
    again = ATTEMPTS_MAX - 1 + context.failures["shaky"]
    assert ended == {"handled": 1, "retried": again, "dead_lettered": 1}
    letters = await bus.subscribe(DEAD_LETTERS, "reader", ["dlq.>"])
    (letter,) = await letters.fetch(10, 0.0)
    assert letter.subject == "dlq.events.test"
    assert letter.headers["Leptonic-Reason"] == "ValueError: not now"
    assert json.loads(letter.payload)["data"]["job"] == "poison"


async def test_a_transient_error_is_tried_for_as_long_as_it_lasts() -> None:
    clock = [0.0]
    bus = misbehaving(clock, Misbehaviour())
    context = Effects(failures={"j": 4 * ATTEMPTS_MAX}, error=ConnectionError)
    await publish(bus, "j")
    await drain(bus, context, clock)
    assert context.effects == {"j": 1}
    assert bus.streams["DLQ"] == []


async def test_a_process_that_dies_in_the_handler_leaves_the_event_unacked() -> None:
    clock = [0.0]
    bus = misbehaving(clock, Misbehaviour())
    dying = Effects(failures={"j": 1}, error=asyncio.CancelledError)
    await publish(bus, "j")
    subscription = await bus.subscribe(EVENTS, "test", subjects_of(HANDLERS))
    with pytest.raises(asyncio.CancelledError):
        await run_once(bus, subscription, "test", HANDLERS, dying)
    bus.crash()
    restarted = Effects()
    await drain(bus, restarted, clock)
    assert restarted.effects == {"j": 1}


async def test_what_is_no_event_is_dead_lettered_at_once() -> None:
    clock = [0.0]
    bus = misbehaving(clock, Misbehaviour())
    await bus.publish("events.p.job.cancelled", b"{rubbish", id="1")
    await drain(bus, Effects(), clock)
    (letter,) = bus.streams["DLQ"]
    assert letter.headers["Leptonic-Reason"].startswith("not an event")
    assert letter.payload == b"{rubbish"


async def test_what_the_next_release_says_waits_for_it() -> None:
    """While a service is replaced its two processes share a consumer."""
    clock = [0.0]
    bus = misbehaving(clock, Misbehaviour())
    event: dict[str, object] = {
        "specversion": "1.0",
        "id": "1",
        "source": "/leptonic/x",
        "time": "2027-01-01T00:00:00Z",
    }
    event |= {"type": "ai.leptonic.job.cancelled.v2", "data": {"job": "j"}}
    await bus.publish("events.p.job.cancelled", json.dumps(event).encode(), id="1")
    await publish(bus, "j")
    context = Effects()
    subscription = await bus.subscribe(EVENTS, "test", subjects_of(HANDLERS))
    for _ in range(UNKNOWN_DELIVERIES_MAX):
        assert bus.streams["DLQ"] == []
        await run_once(bus, subscription, "test", HANDLERS, context)
        clock[0] += 60.0
        bus.wake()
    assert context.effects == {"j": 1}
    (letter,) = bus.streams["DLQ"]
    assert "unknown event type 'ai.leptonic.job.cancelled.v2'" in letter.headers["Leptonic-Reason"]


def test_backoff_grows_and_is_bounded() -> None:
    assert [backoff_s(n) for n in (1, 2, 3, 6, 1000)] == [0.5, 1.0, 2.0, 10.0, 10.0]


def test_subjects_follow_from_the_handlers() -> None:
    assert subjects_of({PartLanded: on_cancelled}) == ["events.*.part.landed"]


def test_events_are_frozen() -> None:
    with pytest.raises(AttributeError):
        EVENT.job = "other"  # type: ignore[misc]
    assert msgspec.structs.replace(EVENT, job="other").job == "other"
