"""What is split from the broker's socket is what was said, wherever the chunks end."""

import asyncio
import random

import pytest

from libs.bus import wire
from libs.bus.jetstream import JetStreamBus
from stack.testing import eventually

SAID = [(f"heartbeats.n{number}", b"MSG a 1 3\r\n\x00\r\n" * number) for number in range(40)]


def written() -> bytes:
    parts = [b"PING\r\n", b"+OK\r\n"]
    for number, (subject, payload) in enumerate(SAID):
        reply = "" if number % 3 else " _INBOX.x"
        parts.append(f"MSG {subject} 1{reply} {len(payload)}\r\n".encode() + payload + b"\r\n")
    return b"".join([*parts, b"PING\r\n"])


@pytest.mark.parametrize("seed", range(20))
def test_chunks_of_any_size_give_the_same(seed: int) -> None:
    chance, stream = random.Random(seed), written()
    messages, pings, rest, at = [], 0, b"", 0
    while at < len(stream):
        size = chance.randint(1, 200)
        heard = wire.split(rest + stream[at : at + size])
        messages += heard.messages
        pings, rest, at = pings + heard.pings, heard.rest, at + size
    assert (messages, pings, rest) == (SAID, 2, b"")


def test_what_the_server_complains_of_ends_it() -> None:
    with pytest.raises(ConnectionRefusedError, match="Authorization Violation"):
        wire.split(b"+OK\r\n-ERR 'Authorization Violation'\r\n")


async def test_a_burst_of_many_is_heard_completely(bus: JetStreamBus) -> None:
    """More than the client of the bus would keep for who is slow."""
    heard: list[tuple[str, bytes]] = []

    async def listen() -> None:
        async for message in bus.listen("heartbeats.>"):
            heard.append(message)  # noqa: PERF401 - it never ends

    task = asyncio.create_task(listen())

    async def is_heard() -> bool:
        await bus.broadcast("heartbeats.first", b"")
        return bool(heard)

    await eventually(is_heard)
    for number in range(6000):
        await bus.broadcast(f"heartbeats.n{number}", b"x" * 300)
    await eventually(lambda: heard[-1][0] == "heartbeats.n5999")
    told = [subject for subject, _ in heard if subject != "heartbeats.first"]
    assert told == [f"heartbeats.n{number}" for number in range(6000)]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_server_that_takes_the_connection_and_is_silent_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wire, "QUIET_S", 0.05)
    over = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        listening = wire.listen((host, port), "", ">")
        waiting = asyncio.ensure_future(anext(listening))
        await asyncio.wait({waiting}, timeout=20)
        assert isinstance(waiting.exception(), TimeoutError)
        over.set()
