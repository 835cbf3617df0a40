"""Promise: whatever is replaced for an upgrade, nobody who asks meanwhile is refused."""

from collections import Counter
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from libs.settings import SERVICES
from tests.rolling import DATASET, MODEL, ROWS, Load, landed, pipeline, roll, table
from tests.running import (
    STACKS,
    Stack,
    digits,
    digits_pipeline,
    publish,
    running_containers,
    running_processes,
    stranger,
    until,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module")]

LAYERS = "compose.yaml:compose.replicas.yaml"
REQUESTS_FEW = 5_000
REQUESTS = 50_000
QUICK = tuple(name for name in SERVICES if name != "trainer")
"""Replaced again and again; the trainer once, since its successor waits for Ray to be warm."""
LANDED_S = 30.0


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=STACKS)
async def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    """With a model that is served; containers behind a balancer."""
    data_dir = tmp_path_factory.mktemp("rolling") / "data"
    is_embedded = request.param == "embedded"
    starting = running_processes(data_dir) if is_embedded else running_containers(data_dir, LAYERS)
    async with starting as running:
        await running.apply(digits_pipeline(MODEL, 600))
        await running.apply(pipeline())
        async with stranger(running) as bus:
            await publish(bus, MODEL, digits(0, 600))
        await running.event("deployment.ready", lambda data: data["model"] == MODEL)
        yield running


async def roll_under_load(stack: Stack, requests: int) -> Load:
    """Every service is replaced once, and again until so many were sent."""
    before = stack.state["processes"]
    async with stranger(stack) as bus:
        load = Load(stack, bus)
        async with load.running():
            rolled = await roll(stack)
            while load.sent < requests:
                print(f"{load.sent} requests, {rolled}")  # noqa: T201 - what a long test does
                rolled = await roll(stack, *QUICK)
    print(table(load))  # noqa: T201 - its result
    after = stack.state["processes"]
    assert {name for name in after if after[name]["pid"] != before[name]["pid"]} == set(SERVICES)
    assert not any(one["restarts"] for one in after.values())
    return load


async def assert_nothing_was_lost(stack: Stack, load: Load) -> None:
    assert load.failed == []
    right = sum(a == b["label"] for a, b in zip(load.expected, digits(1000, ROWS), strict=True))
    assert right > ROWS * 0.8

    async def all_landed() -> bool:
        dataset = await stack.try_get("ingest", f"/v1/projects/default/datasets/{DATASET}")
        return int(dataset.get("rows", 0)) >= len(load.acked)

    await until(all_landed, "acked records have not landed", LANDED_S)
    assert await landed(stack) == Counter(dict.fromkeys(load.acked, 1))
    jobs = (await stack.get("scheduler", "/v1/projects/rolled/jobs"))["jobs"]
    assert Counter(job["job"] for job in jobs) == Counter(dict.fromkeys(load.jobs, 1))


@pytest.mark.resilience
async def test_nobody_notices_that_every_service_is_replaced(stack: Stack) -> None:
    await assert_nothing_was_lost(stack, await roll_under_load(stack, REQUESTS_FEW))


@pytest.mark.long
async def test_nobody_of_many_notices(stack: Stack) -> None:
    """`make test-rolling`."""
    await assert_nothing_was_lost(stack, await roll_under_load(stack, REQUESTS))
