"""Several processes of one name are one node: any of them may be asked anything."""

import asyncio
import contextlib

import msgspec

from libs.bus.jetstream import JetStreamBus
from libs.contracts.events import DeploymentObserved
from libs.objectstore import ObjectStore
from services.inference.app import Settings
from services.inference.presence import WAITING
from services.inference.tests import stage
from services.inference.tests.conftest import ROW, Replica, labels, started
from services.inference.tests.stage import Platform, register
from stack import ports
from stack.testing import eventually

OFFSET = 100
ASLEEP = {"min_replicas": 0, "max_replicas": 1}
EACH = 15
PATIENCE_S = 60.0
SAID_S = 2.0
SAID_MAX = 30
"""By two processes in that time: twice a second what they have to do, and once that they wait."""


def beside(settings: Settings) -> Settings:
    """Another pod: the same node, with an address of its own."""
    http, grpc, metrics, api = ports.free(4)
    return msgspec.structs.replace(
        settings, http_port=http, grpc_port=grpc, metrics_port=metrics, api_port=api
    )


async def test_pods_of_one_node_serve_the_same_and_count_together(
    replica: Replica,
    settings: Settings,
    bus: JetStreamBus,
    platform: Platform,
    objects: ObjectStore,
) -> None:
    await platform.place()
    one = await register(objects, 1, 100, stage.digits())
    await platform.deploy(1, one)
    async with started(beside(settings), bus) as second:
        await replica.until_announced(1)
        await second.until_announced(1)
        two = await register(objects, 2, 100, stage.digits(OFFSET))
        await platform.deploy(2, two)
        async with started(beside(settings), bus) as third:
            await eventually(third.agent.ready)
            (label,) = labels(await third.infer(ROW))
            assert label in (1, 1 + OFFSET), "ready, and serves nothing"
            for pod in (replica, second, third):
                await pod.until_announced(2)
                for _ in range(EACH):
                    assert labels(await pod.infer(ROW)) == [1 + OFFSET]
            await eventually(lambda: counted(platform, 3 * EACH + (label > 1)))


async def counted(platform: Platform, requests: int) -> bool:
    told = [one for one in await platform.seen(DeploymentObserved) if one.generation == 2]
    return bool(told) and max(one.observations[0].requests for one in told) == requests


async def test_who_waits_at_any_pod_is_told_by_the_one_that_speaks(
    replica: Replica, settings: Settings, bus: JetStreamBus, platform: Platform
) -> None:
    """Only one process of a node beats; the request may have come to another."""
    await eventually(lambda: replica.agent.speaks)
    deployed = msgspec.structs.replace(stage.deployment(1), autoscaling=ASLEEP)
    async with started(beside(settings), bus) as second:
        await platform.publish(deployed)
        await eventually(lambda: second.agent.presence.asleep())
        asking = asyncio.create_task(second.infer(ROW))
        async with asyncio.timeout(PATIENCE_S):
            assert await next_loads(bus, some=True) == [told(1000)]
            asking.cancel()
            await next_loads(bus, some=False)


async def test_what_a_process_says_that_does_not_speak_is_not_said_again(
    replica: Replica, settings: Settings, bus: JetStreamBus, platform: Platform
) -> None:
    """It hears itself, and so do the others that do not speak."""
    await eventually(lambda: replica.agent.speaks)
    await platform.publish(msgspec.structs.replace(stage.deployment(1), autoscaling=ASLEEP))
    async with started(beside(settings), bus) as second, started(beside(settings), bus) as third:
        for pod in (second, third):
            await eventually(pod.agent.presence.asleep)
        asking = [asyncio.create_task(pod.infer(ROW)) for pod in (second, third)]
        async with asyncio.timeout(PATIENCE_S):
            while await next_loads(bus, some=True) != [told(2000)]:
                pass
        said = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SAID_S):
                async for _ in bus.listen(f"replicas.inference{WAITING}"):
                    said += 1
        assert said <= SAID_MAX
        for one in asking:
            one.cancel()


async def next_loads(bus: JetStreamBus, some: bool) -> list[object]:
    """Of the next heartbeat that has some, or none."""
    async for _, payload in bus.listen("heartbeats.inference"):
        loads: list[object] = msgspec.json.decode(payload)["loads"]
        if bool(loads) == some:
            return loads
    raise AssertionError("the bus has ended")


def told(milli: int) -> dict[str, object]:
    return {
        "project": "default",
        "model": "digits",
        "concurrency_milli": milli,
        "p95_ms": 0,
        "requests": 0,
        "ready": False,
    }
