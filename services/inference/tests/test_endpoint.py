"""What a version is judged by is counted, all of it and nothing else, however it comes and goes."""

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from libs.contracts.events import Target
from libs.contracts.pipeline import Batching
from libs.doors import Internal, Unavailable
from services.inference.calls import Call
from services.inference.endpoint import Endpoint
from services.inference.models import Crashed
from services.inference.quarantine import CRASHES_MAX
from services.inference.tensors import Arrays, Given
from services.inference.tests import stage
from services.inference.tests.desk import BROKEN, Desk, double, doubled, opened
from services.inference.tests.fronts import kinds
from stack.testing import eventually

KILLER = -2
CONFIG = """
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 2 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 2 ] }
"""


@pytest.fixture(params=kinds())
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    async with opened(kind=request.param) as made:
        model = double()
        model.function = fragile
        await made.serve("double", model)
        made.endpoints.find("double").deployment = stage.deployment(1, Target(1, 100, "", ""))
        yield made


def fragile(inputs: Arrays) -> Arrays:
    if (inputs["x"] == KILLER).any():
        raise Crashed("segmentation fault")
    return doubled(inputs)


async def ask(desk: Desk, x: float = 1) -> None:
    given = [Given("x", "FP32", [1, 2], values=[x, x])]
    await desk.endpoints.infer(Call("double", "", "", given, [], 0, ""))


def counted(endpoint: Endpoint) -> dict[tuple[int, int], list[int]]:
    endpoint.tally()
    return endpoint.counts


async def test_only_what_the_version_did_is_its_fault(desk: Desk) -> None:
    endpoint = desk.endpoints.find("double")
    await ask(desk)
    for x, refusal in ((BROKEN, Internal), (KILLER, Unavailable)):
        with pytest.raises(refusal, match="model 'double' version 1"):
            await ask(desk, x)
    late = Batching(max_queue_delay_microseconds=60_000_000, default_timeout_microseconds=1000)
    endpoint.served["1"].configure(late, 0)
    with pytest.raises(Unavailable, match="Request timeout expired"):
        await ask(desk)
    assert counted(endpoint) == {(1, 1): [3, 2]}


@pytest.mark.parametrize("again", [False, True], ids=["unloaded", "loaded anew"])
async def test_who_is_answered_while_a_version_goes_is_counted(desk: Desk, again: bool) -> None:
    endpoint = desk.endpoints.find("double")
    model, running, go_on = double(), threading.Event(), threading.Event()

    def slowly(inputs: Arrays) -> Arrays:
        running.set()
        assert go_on.wait(60)
        return doubled(inputs)

    model.function = slowly
    await desk.serve("double", model)
    going = endpoint.served["1"]
    asked = asyncio.create_task(ask(desk))
    assert await asyncio.to_thread(running.wait, 60)
    leave = desk.serve("double", double()) if again else endpoint.unload("1")
    leaving = asyncio.create_task(leave)
    await eventually(lambda: endpoint.served.get("1") is not going)
    go_on.set()
    await asyncio.gather(asked, leaving)
    assert counted(endpoint) == {(1, 1): [1, 0]}
    assert going not in endpoint.seen


async def test_a_version_may_be_unloaded_twice_at_once(desk: Desk) -> None:
    endpoint = desk.endpoints.find("double")
    await asyncio.gather(endpoint.unload("1"), endpoint.unload("1"))
    assert not endpoint.served


async def test_a_version_that_is_loaded_anew_has_not_crashed_yet(desk: Desk) -> None:
    endpoint = desk.endpoints.find("double")
    for loaded in range(2):
        for _ in range(CRASHES_MAX - 1):
            desk.endpoints.crashed(endpoint, endpoint.served["1"], "segmentation fault")
        assert not endpoint.quarantined, loaded
        await desk.serve("double", double())


async def test_a_quarantine_unloads_what_crashed_and_not_what_was_loaded_since(desk: Desk) -> None:
    endpoint = desk.endpoints.find("double")

    async def deploy_anew(endpoint: Endpoint, version: str) -> None:
        await desk.serve("double", double(), version=version)

    desk.endpoints.on_quarantine = deploy_anew
    for _ in range(CRASHES_MAX):
        desk.endpoints.crashed(endpoint, endpoint.served["1"], "segmentation fault")
    await asyncio.gather(*desk.endpoints.replacing)
    await ask(desk)


@pytest.mark.parametrize(("parallel", "runners"), [(None, 3), (2, 2), (1, 1), (8, 3)])
async def test_a_batch_is_taken_when_it_can_run(
    desk: Desk, parallel: int | None, runners: int
) -> None:
    model = double()
    model.parallel = parallel
    await desk.serve("double", model, "instance_group { count: 3 } " + CONFIG)
    assert len(desk.endpoints.served("double", "").threads) == runners
