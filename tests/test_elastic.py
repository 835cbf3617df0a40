"""A deployment goes to zero and comes back for the first request, and what is idle is lent: the
scheduler and replicas in this process, over a real bus, a real Postgres and a real object store.
The trainer is a process of its own, with its Ray.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable

import grpc
import msgspec
import pytest
import pytest_asyncio

from libs import database
from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.contracts.autoscaling import NODE_LABEL, Autoscaling
from libs.contracts.envelope import decode
from libs.contracts.events import (
    AttemptPlaced,
    AttemptStopped,
    JobProgressed,
    JobRequested,
    Resources,
    Target,
)
from libs.doors.serve import background
from libs.objectstore import ObjectStore
from services.inference import agent
from services.inference.app import Settings
from services.inference.tests import stage
from services.inference.tests.conftest import ROW, Replica, labels, request, started
from services.inference.tests.stage import Platform, register
from services.scheduler import autoscale
from services.scheduler.domain import Scheduler
from services.scheduler.executor import BusExecutor
from services.scheduler.handlers import Context
from services.scheduler.jobs import WAITING
from services.scheduler.leader import lead
from services.scheduler.nodes import Liveness
from services.scheduler.stimuli import Heartbeat, Load, Running
from services.scheduler.store import MIGRATIONS, Store
from services.scheduler.writer import Writer
from services.trainer.tests import process
from services.trainer.tests.conftest import spec_of, store_digits
from services.trainer.tests.process import WARM_S, Trainer
from stack import ports
from stack.testing import ACCESS_KEY, PASSWORD, eventually

KEY = ("default", "digits")
SLEEPY = Autoscaling(min_replicas=0, max_replicas=2, idle_s=2, up_s=1, down_s=2)
LINGER_S = 0.5
SPARE_S = 2.0
PATIENCE_S = 60.0
BEAT_S = 0.2
At = Callable[[str], Settings]


@pytest.fixture
def at(nats_url: str, postgres_dsn: str, s3_server: str, objects: ObjectStore) -> At:
    """A replica's settings, by its node."""

    def settings(node: str) -> Settings:
        http_port, grpc_port, metrics_port, api_port, nobody = ports.free(5)
        return Settings(
            nats_url=nats_url,
            postgres_dsn=postgres_dsn,
            s3_endpoint=s3_server,
            s3_access_key=ACCESS_KEY,
            s3_secret_key=PASSWORD,
            s3_bucket=objects.bucket,
            registry_grpc=f"127.0.0.1:{nobody}",
            http_port=http_port,
            grpc_port=grpc_port,
            metrics_port=metrics_port,
            api_port=api_port,
            node=node,
        )

    return settings


@pytest.fixture
def platform(bus: JetStreamBus) -> Platform:
    return Platform(bus)


@pytest_asyncio.fixture
async def writer(
    postgres_dsn: str, bus: JetStreamBus, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Writer]:
    """Of the scheduler, which leads."""
    monkeypatch.setattr(agent, "LINGER_S", LINGER_S)
    async with database.connect(postgres_dsn, "scheduler", MIGRATIONS) as db:
        writer = Writer(Store(db), BusExecutor())
        async with background(db.relay(bus), lead(Context(writer, Liveness([], 0.0)), bus)):
            yield writer


async def deploy(platform: Platform, wanted: Autoscaling, *targets: Target) -> None:
    deployed = stage.deployment(1, *targets)
    fields = msgspec.structs.asdict(wanted)
    await platform.publish(msgspec.structs.replace(deployed, autoscaling=fields))


async def replicas(writer: Writer) -> int:
    return await writer.read(lambda one: len(one.deployments[KEY].jobs))


async def until_asleep(replica: Replica, writer: Writer) -> None:
    async def asleep() -> bool:
        return KEY not in replica.agent.endpoints.by_key and await replicas(writer) == 0

    await eventually(asleep, PATIENCE_S)


async def test_to_zero_when_nobody_asks_and_back_for_the_first_request(
    writer: Writer, at: At, bus: JetStreamBus, platform: Platform, objects: ObjectStore
) -> None:
    async with started(at("one"), bus) as replica:
        await deploy(platform, SLEEPY, await register(objects, 1, 100, stage.digits()))
        await replica.until_announced(1)
        assert labels(await replica.infer(ROW)) == [1]
        await until_asleep(replica, writer)
        answers = await asyncio.gather(*(replica.infer(ROW, ROW) for _ in range(20)))
        assert all(labels(answer) == [1, 1] for answer in answers)
        await until_asleep(replica, writer)
        asked = {"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": ROW}
        body = json.dumps({"inputs": [asked]}).encode()
        answer = await bus.request("predict.default.digits", body, {}, PATIENCE_S)
        assert answer.headers["status"] == "200"
    places = [one.job for one in await seen(bus) if isinstance(one, AttemptPlaced)]
    assert places == ["serve-digits", "serve-digits.2", "serve-digits.3"]


async def test_a_request_that_comes_in_vain_is_told_so_in_its_time(
    writer: Writer, at: At, bus: JetStreamBus, platform: Platform, objects: ObjectStore
) -> None:
    async with started(at("one"), bus) as replica:
        target = await register(objects, 1, 100, stage.digits())
        await deploy(platform, SLEEPY, target)
        await replica.until_announced(1)
        await until_asleep(replica, writer)
        await stage.corrupt(objects, target)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await replica.oip.ModelInfer(request(ROW), timeout=1.5)
        assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_either_replica_answers_for_the_one_that_serves(
    writer: Writer, at: At, bus: JetStreamBus, platform: Platform, objects: ObjectStore
) -> None:
    async with started(at("one"), bus) as one, started(at("two"), bus) as two:
        await deploy(platform, SLEEPY, await register(objects, 1, 100, stage.digits()))

        def serving() -> list[Replica]:
            return [each for each in (one, two) if each.agent.endpoints.is_routed(KEY)]

        await eventually(serving, PATIENCE_S)
        for each in (one, two):
            assert labels(await each.oip.ModelInfer(request(ROW), timeout=PATIENCE_S)) == [1]
        assert len(serving()) == 1, "one replica is enough for two requests"


class Machine:
    """A node that trains and serves, without anything to run: it says what it is told to."""

    def __init__(self, bus: JetStreamBus) -> None:
        self.bus = bus
        self.running: dict[str, Running] = {}
        self.concurrency_milli = 0
        self.over = asyncio.Event()
        """Never: it beats until it is cancelled."""

    async def beat(self) -> None:
        while True:
            serves = any(job.startswith("serve-") for job in self.running)
            waits = not serves and self.concurrency_milli > 0
            load = Load(*KEY, self.concurrency_milli, ready=serves)
            said = Heartbeat(
                node="machine",
                incarnation="1",
                kinds=["serve", "train"],
                capacity=Resources(1000, 4096),
                running=sorted(self.running.values()),
                labels={NODE_LABEL: "machine"},
                loads=[load] if serves or waits else [],
            )
            await self.bus.broadcast("heartbeats.machine", msgspec.json.encode(said))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self.over.wait()
            await self.look()

    async def look(self) -> None:
        """Runs what it was told to, as the events have it."""
        self.running.clear()
        for event in await seen(self.bus):
            if isinstance(event, AttemptPlaced):
                one = Running(event.project, event.job, event.attempt, event.token)
                self.running[event.job] = one
            elif (known := self.running.get(event.job)) and known.token <= event.token:
                del self.running[event.job]


async def seen(bus: JetStreamBus) -> list[AttemptPlaced | AttemptStopped]:
    events = [
        decode(one.payload)[1] for one in await bus.read(EVENTS, "events.*.attempt.*", 0, 1000)
    ]
    return [event for event in events if isinstance(event, AttemptPlaced | AttemptStopped)]


async def test_an_idle_replica_s_room_is_lent_to_training_and_given_back(
    writer: Writer, bus: JetStreamBus, platform: Platform
) -> None:
    machine = Machine(bus)
    async with background(machine.beat()):
        wanted = Autoscaling(min_replicas=0, max_replicas=1, idle_s=3600)
        machine.concurrency_milli = 1000
        await deploy(platform, wanted)
        await eventually(lambda: set(machine.running) == {"serve-digits"}, PATIENCE_S)
        training = JobRequested(
            project="default", job="training", kind="train", resources=Resources(900, 512)
        )
        await platform.publish(training)
        await eventually(lambda: waits(writer, "training"), PATIENCE_S)
        machine.concurrency_milli = 0
        await eventually(lambda: set(machine.running) == {"training"}, PATIENCE_S)
        machine.concurrency_milli = 1000
        await eventually(lambda: set(machine.running) == {"serve-digits.2"}, PATIENCE_S)
        assert await waits(writer, "training")


@pytest_asyncio.fixture
async def trainer(
    bus: JetStreamBus, nats_url: str, postgres_dsn: str, s3_server: str, objects: ObjectStore
) -> AsyncIterator[Trainer]:
    """A process with its own Ray, on a machine where others are too."""
    async with process.opened(bus, nats_url, postgres_dsn, s3_server, objects) as one:
        one.environment |= {
            "LEPTONIC_MACHINE": "box",
            "LEPTONIC_TRAINER_CPU_MILLI": "1000",
            "LEPTONIC_TRAINER_POOL_WORKERS": "1",
        }
        await one.start()
        yield one


@pytest.mark.slow  # and so is the file
@pytest.mark.resilience
async def test_a_machine_trains_while_nobody_asks_it_and_answers_who_does(
    writer: Writer,
    at: At,
    bus: JetStreamBus,
    platform: Platform,
    objects: ObjectStore,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trainer, its Ray and the replica are real; both are the node `box`."""
    monkeypatch.setattr(autoscale, "SPARE_S", SPARE_S)
    settings = msgspec.structs.replace(at("inference"), machine="box", cpu_milli=1000)
    async with started(settings, bus) as replica:
        await eventually(lambda: runs(writer, "serve", "train"), WARM_S)
        wanted = Autoscaling(min_replicas=0, max_replicas=1, idle_s=3600)
        await deploy(platform, wanted, await register(objects, 1, 100, stage.digits()))
        await replica.until_announced(1)
        assert labels(await replica.infer(ROW)) == [1]
        await platform.publish(await training(objects))
        await until_asleep(replica, writer)
        await eventually(lambda: trained(trainer, 1), WARM_S)
        assert labels(await replica.oip.ModelInfer(request(ROW), timeout=PATIENCE_S)) == [1]
        await eventually(lambda: trained(trainer, 2), WARM_S)
        await trainer.kill_all()
        await eventually(lambda: runs(writer, "serve"), PATIENCE_S)
        assert await waits(writer, "training")
    events = [(one.verb, one.job) for one in await seen(bus)]
    there, back = "serve-digits", "serve-digits.2"
    lent = [("placed", there), ("stopped", there), ("placed", "training")]
    given_back = [("stopped", "training"), ("placed", back), ("stopped", back)]
    assert events[:7] == [*lent, *given_back, ("placed", "training")]


async def runs(writer: Writer, *kinds: str) -> bool:
    """Whether that is what the machine does, for those who live there."""
    nodes = await writer.read(lambda one: {node.node: node.kinds for node in one.nodes.values()})
    return nodes == {"box": list(kinds)}


async def training(objects: ObjectStore) -> JobRequested:
    """More than there is room for beside a replica."""
    params = {"epochs": 10_000, "batch_size": 16}
    return JobRequested(
        project="default",
        job="training",
        kind="train",
        resources=Resources(900, 512),
        spec=msgspec.to_builtins(spec_of(await store_digits(objects), params=params)),
    )


async def trained(trainer: Trainer, attempt: int) -> bool:
    """Whether that has come to the end of an epoch."""
    return any(one.attempt == attempt for one in await trainer.of(JobProgressed))


async def waits(writer: Writer, job: str) -> bool:
    def look(scheduler: Scheduler) -> bool:
        key = "default", job
        return key in scheduler.jobs and scheduler.jobs[key].state == WAITING

    return await writer.read(look)
