"""A dependency that is away, or hangs, is told as down until it answers again."""

import asyncio

import pytest
from prometheus_client import REGISTRY

from libs.doors import dependencies
from libs.doors.dependencies import ask
from stack.testing import eventually


def up() -> float | None:
    return REGISTRY.get_sample_value("leptonic_dependency_up", {"dependency": "tried"})


async def test_it_is_down_while_it_hangs_and_up_once_it_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dependencies, "PATIENCE_S", 0.01)
    monkeypatch.setattr(dependencies, "POLL_S", 0.01)
    there, asked = asyncio.Event(), 0

    async def answers() -> bool:
        nonlocal asked
        asked += 1
        await there.wait()
        return True

    task = asyncio.create_task(ask("tried", answers))
    await eventually(lambda: up() == 0)
    assert asked == 1
    there.set()
    await eventually(lambda: up() == 1)
    task.cancel()
