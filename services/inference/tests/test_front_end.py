"""Who may come in at a front, and how it ends: no accepted request is lost."""

import asyncio
import socket
from typing import Any

import grpc
import numpy as np
import pytest

from libs.contracts.protos import open_inference_pb2 as oip
from services.inference.rpcs import MODEL_INFER
from services.inference.tests.fronts import (
    ECHO,
    kinds,
    place,
    prefixed,
    refusal,
    request,
    values,
)
from stack import ports
from stack.testing import eventually

pytestmark = pytest.mark.parametrize("kind", kinds())
Code = grpc.StatusCode


@pytest.mark.parametrize("authorization", ["", "Bearer wrong", "secret", "Bearer secretandmore"])
async def test_without_a_token_nothing_is_told_but_health(kind: str, authorization: str) -> None:
    async with place(kind, tokens=["other", "secret"]) as here, here.client() as client:
        here.serve_digits({"1": 100})
        metadata = (("authorization", authorization),) if authorization else ()
        wanted = (Code.UNAUTHENTICATED, "send the metadata 'authorization: Bearer <token>'")
        assert await refusal(client.ModelInfer(request(), metadata=metadata)) == wanted
        assert (
            await refusal(client.ServerLive(oip.ServerLiveRequest(), metadata=metadata)) == wanted
        )
        async with here.channel() as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
            assert (await refusal(check))[0] is Code.UNIMPLEMENTED  # nobody hosts it here


async def test_with_a_token_everything_is_answered(kind: str) -> None:
    async with place(kind, tokens=["other", "secret"]) as here, here.client() as client:
        here.serve_digits({"1": 100})
        for token in ("secret", "other"):
            metadata = (("authorization", f"Bearer {token}"),)
            assert values(await client.ModelInfer(request(), metadata=metadata)) == [1.0] * 4


async def test_a_taken_port_is_an_error(kind: str) -> None:
    async with place(kind) as here:
        with pytest.raises(OSError, match="in use"):
            async with place(kind, port=here.front.port):
                pass


async def test_clients_move_to_another_front_and_lose_nothing(kind: str) -> None:
    [port] = ports.free(1)
    async with place(kind, port=port) as old:
        old.serve_digits({"1": 100})
        async with place(kind, port=port) as new, old.client() as one, old.client() as two:
            new.serve_digits({"2": 100})
            answered: list[str] = []
            over = asyncio.Event()

            async def keep_asking(client: Any) -> None:
                while not over.is_set():
                    answer = await client.ModelInfer(request())
                    assert values(answer) == [float(answer.model_version)] * 4
                    answered.append(answer.model_version)

            tasks = [asyncio.create_task(keep_asking(client)) for client in (one, two) * 4]
            await eventually(lambda: len(answered) > 100)
            old.front.say_goodbye()
            await old.front.close(10)
            at = len(answered)
            await eventually(lambda: len(answered) > at + 100)
            # Each may have had one answer of the old front's on its way when that closed.
            assert answered[at:].count("1") <= len(tasks)
            over.set()
            await asyncio.gather(*tasks)


async def test_what_was_accepted_is_answered_before_the_end(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        here.go.clear()
        batcher = here.serve_digits({"1": 100})["1"]
        calls = [client.ModelInfer(request(n)) for n in range(10)]
        await eventually(lambda: batcher.counts().waiting == 10)
        closing = asyncio.create_task(here.front.close(20))
        await asyncio.sleep(0)
        here.go.set()
        assert [values(await call) for call in calls] == [[float(n)] * 4 for n in range(10)]
        await closing
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", here.front.port)


async def test_who_is_at_the_door_when_it_closes_is_answered(kind: str) -> None:
    async with place(kind) as here:
        here.serve_digits({"1": 100})
        raw = await here.raw()
        said = raw.hello() + raw.ask(MODEL_INFER, prefixed(request(3).SerializeToString()))
        with socket.create_connection(("127.0.0.1", here.front.port)) as door:
            door.sendall(said)  # the loop has had no turn since: nobody has accepted this
            await here.front.close(20)
            heard = b""
            while part := await asyncio.to_thread(door.recv, 1 << 16):
                heard += part
        assert np.full(4, 3, np.float32).tobytes() in heard


async def test_an_end_does_not_wait_for_ever(kind: str) -> None:
    async with place(kind) as here, here.channel() as channel:
        call = channel.unary_unary(ECHO + "Wait")(b"")
        await eventually(lambda: here.echo.seen)
        await here.front.close(0.2)
        assert (await refusal(call))[0] is Code.UNAVAILABLE
