"""The bus on NATS JetStream. The only file that imports nats."""

import asyncio
import contextlib
import functools
import logging
import uuid
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from typing import Any, ParamSpec, TypeVar

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DeliverPolicy,
    DiscardPolicy,
    RetentionPolicy,
    StreamConfig,
)
from nats.js.client import JetStreamContext

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
    ReadFailed,
    Reply,
    Request,
    Stream,
    Subscription,
    wire,
)
from libs.bus.pipe import Pipe
from libs.bus.responder import Responder

log = logging.getLogger(__name__)
PUBLISH_TIMEOUT_S = 1.0
PUBLISH_TRIES = 5
API_TIMEOUT_S = 5.0
"""To create or look up a stream or a consumer: on a busy disk that takes longer than a publish."""
ACK_PENDING_MAX = 4096
RECONNECT_WAIT_S = 0.2
NATS_PORT = 4222
STREAM_DIFFERS = 10058
"""The server's code: a stream of that name has another configuration."""
CLOSE_S = 2
READ_TIMEOUT_S = 5.0


P = ParamSpec("P")
T = TypeVar("T")


def cancellable(call: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A cancellation ends the call, also when what it waits for comes at that moment.

    nats-py waits with `asyncio.wait_for`, which forgets the one for the other before Python 3.12
    (cpython issue 86296); whoever waits for the cancelled task would wait for ever.
    """

    @functools.wraps(call)
    async def whole(*args: P.args, **kwargs: P.kwargs) -> T:
        task = asyncio.current_task()
        assert task is not None
        before = task.cancelling()
        try:
            return await call(*args, **kwargs)
        finally:
            if task.cancelling() > before:
                raise asyncio.CancelledError

    return whole


async def insisting(call: Coroutine[Any, Any, None]) -> None:
    """For a call that goes on in a loop of its own after it forgot a cancellation, as `connect`."""
    calling = asyncio.create_task(call)
    try:
        await asyncio.wait([calling])
    finally:
        while not calling.done():
            calling.cancel()
            await asyncio.wait([calling], timeout=RECONNECT_WAIT_S)
    await calling


class JetStreamDelivery:
    """A JetStream message as the loop sees it."""

    def __init__(self, message: Msg) -> None:
        metadata = message.metadata
        self.message = message
        self.subject = message.subject
        self.payload = message.data
        self.headers: Mapping[str, str] = message.headers or {}
        self.sequence = metadata.sequence.stream
        self.deliveries = metadata.num_delivered or 1
        self.stored_at_ns = int(metadata.timestamp.timestamp() * 1e9)

    async def ack(self) -> None:
        await self.message.ack()

    async def nak(self, delay_s: float) -> None:
        await self.message.nak(delay=delay_s)

    async def in_progress(self) -> None:
        if not self.message.is_acked:
            await self.message.in_progress()


class JetStreamSubscription:
    """A pull consumer."""

    def __init__(self, pull: JetStreamContext.PullSubscription) -> None:
        self.pull = pull

    @cancellable
    async def fetch(self, limit: int, timeout_s: float) -> list[Delivery]:
        try:
            messages = await self.pull.fetch(limit, timeout=timeout_s)
        except TimeoutError:  # nats-py raises its own, and under load the plain one
            return []
        except (nats.errors.Error, nats.js.errors.Error) as error:
            log.warning("fetch: %s", error)
            await asyncio.sleep(RECONNECT_WAIT_S)
            return []
        return [JetStreamDelivery(message) for message in messages]

    @cancellable
    async def backlog(self) -> Backlog:
        try:
            info = await self.pull.consumer_info()
        except (nats.errors.Error, nats.js.errors.Error) as error:
            raise ConnectionError(f"consumer info: {error}") from error
        return Backlog(waiting=info.num_pending or 0, unacked=info.num_ack_pending or 0)


class JetStreamBus:
    """One connection. Use `connect`."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.context = client.jetstream(timeout=API_TIMEOUT_S)
        self.pipe = Pipe()

    @property
    def connected(self) -> bool:
        return self.client.is_connected

    @property
    def token(self) -> str:
        return self.client.options["token"] or ""

    @property
    def address(self) -> tuple[str, int] | None:
        """Of the server it is connected to."""
        server = self.client.connected_url
        if server is None:
            return None
        assert server.hostname is not None
        return server.hostname, server.port or NATS_PORT

    @cancellable
    async def create_streams(self, streams: Collection[Stream] = STREAMS) -> None:
        """Creates what is missing; what is there is left as an operator has it."""
        for stream in streams:
            full = DiscardPolicy.NEW if stream.is_queue else DiscardPolicy.OLD
            kept = RetentionPolicy.WORK_QUEUE if stream.is_queue else RetentionPolicy.LIMITS
            config = StreamConfig(
                name=stream.name,
                subjects=list(stream.subjects),
                max_age=stream.age_max_s,
                max_bytes=stream.size_max_bytes,
                retention=kept,
                discard=full,
                duplicate_window=DEDUPLICATION_WINDOW_S,
            )
            try:
                await self.context.add_stream(config)
            except nats.js.errors.BadRequestError as error:
                if error.err_code != STREAM_DIFFERS:
                    raise
                await self.enlarge(stream)

    async def enlarge(self, stream: Stream) -> None:
        """A queue gets the size that is asked for, but never a smaller one: that drops messages."""
        known = (await self.context.stream_info(stream.name)).config
        if stream.is_queue and (known.max_bytes or 0) < stream.size_max_bytes:
            await self.context.update_stream(known, max_bytes=stream.size_max_bytes)

    @cancellable
    async def publish(
        self, subject: str, payload: bytes, *, id: str, headers: Mapping[str, str] | None = None
    ) -> int:
        complete = {**(headers or {}), ID_HEADER: id}
        last: Exception | None = None
        for _ in range(PUBLISH_TRIES):
            try:
                receipt = await self.context.publish(
                    subject, payload, timeout=PUBLISH_TIMEOUT_S, headers=complete
                )
            except (nats.errors.Error, nats.js.errors.Error, OSError) as error:
                last = error
                await asyncio.sleep(RECONNECT_WAIT_S)
            else:
                return receipt.seq
        raise PublishFailed(f"{subject}: no ack after {PUBLISH_TRIES} tries: {last}") from last

    @cancellable
    async def publish_all(self, messages: Sequence[Outgoing]) -> None:
        """What does not get through at once is tried again as any other."""
        left, address = list(messages), self.address
        if address is not None:
            left = await self.pipe.publish(address, self.token, messages)
        again = [
            self.publish(one.subject, one.payload, id=one.id, headers=one.headers) for one in left
        ]
        for answer in await asyncio.gather(*again, return_exceptions=True):
            if isinstance(answer, BaseException):
                raise answer

    @cancellable
    async def subscribe(
        self, stream: Stream, durable: str, subjects: list[str], ack_wait_s: float = 30.0
    ) -> Subscription:
        config = ConsumerConfig(
            durable_name=durable,
            filter_subjects=subjects,
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=ack_wait_s,
            max_ack_pending=ACK_PENDING_MAX,
            max_deliver=-1,
        )
        await self.context.add_consumer(stream.name, config=config)
        pull = await self.context.pull_subscribe_bind(consumer=durable, stream=stream.name)
        return JetStreamSubscription(pull)

    @cancellable
    async def read(self, stream: Stream, subject: str, after: int, limit: int) -> list[Delivery]:
        try:
            return await self.read_from(stream, subject, after, limit)
        except (nats.errors.Error, nats.js.errors.Error, OSError) as error:
            raise ReadFailed(f"{stream.name}: {error or type(error).__name__}") from error

    async def read_from(
        self, stream: Stream, subject: str, after: int, limit: int
    ) -> list[Delivery]:
        state = (await self.context.stream_info(stream.name)).state
        start = max(1, (after if after >= 0 else state.last_seq + after) + 1)
        if start > state.last_seq:
            return []
        config = ConsumerConfig(
            name=f"read-{uuid.uuid4().hex}",
            filter_subject=subject,
            deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=start,
            ack_policy=AckPolicy.NONE,
            mem_storage=True,
            inactive_threshold=READ_TIMEOUT_S,
        )
        consumer = await self.context.add_consumer(stream.name, config=config)
        pull = await self.context.pull_subscribe_bind(consumer=config.name, stream=stream.name)
        try:
            count = min(limit, consumer.num_pending or 0)
            messages = await pull.fetch(count, READ_TIMEOUT_S) if count else []
            return [JetStreamDelivery(message) for message in messages]
        finally:
            await pull.unsubscribe()
            await self.context.delete_consumer(stream.name, consumer.name)

    async def broadcast(self, subject: str, payload: bytes) -> None:
        await self.client.publish(subject, payload)

    async def listen(self, subject: str) -> AsyncIterator[tuple[str, bytes]]:
        while True:
            try:
                if (address := self.address) is not None:
                    async for message in wire.listen(address, self.token, subject):
                        yield message
            except OSError as error:
                log.warning("%s: %s", subject, error)
            await asyncio.sleep(RECONNECT_WAIT_S)

    @cancellable
    async def request(
        self, subject: str, payload: bytes, headers: Mapping[str, str], timeout_s: float
    ) -> Reply:
        try:
            message = await self.client.request(subject, payload, timeout_s, headers=dict(headers))
        except (nats.errors.Error, OSError) as error:
            raise NoAnswer(f"{subject}: {error or type(error).__name__}") from error
        return Reply(message.data, message.headers or {})

    @contextlib.asynccontextmanager
    async def respond(self, subject: str, group: str, answer: Answer) -> AsyncIterator[None]:
        async with Responder(answer) as responder:

            async def on_message(message: Msg) -> None:
                if not message.reply:
                    return
                asked = Request(message.subject, message.data, message.headers or {})
                await responder.take(asked, functools.partial(self.reply, message.reply))

            subscription = await self.client.subscribe(subject, group, on_message)
            # So that whoever asks from now on is heard; while the server is away nobody asks, and
            # it hears of us when it is back.
            with contextlib.suppress(nats.errors.Error, TimeoutError):
                await self.client.flush(CLOSE_S)
            try:
                yield
            finally:
                # A connection that is closed has nothing left to take.
                with contextlib.suppress(nats.errors.Error, TimeoutError):
                    await subscription.drain()  # type: ignore[no-untyped-call]

    async def reply(self, inbox: str, reply: Reply) -> None:
        """Nothing when we are not connected any more: who asked gives up by itself."""
        with contextlib.suppress(nats.errors.ConnectionClosedError, OSError):
            await self.client.publish(inbox, reply.payload, headers=dict(reply.headers) or None)


@contextlib.asynccontextmanager
async def connect(
    url: str, token: str = "", name: str = "", streams: Collection[Stream] = STREAMS
) -> AsyncIterator[JetStreamBus]:
    """Connects for as long as the block lasts; waits for a server that is not there yet.

    Creates `streams` where they are missing.
    """

    client: Any = Client()  # typed tighter than it is

    async def on_error(error: Exception) -> None:
        log.warning("nats: %s", error or type(error).__name__)
        # A server that hangs up before it greets, as a proxy does whose server is away, costs a
        # socket a try: the client opens the next without closing this (nats-py 2.16).
        if client._transport is not None and not client.is_connected:
            client._transport.close()

    await insisting(
        client.connect(
            url,
            name=name or None,
            token=token or None,
            error_cb=on_error,
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_WAIT_S,
            ping_interval=5,
            max_outstanding_pings=2,
        )
    )
    bus = JetStreamBus(client)
    try:
        await bus.create_streams(streams)
        yield bus
    finally:
        bus.pipe.close()
        # Not `drain`: it waits for a pull consumer's status messages, which nobody takes.
        with contextlib.suppress(nats.errors.Error, asyncio.TimeoutError):
            await client.flush(timeout=CLOSE_S)
        # Closing a connection whose server was killed can end as cancelled (nats-py 2.16): nobody
        # cancelled us.
        await asyncio.wait([asyncio.ensure_future(client.close())])
