"""Whatever is changed under load, nobody is harmed: versions are swapped, models crash, the server
ends; with either front.
"""

import asyncio
import signal
from functools import partial
from pathlib import Path

import grpc
import pytest

from stack.testing import eventually
from tests.serving import (
    CALLERS,
    FRONTS,
    SLOW,
    STEP,
    Load,
    Server,
    answer,
    request,
    serving,
    write_adding,
    write_python,
)

pytestmark = [pytest.mark.resilience, pytest.mark.parametrize("front", FRONTS)]
SWAPS = 100
SETTLED_AFTER = 20
"""Swaps until the allocator has what it will keep."""
GROWTH_MIB_MAX = 24.0
"""Each version holds 4 MiB of weights: what leaks one in ten swaps is seen."""
CRASHING = """
import ctypes
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if (x == 13).any():
                ctypes.string_at(0)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x + OFFSET)]))
        return answers
"""


async def test_a_hundred_swaps_under_load_fail_no_request_and_leave_no_memory_behind(
    front: str, tmp_path: Path
) -> None:
    write_adding(tmp_path / "models", [1, 2])
    options = ("--model-control-mode=explicit", "--load-model=*")
    async with serving(tmp_path / "models", tmp_path, *options, front=front) as server:
        await server.load("adding", 1)
        load = Load(server, "adding")
        settled_mib = 0.0
        async with load.running():
            for swap in range(SWAPS):
                version = 2 - swap % 2
                load.allowed = {"1", "2"}
                await server.load("adding", version)
                load.allowed = {str(version)}
                await load.some_more()
                if swap == SETTLED_AFTER:
                    settled_mib = server.resident_mib()
        assert load.wrong == []
        assert server.resident_mib() - settled_mib < GROWTH_MIB_MAX


async def test_a_crash_is_told_and_passes_and_after_three_the_previous_version_serves(
    front: str, tmp_path: Path
) -> None:
    sources = {n: CRASHING.replace("OFFSET", str(n * STEP)) for n in (1, 2)}
    sources[1] = sources[1].replace("== 13", "== -1")
    write_python(tmp_path / "models", "fragile", sources)
    write_adding(tmp_path / "models", [1])
    async with serving(tmp_path / "models", tmp_path, front=front) as server:
        bystander = Load(server, "adding")
        async with bystander.running():
            assert answer(await server.infer(5, model="fragile")) == [5 + 2 * STEP]
            for crash in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await server.infer(13, model="fragile")
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "SIGSEGV" in str(raised.value.details())
                version = 2 if crash < 2 else 1
                await eventually(partial(answers, server, [5 + version * STEP]))
            await bystander.some_more()
        assert bystander.wrong == []
        assert answer(await server.infer(13, model="fragile")) == [13 + STEP]
        with pytest.raises(grpc.aio.AioRpcError, match="quarantined after 3 crashes"):
            await server.infer(5, model="fragile", version="2")


async def answers(server: Server, wanted: list[float]) -> bool:
    """Not while the model is away, nor as a version that has just been started for the last time:
    that it is quarantined is known a moment after its crash."""
    try:
        return answer(await server.infer(5, model="fragile")) == wanted
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return False
        raise


async def test_what_was_accepted_is_answered_after_sigterm(front: str, tmp_path: Path) -> None:
    write_python(tmp_path / "models", "slow", {1: SLOW}, rows=1)
    async with serving(tmp_path / "models", tmp_path, front=front) as server:
        calls = [asyncio.ensure_future(server.infer(n, model="slow")) for n in range(CALLERS)]
        await eventually(lambda: nearly_all_wait(server))
        server.process.send_signal(signal.SIGTERM)
        answers = [answer(response) for response in await asyncio.gather(*calls)]
        assert answers == [[float(n)] for n in range(CALLERS)]
        assert await server.process.wait() == 0
        with pytest.raises(grpc.aio.AioRpcError):
            await server.stub.ModelInfer(request(1, model="slow"), timeout=1)


async def nearly_all_wait(server: Server) -> bool:
    """One or two run, and what came is in line."""
    return await server.waiting() >= CALLERS // 2
