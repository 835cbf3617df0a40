"""A version whose process keeps dying makes room for the one that served before it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from msgspec.structs import replace

from libs.bus.jetstream import JetStreamBus
from libs.contracts.events import DeploymentObserved
from libs.objectstore import ObjectStore, key_of
from services.inference.app import Settings
from services.inference.isolated import Isolated
from services.inference.tests import stage
from services.inference.tests.conftest import ROW, Replica, labels, started
from services.inference.tests.stage import Platform, register
from stack.testing import eventually

OFFSET = 100
"""Version 2 answers with labels this much larger."""
CRASHES = 3


@pytest_asyncio.fixture
async def apart(settings: Settings, bus: JetStreamBus) -> AsyncIterator[Replica]:
    async with started(replace(settings, isolate=True), bus) as one:
        yield one


async def kill_worker(replica: Replica, version: str) -> None:
    """As a segmentation fault would, and returns once that was noticed."""
    model = replica.agent.endpoints.find("digits").served[version].model
    assert isinstance(model, Isolated)
    fallen = model.crashes
    worker = await eventually(lambda: model.worker)
    os.kill(worker.process.pid, signal.SIGSEGV)
    await eventually(lambda: model.crashes > fallen)


async def answer_of(replica: Replica) -> int | None:
    """None while nobody answers."""
    try:
        (label,) = labels(await replica.infer(ROW))
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return None
        raise
    return label


async def test_the_version_before_serves_and_a_restart_remembers(
    settings: Settings, bus: JetStreamBus, platform: Platform, objects: ObjectStore
) -> None:
    apart = replace(settings, isolate=True)
    async with started(apart, bus) as replica:
        await until_quarantined(replica, platform, objects)
    async with started(apart, bus) as replica:
        await eventually(replica.agent.ready)
        assert await answer_of(replica) == 1
        endpoint = replica.agent.endpoints.find("digits")
        assert "2" not in endpoint.served
        rolled_out = endpoint.rolled_out
        for _ in range(2):
            await until_looked(replica)
        assert endpoint.rolled_out is rolled_out is not None, "it is rolled out again and again"


async def until_looked(replica: Replica) -> None:
    """It has compared what is desired with what it serves once more."""
    known = replica.agent.assignments
    await eventually(lambda: replica.agent.assignments is not known)


async def test_a_version_quarantined_while_its_predecessor_goes_leaves_somebody_to_answer(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    await platform.place()
    await platform.deploy(1, await register(objects, 1, 100, stage.digits()))
    await replica.until_announced(1)
    endpoint = replica.agent.endpoints.find("digits")
    first = endpoint.served["1"]
    first.quiet.clear()  # as if a stream held it
    await platform.deploy(2, await register(objects, 2, 100, stage.digits(OFFSET)))
    await eventually(lambda: endpoint.route == {"2": 100} and "1" not in endpoint.served)
    for _ in range(CRASHES):
        replica.agent.endpoints.crashed(endpoint, endpoint.served["2"], "segmentation fault")
    first.quiet.set()
    assert await eventually(lambda: answer_of(replica)) == 1
    assert endpoint.announced == 1


async def until_quarantined(apart: Replica, platform: Platform, objects: ObjectStore) -> None:
    await platform.place()
    await platform.deploy(1, await register(objects, 1, 100, stage.digits()))
    await apart.until_announced(1)
    await platform.deploy(2, await register(objects, 2, 100, stage.digits(OFFSET)))
    await apart.until_announced(2)
    for crash in range(CRASHES):
        expected = 1 if crash == CRASHES - 1 else 1 + OFFSET
        await kill_worker(apart, "2")
        assert await eventually(lambda: answer_of(apart)) == expected
    with pytest.raises(grpc.aio.AioRpcError, match=r"quarantined after 3 crashes: .*SIGSEGV"):
        await apart.infer(ROW, version="2")
    index = apart.agent.endpoints.index(ready_only=False)
    assert [(version, state) for _, version, state, _ in index] == [
        ("1", "READY"),
        ("2", "UNAVAILABLE"),
    ]


async def test_a_canary_that_is_quarantined_is_reported(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    """It gets no requests any more: the registry would wait for them for ever."""
    one = await register(objects, 1, 80, stage.digits())
    await platform.place()
    await platform.deploy(2, one, await register(objects, 2, 20, stage.digits(OFFSET)))
    await replica.until_announced(2)
    endpoint = replica.agent.endpoints.find("digits")
    for _ in range(CRASHES):
        replica.agent.endpoints.crashed(endpoint, endpoint.served["2"], "segmentation fault")

    async def reported() -> bool:
        events = await platform.seen(DeploymentObserved)
        return bool(events) and [o.quarantined is True for o in events[-1].observations] == [
            False,
            True,
        ]

    await eventually(reported)


class Away:
    """Postgres, when it is not there."""

    def transaction(self) -> Any:
        raise OSError("Postgres is away")


async def test_the_version_before_serves_without_postgres_too(
    settings: Settings, bus: JetStreamBus, platform: Platform, objects: ObjectStore
) -> None:
    """And after a restart: what served before is known from its last announcement."""
    async with started(settings, bus) as replica:
        await platform.place()
        for version, offset in ((1, 0), (2, OFFSET)):
            target = await register(objects, version, 100, stage.digits(offset))
            await platform.deploy(version, target)
            await replica.until_announced(version)
    async with started(settings, bus) as replica:
        await replica.until_announced(2)
        endpoint = replica.agent.endpoints.find("digits")
        there, replica.agent.db = replica.agent.db, Away()  # type: ignore[assignment]
        for _ in range(CRASHES):
            replica.agent.endpoints.crashed(endpoint, endpoint.served["2"], "segmentation fault")
        assert await eventually(lambda: answer_of(replica)) == 1
        replica.agent.db = there
        await eventually(lambda: "2" not in endpoint.served, timeout_s=30)
        assert await answer_of(replica) == 1


async def test_deployed_anew_it_is_tried_again(
    apart: Replica, platform: Platform, objects: ObjectStore
) -> None:
    await platform.place()
    one = await register(objects, 1, 100, stage.digits())
    await platform.deploy(1, one)
    await apart.until_announced(1)
    for _ in range(CRASHES):
        assert await eventually(lambda: answer_of(apart)) == 1
        await kill_worker(apart, "1")
    with pytest.raises(grpc.aio.AioRpcError, match="quarantined"):
        async with asyncio.timeout(10):
            await apart.infer(ROW)
    await platform.deploy(2, one)
    await apart.until_announced(2)
    assert await answer_of(apart) == 1


async def test_what_is_cached_is_served_again_without_the_object_store(
    settings: Settings,
    bus: JetStreamBus,
    platform: Platform,
    objects: ObjectStore,
    tmp_path: Path,
) -> None:
    kept = replace(settings, cache_dir=str(tmp_path))
    target = await register(objects, 1, 100, stage.digits())
    async with started(kept, bus) as replica:
        await platform.place()
        await platform.deploy(1, target)
        await replica.until_announced(1)
    await objects.delete(key_of(target.digest))
    async with started(kept, bus) as replica:
        await eventually(replica.agent.ready)
        assert await answer_of(replica) == 1
