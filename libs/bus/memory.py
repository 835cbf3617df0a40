"""The bus in memory, and as unkind as a real one may be, from a seed.

It keeps every promise of the bus (durable once published, at least once, deduplication by id) and
breaks every habit nobody promised: it delivers twice, late, and out of order, forgets acks, and
loses its consumers' unacked work in a crash. A handler that passes over it is idempotent.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import msgspec

from libs.bus import (
    DEDUPLICATION_WINDOW_S,
    ID_HEADER,
    STREAMS,
    Answer,
    Backlog,
    Delivery,
    NoAnswer,
    Outgoing,
    PublishFailed,
    Reply,
    Request,
    Stream,
    Subscription,
)
from libs.bus.responder import Responder

LISTEN_QUEUE_MAX = 4096


class Misbehaviour(msgspec.Struct, frozen=True):
    """Probabilities in 0..1, all drawn from one seed."""

    seed: int = 0
    duplicate: float = 0.0
    """A delivery comes again although it was acked (the ack was lost)."""
    delay: float = 0.0
    """A delivery is held back for a fetch."""
    reorder: float = 0.0
    """A fetch comes in shuffled order."""
    publish_failure: float = 0.0
    """A publish is stored, but its ack is lost: `PublishFailed`."""


KIND = Misbehaviour()


class Stored(msgspec.Struct, frozen=True):
    sequence: int
    subject: str
    payload: bytes
    headers: dict[str, str]
    stored_at_ns: int


def matches(pattern: str, subject: str) -> bool:
    """NATS subject matching: `*` is one token, a final `>` one or more."""
    wanted, got = pattern.split("."), subject.split(".")
    if wanted[-1] == ">":
        return len(got) >= len(wanted) and matches(
            ".".join([*wanted[:-1], "*"]), ".".join(got[: len(wanted)])
        )
    return len(wanted) == len(got) and all(
        fnmatchcase(g, w) for w, g in zip(wanted, got, strict=True)
    )


class MemoryDelivery:
    def __init__(self, stored: Stored, deliveries: int, subscription: "MemorySubscription") -> None:
        self.subject = stored.subject
        self.payload = stored.payload
        self.headers: Mapping[str, str] = stored.headers
        self.sequence = stored.sequence
        self.stored_at_ns = stored.stored_at_ns
        self.deliveries = deliveries
        self.subscription = subscription

    async def ack(self) -> None:
        self.subscription.acked(self.sequence)

    async def nak(self, delay_s: float) -> None:
        self.subscription.again(self.sequence, delay_s)

    async def in_progress(self) -> None:
        self.subscription.touch(self.sequence)


class MemorySubscription:
    """A durable consumer: what was delivered, what was acked, what comes again and when."""

    def __init__(
        self, bus: "MemoryBus", stream: str, subjects: list[str], ack_wait_s: float
    ) -> None:
        self.bus = bus
        self.stream = stream
        self.subjects = subjects
        self.ack_wait_s = ack_wait_s
        self.next = 0
        self.due: dict[int, float] = {}
        self.delivered: dict[int, int] = {}

    async def fetch(self, limit: int, timeout_s: float) -> list[Delivery]:
        ready = self.take(limit)
        if not ready:
            await self.bus.wait(timeout_s)
            ready = self.take(limit)
        return ready

    def take(self, limit: int) -> list[Delivery]:
        """What is due now, oldest first, as far as the bus behaves."""
        chosen = [s for s, at in sorted(self.due.items()) if at <= self.bus.now()][:limit]
        log = self.bus.streams[self.stream]
        while len(chosen) < limit and self.next < len(log):
            stored = log[self.next]
            self.next += 1
            if any(matches(pattern, stored.subject) for pattern in self.subjects):
                chosen.append(stored.sequence)
        deliveries: list[Delivery] = []
        for sequence in chosen:
            if self.bus.happens(self.bus.misbehaviour.delay):
                self.due[sequence] = self.bus.now()
                continue
            deliveries.append(self.deliver(sequence))
        if self.bus.happens(self.bus.misbehaviour.reorder):
            self.bus.random.shuffle(deliveries)
        return deliveries

    def deliver(self, sequence: int) -> Delivery:
        self.delivered[sequence] = self.delivered.get(sequence, 0) + 1
        self.due[sequence] = self.bus.now() + self.ack_wait_s
        stored = self.bus.streams[self.stream][sequence - 1]
        return MemoryDelivery(stored, self.delivered[sequence], self)

    def acked(self, sequence: int) -> None:
        if self.bus.happens(self.bus.misbehaviour.duplicate):
            self.again(sequence, 0.0)
        else:
            self.due.pop(sequence, None)

    def again(self, sequence: int, delay_s: float) -> None:
        """An ack is final: a nak after it changes nothing."""
        if sequence in self.due:
            self.due[sequence] = self.bus.now() + delay_s
            self.bus.wake()

    def touch(self, sequence: int) -> None:
        if sequence in self.due:
            self.due[sequence] = self.bus.now() + self.ack_wait_s

    async def backlog(self) -> Backlog:
        log = self.bus.streams[self.stream][self.next :]
        fresh = sum(any(matches(p, stored.subject) for p in self.subjects) for stored in log)
        return Backlog(waiting=fresh, unacked=len(self.due))


class MemoryBus:
    """Streams in lists. `clock` gives seconds; tests may pass a virtual one."""

    connected = True

    def __init__(
        self, misbehaviour: Misbehaviour = KIND, clock: Callable[[], float] | None = None
    ) -> None:
        self.misbehaviour = misbehaviour
        self.random = random.Random(misbehaviour.seed)  # noqa: S311 - reproducible on purpose
        self.clock = clock
        self.streams: dict[str, list[Stored]] = {stream.name: [] for stream in STREAMS}
        self.seen: dict[tuple[str, str], tuple[int, float]] = {}
        self.consumers: dict[tuple[str, str], MemorySubscription] = {}
        self.listeners: list[tuple[str, asyncio.Queue[tuple[str, bytes]]]] = []
        self.responders: list[tuple[str, Responder]] = []
        self.arrived = asyncio.Event()

    def now(self) -> float:
        return self.clock() if self.clock else asyncio.get_running_loop().time()

    def happens(self, probability: float) -> bool:
        return probability > 0 and self.random.random() < probability

    def wake(self) -> None:
        self.arrived.set()

    async def wait(self, timeout_s: float) -> None:
        """Until something new may be due; never longer than the timeout."""
        soonest = min(
            (at for one in self.consumers.values() for at in one.due.values()),
            default=self.now() + timeout_s,
        )
        patience = max(0.0, min(timeout_s, soonest - self.now()))
        self.arrived.clear()
        try:
            async with asyncio.timeout(patience):
                await self.arrived.wait()
        except TimeoutError:
            return

    async def publish(
        self, subject: str, payload: bytes, *, id: str, headers: Mapping[str, str] | None = None
    ) -> int:
        name = next((s.name for s in STREAMS if any(matches(p, subject) for p in s.subjects)), None)
        if name is None:
            raise PublishFailed(f"{subject}: no stream takes it")
        sequence, at = self.seen.get((name, id), (0, float("-inf")))
        if self.now() - at > DEDUPLICATION_WINDOW_S:
            log = self.streams[name]
            sequence = len(log) + 1
            kept = {**(headers or {}), ID_HEADER: id}
            log.append(Stored(sequence, subject, payload, kept, int(self.now() * 1e9)))
            self.seen[name, id] = (sequence, self.now())
            self.wake()
        if self.happens(self.misbehaviour.publish_failure):
            raise PublishFailed(f"{subject}: the ack was lost")
        return sequence

    async def publish_all(self, messages: Sequence[Outgoing]) -> None:
        sending = [
            self.publish(one.subject, one.payload, id=one.id, headers=one.headers)
            for one in messages
        ]
        for answer in await asyncio.gather(*sending, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    async def subscribe(
        self, stream: Stream, durable: str, subjects: list[str], ack_wait_s: float = 30.0
    ) -> Subscription:
        key = (stream.name, durable)
        if key not in self.consumers:
            self.consumers[key] = MemorySubscription(self, stream.name, subjects, ack_wait_s)
        return self.consumers[key]

    async def read(self, stream: Stream, subject: str, after: int, limit: int) -> list[Delivery]:
        log = self.streams[stream.name]
        reader = MemorySubscription(self, stream.name, [subject], 0.0)
        start = after if after >= 0 else max(0, len(log) + after)
        found = [stored for stored in log[start:] if matches(subject, stored.subject)]
        return [MemoryDelivery(stored, 1, reader) for stored in found[:limit]]

    async def broadcast(self, subject: str, payload: bytes) -> None:
        for pattern, queue in self.listeners:
            if matches(pattern, subject) and not queue.full():
                queue.put_nowait((subject, payload))

    async def listen(self, subject: str) -> AsyncIterator[tuple[str, bytes]]:
        queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(LISTEN_QUEUE_MAX)
        self.listeners.append((subject, queue))
        try:
            while True:
                yield await queue.get()
        finally:
            self.listeners.remove((subject, queue))

    async def request(
        self, subject: str, payload: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        there = [one for pattern, one in self.responders if matches(pattern, subject)]
        if not there:
            raise NoAnswer(f"{subject}: nobody responds")
        replied: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        async def send(reply: Reply) -> None:
            if not replied.done():
                replied.set_result(reply)

        await self.random.choice(there).take(Request(subject, payload, headers), send)
        try:
            async with asyncio.timeout(timeout_s):
                return await replied
        except TimeoutError as error:
            raise NoAnswer(f"{subject}: nothing after {timeout_s} s") from error

    @contextlib.asynccontextmanager
    async def respond(self, subject: str, group: str, answer: Answer) -> AsyncIterator[None]:
        async with Responder(answer) as responder:
            entry = (subject, responder)
            self.responders.append(entry)
            try:
                yield
            finally:
                self.responders.remove(entry)

    def crash(self) -> None:
        """Every consumer's process dies: what it had not acked is due again at once."""
        for consumer in self.consumers.values():
            for sequence in consumer.due:
                consumer.due[sequence] = self.now()
        self.wake()
