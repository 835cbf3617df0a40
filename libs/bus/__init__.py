"""What a bus is: streams that keep messages until they are acked, and nothing of any broker.

`jetstream.py` is the real one and the only file that knows NATS; `memory.py` is its twin for
tests, which misbehaves from a seed. Both pass `tests/test_behaviour.py`.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

import msgspec

ID_HEADER = "Nats-Msg-Id"
TRACE_HEADER = "traceparent"


class Stream(msgspec.Struct, frozen=True):
    """A durable log of subjects. A publish is acked once it is on disk."""

    name: str
    subjects: tuple[str, ...]
    age_max_s: int
    """0: however old."""
    size_max_bytes: int
    is_queue: bool = False
    """One consumer empties it, and a full one refuses a publish; others drop what is oldest."""


DAY_S = 86_400
GIB = 1 << 30
RECORDS = Stream("RECORDS", ("records.>",), 7 * DAY_S, 8 * GIB)
EVENTS = Stream("EVENTS", ("events.>",), 30 * DAY_S, 2 * GIB)
FEEDBACK = Stream("FEEDBACK", ("feedback.>",), 7 * DAY_S, GIB)
REQUESTS = Stream("REQUESTS", ("requests.>",), DAY_S, 2 * GIB)
DEAD_LETTERS = Stream("DLQ", ("dlq.>",), 30 * DAY_S, 2 * GIB)
STREAMS = (RECORDS, EVENTS, FEEDBACK, REQUESTS, DEAD_LETTERS)
DEDUPLICATION_WINDOW_S = 120
PAYLOAD_BYTES_MAX = 8 << 20
ANSWERING_MAX = 4096
"""Requests of one responder under way; further ones wait where the broker put them."""


class PublishFailed(ConnectionError):
    """No ack came; publishing again with the same id is safe."""


class ReadFailed(ConnectionError):
    """The broker did not answer a read."""


class NoAnswer(ConnectionError):
    """Nobody responds to the subject, or nobody did in time."""


class Outgoing(NamedTuple):
    """One of many to be published."""

    subject: str
    payload: bytes
    id: str
    headers: Mapping[str, str]


class Request(NamedTuple):
    """Somebody waits for the answer."""

    subject: str
    payload: bytes
    headers: Mapping[str, str]


class Reply(NamedTuple):
    payload: bytes
    headers: Mapping[str, str]


Answer = Callable[[Request], Awaitable[Reply]]


class Delivery(Protocol):
    """One message handed to one consumer, once or again."""

    subject: str
    payload: bytes
    headers: Mapping[str, str]
    sequence: int
    """Position in the stream: the message's identity."""
    deliveries: int
    """1 the first time."""
    stored_at_ns: int
    """When the stream took it, Unix time in ns."""

    async def ack(self) -> None: ...
    async def nak(self, delay_s: float) -> None: ...
    async def in_progress(self) -> None: ...


class Backlog(msgspec.Struct, frozen=True):
    """What a durable consumer has not settled."""

    waiting: int
    """Messages not yet delivered."""
    unacked: int
    """Delivered and not acked."""

    @property
    def total(self) -> int:
        return self.waiting + self.unacked


class Subscription(Protocol):
    """A durable consumer's place in a stream."""

    async def fetch(self, limit: int, timeout_s: float) -> list[Delivery]:
        """Up to `limit` deliveries; [] after `timeout_s` without any."""
        ...

    async def backlog(self) -> Backlog:
        """Raises `ConnectionError` when the broker does not say."""
        ...


class Bus(Protocol):
    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now."""
        ...

    async def publish(
        self, subject: str, payload: bytes, *, id: str, headers: Mapping[str, str] | None = None
    ) -> int:
        """Returns the stream sequence once the message is durable.

        The same `id` within the deduplication window is stored once. Raises `PublishFailed`.
        """
        ...

    async def publish_all(self, messages: Sequence[Outgoing]) -> None:
        """Returns once all are durable. One that has to be tried again comes after the others.

        Raises `PublishFailed` when one is not; publishing all again is safe.
        """
        ...

    async def subscribe(
        self, stream: Stream, durable: str, subjects: list[str], ack_wait_s: float = 30.0
    ) -> Subscription:
        """Creates or resumes the durable consumer, from the stream's first message."""
        ...

    async def read(self, stream: Stream, subject: str, after: int, limit: int) -> list[Delivery]:
        """Up to `limit` messages of a subject after a sequence, oldest first, without taking them.

        A negative `after` counts from the stream's end: -10 looks at its last ten messages.
        Raises `ReadFailed`.
        """
        ...

    async def broadcast(self, subject: str, payload: bytes) -> None:
        """To whoever listens now; nothing is kept."""
        ...

    def listen(self, subject: str) -> AsyncIterator[tuple[str, bytes]]:
        """(subject, payload) of broadcasts, from now on."""
        ...

    async def request(
        self, subject: str, payload: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        """One responder's answer; nothing is kept. Raises `NoAnswer`."""
        ...

    def respond(
        self, subject: str, group: str, answer: Answer
    ) -> AbstractAsyncContextManager[None]:
        """Answers while the block lasts, many at once; each request goes to one of the group.

        When it ends, others of the group take over, and what came is answered. A request whose
        `answer` raises gets none: that is a defect, and logged.
        """
        ...
