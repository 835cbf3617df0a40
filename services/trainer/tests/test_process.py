"""`python -m services.trainer`: ready before Ray, resumes after SIGKILL, leaves nothing behind.

How it drains is in test_cluster.py."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest
import pytest_asyncio

from libs.bus.jetstream import JetStreamBus
from libs.contracts.artifacts import TrainResult
from libs.contracts.events import AttemptSucceeded, JobProgressed
from libs.objectstore import ObjectStore
from services.trainer.tests.conftest import spec_of, store_digits
from services.trainer.tests.desk import placed
from services.trainer.tests.process import WARM_S, Receiver, Trainer, opened
from stack.testing import eventually


@pytest_asyncio.fixture
async def trainer(
    bus: JetStreamBus, nats_url: str, postgres_dsn: str, s3_server: str, objects: ObjectStore
) -> AsyncIterator[Trainer]:
    async with opened(bus, nats_url, postgres_dsn, s3_server, objects) as one:
        await one.start()
        yield one


@pytest.mark.slow
async def test_it_resumes_after_a_kill_ends_with_ray_and_leaves_nothing_behind(
    trainer: Trainer, objects: ObjectStore
) -> None:
    await trainer.heartbeat("health", "Initializing")
    first = await trainer.heartbeat("health", "Healthy")
    kept = environments(trainer.pid_of("raylet"))
    assert kept
    assert not any(one.startswith(b"\0") for one in kept), "the reaper finds its mark in all of it"
    params = {"epochs": 12, "hidden": [512, 512], "batch_size": 16}
    spec = spec_of(await store_digits(objects), workers=2, params=params)
    await trainer.place(placed("resumed", spec))
    await eventually(lambda: trainer.of(JobProgressed), 60)
    await trainer.end(signal.SIGKILL)
    await trainer.nothing_left()

    await trainer.start()
    again = await trainer.heartbeat("health", "Healthy")
    assert again["incarnation"] != first["incarnation"]
    assert again["running"] == []
    await trainer.place(placed("resumed", spec, attempt=2))
    await eventually(lambda: trainer.of(AttemptSucceeded), 120)
    (said,) = await trainer.of(AttemptSucceeded)
    result = msgspec.convert(said.result, TrainResult)
    assert result.resumed_from_epoch > 0
    assert result.evaluation.metrics["accuracy"] > 0.8
    await spans_are_one_tree(trainer.receiver)

    os.kill(trainer.pid_of("raylet"), signal.SIGKILL)
    assert trainer.process is not None
    async with asyncio.timeout(WARM_S):
        assert await trainer.process.wait() != 0, "it ends with Ray, so that both are started again"
    await trainer.nothing_left()


def environments(raylet: int) -> list[bytes]:
    """Of the processes that it has started."""
    started = psutil.Process(raylet).children()
    return [Path(f"/proc/{one.pid}/environ").read_bytes() for one in started]


async def spans_are_one_tree(receiver: Receiver) -> None:
    """The phases are children of `train`, wherever they ran; `train` is the placement's."""
    await eventually(lambda: receiver.named("train"))
    (train,) = receiver.named("train")
    assert (train.trace_id.hex(), train.parent_span_id.hex()) == ("a" * 32, "b" * 16)

    def phases() -> list[str]:
        return sorted(s.name for s in receiver.spans if s.parent_span_id == train.span_id)

    own = {"evaluate", "export", "fit", "load"}
    await eventually(lambda: set(phases()) >= own)
    await eventually(lambda: phases().count("fit") == 2)
