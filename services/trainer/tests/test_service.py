"""The trainer's part of the loop, on a real bus, Postgres, object storage and Ray."""

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from libs.bus.jetstream import JetStreamBus
from libs.contracts.artifacts import TrainResult
from libs.contracts.events import (
    AttemptFailed,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    JobProgressed,
    JobRequested,
    JobSucceeded,
)
from libs.contracts.protos import trainer_pb2 as pb
from libs.doors import Invalid, NotFound
from libs.objectstore import ObjectStore
from services.trainer.tests.conftest import PROJECT, spec_of, store_digits
from services.trainer.tests.desk import NODE, Desk, applied, created, opened, placed
from stack.testing import eventually

DIGEST = "ab" * 32
LONG = {"epochs": 1000}


@pytest_asyncio.fixture
async def desk(postgres_dsn: str, bus: JetStreamBus, shared: ObjectStore) -> AsyncIterator[Desk]:
    async with opened(postgres_dsn, bus, shared) as one:
        yield one


@pytest_asyncio.fixture
async def warm(desk: Desk, pool: Any) -> Desk:
    desk.agent.engine.set_result(pool)
    return desk


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_dataset_version_of_a_known_pipeline_asks_for_one_job(
    desk: Desk, order: tuple[int, int]
) -> None:
    events = (applied(), created(DIGEST))
    await desk.send(*(events[index] for index in order))
    await desk.send(created(DIGEST), created("cd" * 32, revision=2))
    (asked,) = await desk.of(JobRequested)
    assert asked.job == "train-digits-1-abababababab"
    assert (asked.kind, asked.workers, asked.resources.cpu_milli) == ("train", 2, 500)
    assert asked.spec["model"] == "digits"
    assert asked.spec["metrics"] == ["accuracy"]
    assert asked.spec["dataset_digest"] == DIGEST


async def test_an_attempt_trains_and_tells_every_epoch_and_one_result(
    warm: Desk, shared: ObjectStore
) -> None:
    spec = spec_of(await store_digits(shared), workers=2)
    event = placed("told", spec)
    await warm.send(event, id="placed-once")
    await warm.send(event, id="placed-once")
    await eventually(lambda: warm.of(AttemptSucceeded), 60)
    assert len(await warm.of(AttemptStarted)) == 1
    assert [one.epoch for one in await warm.of(JobProgressed)] == [1, 2, 3]
    (said,) = await warm.of(AttemptSucceeded)
    result = msgspec.convert(said.result, TrainResult)
    assert await shared.get_blob(result.manifest.digest)
    run = await warm.trainer.GetRun(pb.GetRunRequest(project=PROJECT, job="told"), None)
    assert (run.state, run.recipe, len(run.epochs)) == ("succeeded", "mlp", 3)
    assert run.epochs[2].metrics["accuracy"] > 0.5
    listed = await warm.trainer.ListRuns(pb.ListRunsRequest(project=PROJECT), None)
    assert [one.job for one in listed.runs] == ["told"]


async def test_checkpoints_go_when_the_job_has_ended(warm: Desk, shared: ObjectStore) -> None:
    spec = spec_of(await store_digits(shared))
    await warm.send(placed("ended", spec))
    await eventually(lambda: warm.of(AttemptSucceeded), 60)
    assert await shared.list("checkpoints/default/ended/")
    ended = JobSucceeded(project=PROJECT, job="ended", kind="train", attempt=1, spec={}, result={})
    await warm.send(ended)
    assert await shared.list("checkpoints/default/ended/") == []


async def test_a_users_mistake_is_not_tried_again(warm: Desk, shared: ObjectStore) -> None:
    spec = spec_of(await store_digits(shared), params={"epochs": 2, "wide": 3})
    await warm.send(placed("mistake", spec))
    await eventually(lambda: warm.of(AttemptFailed), 60)
    (failed,) = await warm.of(AttemptFailed)
    assert not failed.retryable
    assert "wide" in failed.reason
    assert await warm.of(AttemptSucceeded) == []
    run = await warm.trainer.GetRun(pb.GetRunRequest(project=PROJECT, job="mistake"), None)
    assert (run.state, run.reason) == ("failed", failed.reason)


async def test_a_stopped_attempt_ends_without_a_result_and_the_next_resumes(
    warm: Desk, shared: ObjectStore
) -> None:
    digest = await store_digits(shared)
    await warm.send(placed("stopped", spec_of(digest, params=LONG)))
    await eventually(lambda: warm.of(JobProgressed), 60)
    stop = AttemptStopped(project=PROJECT, job="stopped", attempt=1, token=1, node=NODE)
    await warm.send(stop)
    await eventually(lambda: not warm.agent.tasks)
    done = len(await shared.list("checkpoints/default/stopped/"))
    assert done
    spec = spec_of(digest, params=LONG)
    await warm.send(placed("stopped", spec, attempt=2))
    last = max(one.epoch for one in await warm.of(JobProgressed))

    async def further() -> bool:
        return any(one.epoch > last for one in await warm.of(JobProgressed))

    assert await eventually(further, 60)
    assert await warm.of(AttemptSucceeded) == await warm.of(AttemptFailed) == []


async def test_what_is_not_for_this_node_or_came_too_late_is_left_alone(
    desk: Desk,
) -> None:
    spec = spec_of(DIGEST)
    await desk.send(placed("elsewhere", spec, node="another"))
    early = AttemptStopped(project=PROJECT, job="late", attempt=1, token=1, node=NODE)
    await desk.send(early, placed("late", spec))
    await desk.send(placed("stale", spec, attempt=2), placed("stale", spec, attempt=1))
    assert [(one.job, one.attempt) for one in await desk.of(AttemptStarted)] == [("stale", 2)]
    assert [key[1:] for key in desk.agent.tasks] == [("stale", 2)]
    listed = await desk.trainer.ListRuns(pb.ListRunsRequest(project=PROJECT), None)
    assert [one.job for one in listed.runs] == ["stale"], "what was stopped unplaced is no run"
    with pytest.raises(NotFound):
        await desk.trainer.GetRun(pb.GetRunRequest(project=PROJECT, job="late"), None)


async def test_the_heartbeat_tells_what_runs_and_whether_ray_is_warm(desk: Desk) -> None:
    await desk.send(placed("beating", spec_of(DIGEST)))
    told = json.loads(desk.agent.heartbeat())
    assert told["health"] == "Initializing"
    assert told["kinds"] == ["train"]
    assert told["running"] == [{"project": PROJECT, "job": "beating", "attempt": 1, "token": 1}]
    async for subject, payload in desk.bus.listen("heartbeats.>"):
        assert subject == f"heartbeats.{NODE}"
        assert json.loads(payload)["incarnation"] == desk.agent.incarnation
        break


async def test_after_a_restart_what_ran_is_lost(
    postgres_dsn: str, bus: JetStreamBus, shared: ObjectStore
) -> None:
    async with opened(postgres_dsn, bus, shared) as before:
        await before.send(placed("lost", spec_of(DIGEST)))
    async with opened(postgres_dsn, bus, shared) as after:
        assert json.loads(after.agent.heartbeat())["running"] == []
        run = await after.trainer.GetRun(pb.GetRunRequest(project=PROJECT, job="lost"), None)
        assert run.state == "lost"


async def test_the_doors_refuse_by_name(desk: Desk) -> None:
    with pytest.raises(NotFound, match="job"):
        await desk.trainer.GetRun(pb.GetRunRequest(project=PROJECT, job="none"), None)
    with pytest.raises(Invalid, match="project"):
        await desk.trainer.ListRuns(pb.ListRunsRequest(project="a.b"), None)
