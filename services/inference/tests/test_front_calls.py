"""What a front does not answer by itself reaches its servicer: every kind of RPC, and its end."""

import asyncio
import json

import grpc
import pytest

from services.inference.tests.fronts import ECHO, kinds, place, refusal, request, values
from stack.testing import eventually

pytestmark = pytest.mark.parametrize("kind", kinds())
Code = grpc.StatusCode


async def test_unary_and_streams_of_every_kind(kind: str) -> None:
    async with place(kind) as here, here.channel() as channel:
        assert await channel.unary_unary(ECHO + "Unary")(b"hello") == b"hello"
        assert await channel.unary_unary(ECHO + "Unary")(b"") == b""
        sent = [bytes([n]) * n for n in range(50)]
        assert await channel.stream_unary(ECHO + "Join")(iter(sent)) == b"".join(sent)
        repeated = [one async for one in channel.unary_stream(ECHO + "Repeat")(b"again")]
        assert repeated == [b"again"] * 5
        talk = channel.stream_stream(ECHO + "Talk")()
        for n in range(20):
            await talk.write(b"%d!" % n)
            assert await talk.read() == (b"%d!" % n)[::-1]
        await talk.done_writing()
        assert await talk.read() is grpc.aio.EOF
        assert await talk.code() is Code.OK


async def test_metadata_goes_both_ways(kind: str) -> None:
    async with place(kind) as here, here.channel() as channel:
        metadata = (("mine", "of bytes"), ("mine", "again"), ("odd-bin", b"\x00\x01"))
        call = channel.unary_unary(ECHO + "About")(b"", metadata=metadata, timeout=60)
        known = json.loads(await call)
        got = [tuple(pair) for pair in known["metadata"]]
        assert ("mine", "of bytes") in got
        assert ("mine", "again") in got
        assert [value.rstrip("=") for name, value in got if name == "odd-bin"] == ["AAE"]
        assert not {name for name, _ in got} & {"te", "content-type", "grpc-timeout", ":path"}
        assert 0 < known["left_s"] <= 61  # gRPC rounds up what it sends
        assert known["peer"].startswith("ipv4:127.0.0.1:")
        trailing = [tuple(pair) for pair in await call.trailing_metadata()]
        assert ("trail", "of bytes") in trailing
        assert ("odd-bin", b"\x00\x01") in trailing


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_messages_are_read(kind: str, how: grpc.Compression) -> None:
    async with place(kind) as here, here.channel(compression=how) as channel:
        assert await channel.unary_unary(ECHO + "Unary")(b"a" * 100_000) == b"a" * 100_000
        sent = [b"b" * 1000] * 20
        assert await channel.stream_unary(ECHO + "Join")(iter(sent)) == b"".join(sent)


@pytest.mark.parametrize(
    "text", ["a %41\n\u00e4 \u20ac\U0001f600", "", "\u20ac" * 100_000, "%" * 100_000]
)
async def test_any_text_of_an_error_arrives(kind: str, text: str) -> None:
    """Headers have their bounds: a long one is cut."""
    async with place(kind) as here, here.channel() as channel:
        code, said = await refusal(channel.unary_unary(ECHO + "Fail")(text.encode()))
        assert code is Code.INVALID_ARGUMENT
        assert said == text or said[:500] == text[:500]
        assert "\ufffd" not in said


async def test_a_deadline_reaches_the_servicer(kind: str) -> None:
    async with place(kind) as here, here.channel() as channel:
        call = channel.unary_unary(ECHO + "Wait")(b"", timeout=0.3)
        assert (await refusal(call))[0] is Code.DEADLINE_EXCEEDED
        await eventually(lambda: here.echo.cancelled == 1)


async def test_a_cancelled_call_ends_its_servicer(kind: str) -> None:
    async with place(kind) as here, here.channel() as channel:
        call = channel.unary_unary(ECHO + "Wait")(b"")
        await eventually(lambda: here.echo.seen)
        call.cancel()
        await eventually(lambda: here.echo.cancelled == 1)


async def test_large_messages_go_both_ways_while_others_go_on(kind: str) -> None:
    async with place(kind) as here, here.channel() as channel, here.client() as client:
        here.serve_digits({"1": 100})
        large = bytes(range(256)) * 40_000
        calls = [channel.unary_unary(ECHO + "Unary")(large, timeout=60) for _ in range(3)]
        small = await asyncio.gather(*(client.ModelInfer(request(n)) for n in range(50)))
        assert [values(one) for one in small] == [[float(n)] * 4 for n in range(50)]
        assert all([await call == large for call in calls])


async def test_an_unknown_method_is_unimplemented(kind: str) -> None:
    async with place(kind) as here, here.channel() as channel:
        code, _ = await refusal(channel.unary_unary("/no.Such/Method")(b""))
        assert code is Code.UNIMPLEMENTED
