"""A trainer that is the head of a Ray, and a second node that joins it, dies and comes back.

Both run here, as two addresses of this machine's loopback.
"""

import asyncio
import signal
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from libs.bus.jetstream import JetStreamBus
from libs.contracts.artifacts import TrainResult
from libs.contracts.events import AttemptFailed, AttemptSucceeded, JobProgressed, Resources
from libs.objectstore import ObjectStore
from libs.settings import Unknown
from services.trainer import cluster
from services.trainer.app import Settings, node_of
from services.trainer.domain import Node, TrainSpec, spread
from services.trainer.reaper import marked
from services.trainer.tests.conftest import spec_of, store_digits
from services.trainer.tests.desk import placed
from services.trainer.tests.process import DRAIN_S, WARM_S, Process, Trainer, opened
from stack import ports
from stack.testing import eventually

HEAD, OTHER = "127.0.0.2", "127.0.0.3"
ALONE = msgspec.to_builtins(Resources(2000, 2048))
TOGETHER = msgspec.to_builtins(Resources(3500, 3072))
LONG = {"epochs": 4, "hidden": [512, 512], "batch_size": 8, "dropout": 0.1}


TOKEN = "LEPTONIC_TRAINER_RAY_TOKEN"


class Worker(Process):
    module = "services.trainer.ray_worker"


@pytest_asyncio.fixture
async def trainer(
    bus: JetStreamBus, nats_url: str, postgres_dsn: str, s3_server: str, objects: ObjectStore
) -> AsyncIterator[Trainer]:
    async with opened(bus, nats_url, postgres_dsn, s3_server, objects) as one:
        one.environment |= offering(2000, 2048, HEAD)
        await one.start()
        await one.heartbeat("health", "Healthy")
        yield one


@pytest_asyncio.fixture
async def worker(trainer: Trainer) -> AsyncIterator[Worker]:
    """Not started yet."""
    port = trainer.environment["LEPTONIC_TRAINER_RAY_PORT"]
    settings = {
        **trainer.environment,
        **offering(1500, 1024, OTHER),
        "LEPTONIC_TRAINER_RAY_HEAD": f"{HEAD}:{port}",
    }
    one = Worker(settings)
    yield one
    await one.kill_all()


def offering(cpu_milli: int, memory_mib: int, address: str) -> dict[str, str]:
    (http_port,) = ports.free(1)
    return {
        "LEPTONIC_TRAINER_HTTP_PORT": str(http_port),
        "LEPTONIC_TRAINER_CPU_MILLI": str(cpu_milli),
        "LEPTONIC_TRAINER_MEMORY_MIB": str(memory_mib),
        "LEPTONIC_TRAINER_POOL_WORKERS": "1",
        "LEPTONIC_TRAINER_RAY_ADDRESS": address,
        "LEPTONIC_TRAINER_RAY_PORT": str(ports.find(None, (), range(cluster.PORTS))),
        TOKEN: "shared by the nodes of this test",
    }


async def refusal(worker: Worker) -> str:
    """Why it says that it could not join; then it is killed."""
    worker.process = await worker.spawned(PIPE)
    assert worker.process.stdout is not None
    async with asyncio.timeout(WARM_S):
        async for line in worker.process.stdout:
            if b"Ray did not start" in line:
                assert not await worker.ready()
                await worker.kill_all()
                return line.decode()
    raise AssertionError("it ended")


async def drains(process: Process) -> None:
    assert await process.end(signal.SIGTERM) < DRAIN_S
    assert process.process is not None
    assert process.process.returncode == 0
    await process.nothing_left()


def trains_on(process: Process) -> bool:
    """Whether a member of a gang is at work among its processes; Ray says so in their titles."""
    titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in marked(process.mark)]
    return any(title.startswith(b"ray::Worker.fit") for title in titles)


async def trained(trainer: Trainer, job: str, spec: TrainSpec, attempt: int = 1) -> TrainResult:
    await trainer.place(placed(job, spec, attempt))
    return await result_of(trainer, job)


async def result_of(trainer: Trainer, job: str) -> TrainResult:
    async def told() -> list[AttemptSucceeded]:
        return [one for one in await trainer.of(AttemptSucceeded) if one.job == job]

    (said,) = await eventually(told, WARM_S)
    return msgspec.convert(said.result, TrainResult)


@pytest.mark.resilience
async def test_a_gang_over_two_nodes_survives_either_and_gives_the_bits_of_one(
    trainer: Trainer, worker: Worker, objects: ObjectStore
) -> None:
    stranger = Worker({**worker.environment, **offering(1, 1, "127.0.0.4"), TOKEN: "another"})
    refused = asyncio.create_task(refusal(stranger))
    await worker.start()
    await trainer.heartbeat("capacity", TOGETHER)
    spec = spec_of(await store_digits(objects), workers=2, params=LONG)
    await trainer.place(placed("killed", spec))
    await eventually(lambda: trainer.of(JobProgressed), WARM_S)
    assert trains_on(trainer)
    assert trains_on(worker)
    await worker.kill_all()
    killed = await result_of(trainer, "killed")
    assert await trainer.of(AttemptFailed) == []
    await trainer.heartbeat("capacity", ALONE)

    local = await trained(trainer, "local", spec)
    await worker.start()
    await trainer.heartbeat("capacity", TOGETHER)
    together = await trained(trainer, "together", spec)
    assert killed.manifest == local.manifest == together.manifest
    assert "InvalidAuthToken" in await refused

    await trainer.kill_all()
    await eventually(worker.unready, WARM_S)
    await trainer.start()
    await trainer.heartbeat("capacity", TOGETHER)
    await drains(worker)
    await trainer.heartbeat("capacity", ALONE)
    await drains(trainer)


def test_a_gang_goes_where_the_fewest_are_for_what_is_offered() -> None:
    head = Node("a", True, Resources(2000, 2048))
    other = Node("b", False, Resources(4000, 2048))

    def names(count: int, busy: dict[str, int]) -> str:
        return "".join(node.id for node in spread(count, [head, other], busy))

    assert names(6, {}) == "babbab"
    assert names(2, {"b": 4}) == "aa"
    assert "".join(node.id for node in spread(2, [head], {"a": 9})) == "aa"


def test_nobody_opens_ray_to_others_without_a_token() -> None:
    with pytest.raises(Unknown, match=TOKEN):
        node_of(Settings(ray_address=HEAD))
    with pytest.raises(Unknown, match=TOKEN):
        node_of(Settings(ray_head=f"{HEAD}:6379"))
