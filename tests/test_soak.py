"""Much mixed load on one server: every answer right, and the memory flat."""

import asyncio
import os
from pathlib import Path

import pytest

from tests.serving import FRONTS, SLOW, Load, Server, answer, serving, write_adding, write_python

pytestmark = [pytest.mark.long, pytest.mark.parametrize("front", FRONTS)]
SOAK_ANSWERS = int(os.environ.get("SOAK_ANSWERS", "2000000"))
ANSWERS_PER_S_MIN = 100
"""Slower than this it hangs."""
WARM_UP = 0.2
"""Of the answers: until the allocator has what it will keep."""
SAMPLES = 30
GROWTH_MIB_MAX = 16.0
SLOW_CALLS = 8


async def ask_slow(server: Server) -> None:
    """A round of a model in a worker process, each answer compared."""
    asked = [float(number) for number in range(SLOW_CALLS)]
    responses = await asyncio.gather(*(server.infer(one, model="slow") for one in asked))
    assert [answer(response) for response in responses] == [[one] for one in asked]


async def test_many_answers_leave_the_memory_where_it_was(front: str, tmp_path: Path) -> None:
    write_adding(tmp_path / "models", [1])
    write_python(tmp_path / "models", "slow", {1: SLOW})
    async with serving(tmp_path / "models", tmp_path, front=front) as server:
        load = Load(server, "adding")
        memory_mib: list[float] = []
        async with load.running(), asyncio.timeout(SOAK_ANSWERS / ANSWERS_PER_S_MIN):
            for sample in range(1, SAMPLES + 1):
                while load.answered < SOAK_ANSWERS * sample // SAMPLES:
                    await ask_slow(server)
                memory_mib.append(server.resident_mib())
        warm = memory_mib[int(SAMPLES * WARM_UP) :]
        half = len(warm) // 2
        growth = max(warm[half:]) - max(warm[:half])
        print(f"{front}: {load.answered} answers, {warm[0]:.1f} MiB, growth {growth:.1f}")  # noqa: T201 - for people
        assert load.wrong == []
        assert growth < GROWTH_MIB_MAX, f"{load.answered} answers, MiB: {memory_mib}"
