"""A client that misbehaves gets a clear end and hurts nobody: bare sockets, fuzzed bytes."""

import asyncio
import struct

import grpc
import pytest

from libs.contracts.protos import open_inference_pb2 as oip
from services.inference import frames, rpcs
from services.inference.rpcs import MESSAGE_BYTES_MAX, MODEL_INFER
from services.inference.tests.fronts import (
    ECHO,
    POST,
    chunks,
    kinds,
    place,
    prefixed,
    request,
    still_answers,
    values,
)
from stack.testing import eventually

pytestmark = pytest.mark.parametrize("kind", kinds())
PLAIN = request(3.0)
GOOD = PLAIN.SerializeToString()
CUT = -1
"""No fault is heard: what the front had not read when it closed took its last words along."""


def response(data: bytes) -> oip.ModelInferResponse:
    """Of a unary call's data."""
    assert data[0] == 0
    assert int.from_bytes(data[1:5], "big") == len(data) - 5
    return oip.ModelInferResponse.FromString(data[5:])


async def test_a_byte_at_a_time_is_a_request_too(kind: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        for one in chunks(raw.hello() + raw.ask(MODEL_INFER, prefixed(GOOD)), 1):
            await raw.say(one)
            await asyncio.sleep(0)
        assert values(response(await raw.answer(1))) == [3.0] * 4
        await still_answers(here)


@pytest.mark.parametrize("split", [1, 7, 100])
async def test_a_message_may_come_in_any_pieces(kind: str, split: int) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        await raw.say(raw.hello() + raw.ask(MODEL_INFER, prefixed(GOOD), split))
        assert values(response(await raw.answer(1))) == [3.0] * 4


async def test_clients_that_vanish_leave_nothing_behind(kind: str) -> None:
    async with place(kind) as here:
        here.go.clear()
        batcher = here.serve_digits({"1": 100})["1"]
        for _ in range(20):
            raw = await here.raw()
            asked = raw.ask(MODEL_INFER, prefixed(GOOD)) + raw.ask(ECHO + "Wait", prefixed(b""))
            await raw.say(raw.hello() + asked)
            await raw.until(frames.SETTINGS)
            await eventually(lambda: batcher.counts().waiting > 0)
            raw.vanish()
        await eventually(lambda: batcher.counts().waiting == 0)
        await eventually(lambda: not here.host.running)
        here.go.set()
        await still_answers(here)


async def test_half_a_request_is_nobodys(kind: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        whole = raw.hello() + raw.ask(MODEL_INFER, prefixed(GOOD))
        await raw.say(whole[: len(whole) // 2])
        await still_answers(here)


async def test_half_a_message_is_refused(kind: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        await raw.say(raw.hello() + raw.ask(MODEL_INFER, prefixed(GOOD)[:-1]))
        assert (await raw.headers())["grpc-status"] in {"3", "13"}
        await still_answers(here)


async def test_who_does_not_read_is_not_written_for(kind: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        window = struct.pack(">HI", frames.INITIAL_WINDOW, frames.WINDOW_MAX)
        opening = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, window)
        more = frames.WORD.pack(frames.WINDOW_MAX - frames.WINDOW_DEFAULT)
        opening += frames.frame(frames.WINDOW_UPDATE, 0, 0, more)
        await raw.say(opening + raw.ask(ECHO + "Flood", prefixed(b"")))
        await eventually(lambda: here.echo.written > 0)

        async def stands_still() -> bool:
            before = here.echo.written
            for _ in range(10):
                await still_answers(here)
            return before == here.echo.written

        await eventually(stands_still)
        assert here.echo.written < 128
        raw.vanish()
        await eventually(lambda: not here.host.running)


async def test_small_windows_are_kept(kind: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        window = struct.pack(">HI", frames.INITIAL_WINDOW, 10)
        opening = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, window)
        await raw.say(opening + raw.ask(MODEL_INFER, prefixed(GOOD)))
        data = b""
        while True:
            found, flags, stream, payload = await raw.frame()
            if stream == 1 and found == frames.DATA:
                assert len(payload) <= 10
                data += payload
                update = frames.WORD.pack(len(payload) or 1)
                await raw.say(frames.frame(frames.WINDOW_UPDATE, 0, 1, update))
            if stream == 1 and found == frames.HEADERS and flags & frames.END_STREAM:
                break
        assert values(response(data)) == [3.0] * 4


async def test_a_message_that_is_too_large_is_refused_by_its_length(kind: str) -> None:
    async with place(kind) as here, here.channel() as channel:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        for stream, size in enumerate((MESSAGE_BYTES_MAX + 1, (1 << 32) - 1)):
            claim = b"\x00" + size.to_bytes(4, "big") + bytes(100)
            await raw.say((b"" if stream else raw.hello()) + raw.ask(MODEL_INFER, claim))
            said = await raw.headers()
            assert said["grpc-status"] == "8"
            assert said["grpc-message"] == f"message of {size} bytes: at most 67108864 are taken"
        large = bytes(MESSAGE_BYTES_MAX + 1)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary(ECHO + "Unary")(large, timeout=60)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await still_answers(here)


async def test_large_requests_together_are_bounded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpcs, "HELD_BYTES_MAX", 1_000_000)
    async with place(kind) as here, here.channel() as channel:
        here.serve_digits({"1": 100})
        echo = channel.unary_unary(ECHO + "Unary")
        assert len(await echo(bytes(800_000))) == 800_000
        assert len(await echo(bytes(800_000))) == 800_000  # the first is no longer counted
        half = await here.raw()
        await half.say(half.hello())
        await half.until(frames.SETTINGS)
        await half.say(frames.frame(frames.SETTINGS, 1, 0, b""))  # now the window is theirs
        await half.say(half.ask(ECHO + "Unary", prefixed(bytes(800_000)))[:700_000])
        await eventually(lambda: here.front.held > 600_000)  # type: ignore[attr-defined]
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await echo(bytes(800_000))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        half.vanish()
        await eventually(lambda: here.front.held == 0)  # type: ignore[attr-defined]
        assert len(await echo(bytes(800_000))) == 800_000


def broken() -> dict[str, tuple[bytes, set[int]]]:
    """What is said after the opening, and which fault may end the connection."""
    head = frames.block([(b":path", MODEL_INFER.encode()), *POST])
    frame, protocol = frames.frame, frames.PROTOCOL_ERROR
    flood = frame(frames.HEADERS, 0, 1, head)
    flood += frame(frames.CONTINUATION, 0, 1, frames.block([(b"a", bytes(9000))])) * 20
    opened = frame(frames.HEADERS, frames.END_HEADERS, 1, head)
    word, calm, internal = frames.WORD.pack, frames.ENHANCE_YOUR_CALM, frames.INTERNAL_ERROR
    resets = b"".join(
        frame(frames.HEADERS, frames.END_HEADERS, 2 * n + 1, head)
        + frame(frames.RST_STREAM, 0, 2 * n + 1, word(frames.CANCEL))
        for n in range(5000)
    )
    made = b"".join(
        frame(frames.HEADERS, frames.END_HEADERS, 2 * n + 1, head)
        + frame(frames.WINDOW_UPDATE, 0, 2 * n + 1, word(0))
        for n in range(5000)
    )
    size = frames.FRAME_SIZE_ERROR
    return {
        "data on stream 0": (frame(frames.DATA, 0, 0, b"a"), {protocol}),
        "data on an idle stream": (
            frame(frames.DATA, 0, 5, b"a"),
            {protocol, frames.STREAM_CLOSED},
        ),
        "headers on an even stream": (frame(frames.HEADERS, 4, 2, head), {protocol}),
        "headers on stream 0": (frame(frames.HEADERS, 4, 0, head), {protocol}),
        "another frame amidst headers": (
            frame(frames.HEADERS, 0, 1, head) + frame(frames.PING, 0, 0, bytes(8)),
            {protocol},
        ),
        "a continuation of nothing": (frame(frames.CONTINUATION, 4, 1, head), {protocol}),
        "headers that never end": (flood, {calm, protocol, internal, CUT}),
        "no header block": (
            frame(frames.HEADERS, 4, 1, b"\xff\xff\xff\xff\xff\xff"),
            {frames.COMPRESSION_ERROR},
        ),
        "a frame that is too large": (frame(frames.DATA, 0, 1, bytes(20000)), {size}),
        "a ping of 7 bytes": (frame(frames.PING, 0, 0, bytes(7)), {size}),
        "settings of 5 bytes": (frame(frames.SETTINGS, 0, 0, bytes(5)), {size}),
        "settings of a stream": (frame(frames.SETTINGS, 0, 1, b""), {protocol}),
        "a window that is too large": (
            frame(frames.WINDOW_UPDATE, 0, 0, word(frames.WINDOW_MAX)),
            {frames.FLOW_CONTROL_ERROR},
        ),
        "a window that opens by nothing": (frame(frames.WINDOW_UPDATE, 0, 0, word(0)), {protocol}),
        "a push": (opened + frame(frames.PUSH, 4, 1, word(2) + head), {protocol}),
        "a reset of an idle stream": (frame(frames.RST_STREAM, 0, 7, word(8)), {protocol}),
        "more padding than payload": (opened + frame(frames.DATA, 8, 1, b"\x09a"), {protocol}),
        "streams opened to be reset": (resets, {calm, internal, CUT}),
        "streams opened to make us reset them": (made, {calm, internal, protocol, CUT}),
    }


@pytest.mark.parametrize("what", broken())
async def test_who_breaks_the_protocol_is_told_and_cut_off(kind: str, what: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        said, faults = broken()[what]
        raw = await here.raw()
        await raw.say(raw.hello() + said)
        assert await raw.fault() in faults
        await still_answers(here)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n" + bytes(30), bytes(100)])
async def test_who_speaks_something_else_is_cut_off(kind: str, said: bytes) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        await raw.say(said)
        await raw.fault()
        await still_answers(here)


async def test_pings_are_answered_and_a_flood_of_them_is_bounded(kind: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        await raw.say(raw.hello() + frames.frame(frames.PING, 0, 0, b"12345678"))
        assert await raw.until(frames.PING) == b"12345678"
        flood = frames.frame(frames.PING, 0, 0, bytes(8)) * 10_000
        for _ in range(50):  # none of whose answers is read
            raw.writer.write(flood)
        await still_answers(here)
        raw.vanish()


async def test_a_stream_too_many_is_refused_alone(kind: str) -> None:
    async with place(kind) as here:
        here.go.clear()
        here.serve_digits({"1": 100})
        raw = await here.raw()
        asked = b"".join(raw.ask(MODEL_INFER, prefixed(GOOD)) for _ in range(1025))
        await raw.say(raw.hello() + asked)
        refused = await raw.until(frames.RST_STREAM)
        assert int.from_bytes(refused, "big") == frames.REFUSED_STREAM
        here.go.set()
        await raw.until(frames.DATA)
        await still_answers(here)


async def test_other_ways_to_ask_have_an_answer(kind: str) -> None:
    """Padding, a priority, continued headers, trailers, a table that shrinks, unknown frames."""
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        small = struct.pack(">HI", frames.TABLE_SIZE, 0)
        opening = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, small)
        path = (b":path", MODEL_INFER.encode())
        head = frames.block([path, *POST[:3]])
        rest = frames.block([(b"te", b"trailers"), (b"content-type", b"application/grpc+proto")])
        padded = b"\x03" + frames.WORD.pack(0) + b"\x10" + head + bytes(3)
        body = prefixed(GOOD)
        say = [
            frames.frame(frames.HEADERS, frames.PADDED | frames.HAS_PRIORITY, 1, padded),
            frames.frame(frames.CONTINUATION, 0, 1, rest[:5]),
            frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, rest[5:]),
            frames.frame(frames.PRIORITY, 0, 1, frames.WORD.pack(0) + b"\x01"),
            frames.frame(0xBE, 0, 1, b"unknown"),
            frames.frame(frames.DATA, frames.PADDED, 1, b"\x02" + body[:20] + bytes(2)),
            frames.frame(frames.DATA, 0, 1, b""),
            frames.frame(frames.DATA, 0, 1, body[20:]),
            frames.frame(frames.HEADERS, 5, 1, frames.block([(b"trail", b"er")])),
        ]
        await raw.say(opening + b"".join(say))
        assert values(response(await raw.answer(1))) == [3.0] * 4


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ([(b":method", b"GET")], (":status", "405")),
        ([(b"content-type", b"text/html")], (":status", "415")),
        ([(b"grpc-timeout", b"soon")], ("grpc-status", "13")),
        ([(b"grpc-encoding", b"snappy")], ("grpc-status", "12")),
    ],
)
async def test_headers_that_ask_for_something_else_are_answered(
    kind: str, headers: list[frames.Header], said: tuple[str, str]
) -> None:
    async with place(kind) as here:
        given = {b":method": b"POST", b":path": b"/a", b":scheme": b"http", b":authority": b"a"}
        given |= {b"content-type": b"application/grpc"} | dict(headers)
        raw = await here.raw()
        head = frames.block(list(given.items()))
        await raw.say(raw.hello() + frames.frame(frames.HEADERS, 5, 1, head))
        assert said in (await raw.headers()).items()
