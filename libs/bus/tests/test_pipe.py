"""A batch of publishes is stored whatever becomes of the connection, and says nothing unasked."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from libs.bus import EVENTS, Outgoing, PublishFailed
from libs.bus.jetstream import JetStreamBus
from libs.bus.pipe import Pipe, fits

SUBJECT = "events.p.a.x"


def batch(first: int, count: int = 300) -> list[Outgoing]:
    return [Outgoing(SUBJECT, b"%d" % n, f"id-{n}", {}) for n in range(first, first + count)]


async def stored(bus: JetStreamBus) -> list[int]:
    return [int(one.payload) for one in await bus.read(EVENTS, SUBJECT, 0, 5000)]


class Cut:
    """Before the broker: lets through so many bytes of acks, then hangs up or says no more."""

    def __init__(self, broker: tuple[str, int], acked_bytes: int, silent: bool) -> None:
        self.broker = broker
        self.left = acked_bytes
        self.silent = silent
        self.connections = 0

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[tuple[str, int]]:
        taking: list[asyncio.Task[None]] = []

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            taking.append(asyncio.create_task(self.take(reader, writer)))

        server = await asyncio.start_server(take, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()
        await asyncio.gather(*taking)

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection(*self.broker)
        forth = asyncio.create_task(copy(reader, here))
        while self.left > 0 and (chunk := await there.read(min(self.left, 1000))):
            self.left -= len(chunk)
            writer.write(chunk)
        if not self.silent:
            writer.close()
        await forth
        writer.close()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(1000):
            writer.write(chunk)
    writer.close()


@pytest.mark.parametrize("silent", [False, True])
async def test_what_was_not_acked_is_told_and_the_next_batch_finds_another_connection(
    bus: JetStreamBus, silent: bool
) -> None:
    assert bus.address is not None
    pipe, cut = Pipe(), Cut(bus.address, 5_000, silent)
    async with cut.serve() as address:
        left = await pipe.publish(address, bus.token, batch(0))
        assert 0 < len(left) < 300
        assert left == batch(0)[-len(left) :]
        await bus.publish_all(left)
        cut.left = 1 << 30
        assert await pipe.publish(address, bus.token, batch(300)) == []
        pipe.close()
    assert cut.connections == 2
    assert await stored(bus) == list(range(600))


async def test_nobody_there_is_no_error_but_nothing_is_stored() -> None:
    assert await Pipe().publish(("127.0.0.1", 1), "", batch(0)) == batch(0)


async def test_who_is_cancelled_leaves_nothing_that_confuses_the_next(bus: JetStreamBus) -> None:
    for number in range(20):
        publishing = asyncio.create_task(bus.publish_all(batch(100 * number, 100)))
        for _ in range(number):
            await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        await bus.publish_all(batch(100 * number, 100))
    assert sorted(await stored(bus)) == list(range(2000))


async def test_what_would_end_a_line_is_not_said(bus: JetStreamBus) -> None:
    """It would be a command of its own."""
    forged = f"x 0\r\n\r\nPUB {SUBJECT} 1\r\n1\r\n"
    for one in (
        Outgoing(forged, b"", "a", {}),
        Outgoing(SUBJECT, b"", forged, {}),
        Outgoing(SUBJECT, b"", "a", {"traceparent": forged}),
    ):
        assert not fits(one)
    with pytest.raises(PublishFailed):
        await bus.publish_all([Outgoing(forged, b"2", "b", {}), *batch(3, 1)])
    assert await stored(bus) == [3]
