"""A runner that has nothing to run looks after the sockets, and nobody waits for it when it runs:
neither who comes over a socket nor who asks from Python."""

import asyncio
import threading

import numpy as np
import pytest

from libs.contracts.pipeline import Batching
from services.inference.front import Lane, Note
from services.inference.tensors import Arrays
from services.inference.tests.fronts import (
    DIGITS,
    ECHO,
    SILENT,
    Place,
    digits,
    kinds,
    place,
    request,
    times,
    values,
)

pytestmark = pytest.mark.parametrize("kind", kinds())
QUICK_RUNS = 20
"""After so many it is known that the model is quick."""


class Told:
    """A waiter that settles a future of the loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Arrays] = self.loop.create_future()

    def answered(
        self, outputs: Arrays, start: int, stop: int, rows: int, note: Note | None
    ) -> None:
        self.loop.call_soon_threadsafe(self.answer.set_result, outputs)

    def failed(self, code: int, text: str) -> None:
        self.loop.call_soon_threadsafe(self.answer.set_exception, RuntimeError(text))


async def warm(here: Place, model: str, factor: int) -> None:
    async with here.client() as client:
        for number in range(QUICK_RUNS):
            answer = await client.ModelInfer(request(number, model_name=model), timeout=20)
            assert values(answer) == [float(factor * number)] * 4


async def test_a_model_that_turns_slow_keeps_no_other_call_waiting(kind: str) -> None:
    go = threading.Event()
    go.set()

    def run(inputs: Arrays) -> Arrays:
        assert go.wait(30)
        return {"y": inputs["x"]}

    async with place(kind) as here, here.client() as client, here.channel() as channel:
        here.front.route("digits", {"1": 100}, {"1": here.serve(digits("1"), run)})
        await warm(here, "digits", 1)
        go.clear()
        late = asyncio.ensure_future(client.ModelInfer(request(7.0), timeout=30))
        try:
            for _ in range(3):
                assert await channel.unary_unary(f"{ECHO}Unary")(b"hello", timeout=20) == b"hello"
        finally:
            go.set()
        assert values(await late) == [7.0] * 4


async def test_models_that_are_asked_in_turn_answer_in_turn(kind: str) -> None:
    async with place(kind) as here:
        for factor, model in enumerate(("two", "three"), 2):
            lane = Lane(model, "1", DIGITS, batched=True, opaque=False)
            here.front.route(model, {"1": 100}, {"1": here.serve(lane, times(factor))})
        for _ in range(3):
            await warm(here, "two", 2)
            await warm(here, "three", 3)
        await asyncio.gather(warm(here, "two", 2), warm(here, "three", 3))


async def test_who_asks_from_python_is_heard_by_a_runner_at_the_sockets(kind: str) -> None:
    async with place(kind) as here:
        batcher = here.serve_digits({"3": 100})["3"]
        await warm(here, "digits", 3)
        for _ in range(QUICK_RUNS):
            told = Told()
            assert batcher.join({"x": np.ones((1, 4), np.float32)}, 1, told) > 0
            async with asyncio.timeout(20):
                assert (await told.answer)["y"].tolist() == [[3.0] * 4]


async def test_limits_that_ask_for_a_delay_hold_though_the_model_is_quick(kind: str) -> None:
    async with place(kind) as here, here.client() as client:
        batcher = here.serve_digits({"3": 100})["3"]
        await warm(here, "digits", 3)
        limits = Batching(max_batch_size=4, max_queue_delay_microseconds=30_000_000)
        batcher.configure(limits, SILENT)
        here.sizes.clear()
        answers = await asyncio.gather(
            *(client.ModelInfer(request(n), timeout=20) for n in range(8))
        )
        assert [values(one)[0] for one in answers] == [3.0 * n for n in range(8)]
        assert here.sizes == [4, 4]
