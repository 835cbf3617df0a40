"""Minutes of mixed load on one server: every answer right, and the memory flat."""

import asyncio
import os
from pathlib import Path
from time import monotonic

import pytest

from stack.testing import eventually
from tests.serving import SLOW, Load, serving, write_adding, write_python

pytestmark = pytest.mark.long
SOAK_S = float(os.environ.get("SECONDS_OF_SOAK", "600"))
WARM_UP = 0.2
"""Of the time: until the allocator has what it will keep."""
SAMPLES = 30
GROWTH_MIB_MAX = 16.0


async def test_ten_minutes_of_load_leave_the_memory_where_it_was(
    front: str, tmp_path: Path
) -> None:
    write_adding(tmp_path / "models", [1])
    write_python(tmp_path / "models", "slow", {1: SLOW})
    async with serving(tmp_path / "models", tmp_path, front=front) as server:
        load = Load(server, "adding")
        memory_mib: list[float] = []
        async with load.running():
            began = monotonic()
            for sample in range(1, SAMPLES + 1):
                due = began + SOAK_S * sample / SAMPLES
                await eventually(lambda due=due: monotonic() >= due, timeout_s=SOAK_S)  # type: ignore[misc]
                await asyncio.gather(*(server.infer(n, model="slow") for n in range(8)))
                memory_mib.append(server.resident_mib())
        warm = memory_mib[int(SAMPLES * WARM_UP) :]
        half = len(warm) // 2
        growth = max(warm[half:]) - max(warm[:half])
        assert load.wrong == []
        assert growth < GROWTH_MIB_MAX, f"{load.answered} answers, MiB: {memory_mib}"
