"""Whatever bytes come, a front has a clear answer, and goes on."""

import asyncio
import contextlib
import random
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.inference import frames
from services.inference.rpcs import MODEL_INFER
from services.inference.tests.fronts import (
    ECHO,
    Place,
    RawClient,
    kinds,
    place,
    prefixed,
    request,
    still_answers,
)
from stack.testing import eventually

pytestmark = pytest.mark.parametrize("kind", kinds())
PLAIN = request(3.0)
GOOD = PLAIN.SerializeToString()


async def poured(here: Place, data: bytes) -> None:
    """Said at once, and heard for as long as there is something to hear."""
    raw = await here.raw()
    with contextlib.suppress(TimeoutError, ConnectionError):
        await raw.say(data)
        async with asyncio.timeout(0.02):
            while await raw.reader.read(1 << 16):
                continue
    raw.vanish()


def conversation(raw: RawClient) -> bytes:
    asked = [raw.ask(MODEL_INFER, prefixed(GOOD), split) for split in (16384, 50)]
    asked += [raw.ask(ECHO + name, prefixed(b"hello")) for name in ("Unary", "Repeat", "About")]
    return raw.hello() + b"".join(asked)


def mutated(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        if not found:
            break
        at = dice.randrange(len(found))
        match dice.randrange(4):
            case 0:
                found[at] = dice.randrange(256)
            case 1:
                del found[at : at + dice.randint(1, 20)]
            case 2:
                found[at:at] = dice.randbytes(dice.randint(1, 20))
            case _:
                del found[max(at, 40) :]
    return bytes(found)


async def test_a_mutated_conversation_hurts_nobody(kind: str) -> None:
    dice = random.Random(20261121)
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        good = conversation(raw)
        opening = len(raw.hello())
        for _ in range(20):
            said = [good[:opening] + mutated(good[opening:], dice) for _ in range(15)]
            await asyncio.gather(*(poured(here, one) for one in said))
            await still_answers(here)
        await eventually(lambda: not here.host.running)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    said=st.lists(
        st.tuples(
            st.integers(0, 11), st.integers(0, 255), st.integers(0, 7), st.binary(max_size=60)
        ),
        min_size=1,
        max_size=20,
    )
)
def test_any_frames_hurt_nobody(kind: str, said: list[tuple[int, int, int, bytes]]) -> None:
    async def check() -> None:
        async with place(kind) as here:
            here.serve_digits({"1": 100})
            raw = await here.raw()
            await poured(here, raw.hello() + b"".join(frames.frame(*one) for one in said))
            await still_answers(here)

    asyncio.run(check())


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "2 GB of a name": b"\x0a\xff\xff\xff\xff\x07abc",
    "2 GB of contents": GOOD[:-18] + b"\x3a\x80\x80\x80\x80\x08",
    "a length that never ends": b"\x0a" + b"\xff" * 30,
    "a million empty contents": GOOD + b"\x3a\x00" * 1_000_000,
    "unknown fields": GOOD + b"\xf8\x07\x01",
    "a group": b"\x0b" * 200 + GOOD,
    "names that are not UTF-8": GOOD.replace(b"digits", b"dig\xff\xfes"),
    "not a number": request(float("nan")).SerializeToString(),
    "twice": GOOD + GOOD,
}


async def status(channel: Any, body: bytes) -> grpc.StatusCode:
    try:
        await channel.unary_unary(MODEL_INFER)(body, timeout=30)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@pytest.mark.parametrize("what", BODIES)
async def test_a_strange_body_has_a_clear_status(kind: str, what: str) -> None:
    async with place(kind) as here, here.channel() as channel:
        here.serve_digits({"1": 100})
        for _ in range(2):
            code = await status(channel, BODIES[what])
            expected = "OK" if what == "not a number" else "INVALID_ARGUMENT"
            assert code is grpc.StatusCode[expected]
        await still_answers(here)


async def test_fuzzed_bodies_have_a_clear_status(kind: str) -> None:
    dice = random.Random(4)
    async with place(kind) as here, here.channel() as channel:
        here.serve_digits({"1": 100})
        bodies = [mutated(GOOD, dice) for _ in range(400)] + [GOOD[:n] for n in range(len(GOOD))]
        got = {await status(channel, body) for body in bodies}
        assert got <= {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
        await still_answers(here)
