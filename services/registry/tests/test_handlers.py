"""Events become versions and deployments exactly once, on real servers."""

import json

import msgspec
import psycopg
import pytest

from libs import telemetry
from libs.bus import DEAD_LETTERS
from libs.contracts.events import (
    DeploymentObserved,
    DeploymentReady,
    DeploymentUpdated,
    JobFailed,
    JobRequested,
    ModelVersionGated,
    ModelVersionPromoted,
    ModelVersionRegistered,
    ModelVersionRejected,
    Observation,
    PipelineApplied,
)
from libs.objectstore import Corrupt, Missing, key_of
from services.registry.handlers import Refused, Unknown
from services.registry.tests.conftest import YAML, Desk, fields
from stack.testing import eventually


def observed(generation: int, replica: str, *counts: Observation) -> DeploymentObserved:
    return DeploymentObserved(
        project="default",
        model="digits",
        generation=generation,
        replica=replica,
        observations=list(counts),
    )


async def two_versions(desk: Desk) -> None:
    """Version 1 is champion, version 2 a canary of generation 2."""
    await desk.apply()
    await desk.handle(await desk.trained("job-1"), "e1")
    await desk.handle(await desk.trained("job-2", champion=1), "e2")


async def test_the_first_version_is_registered_gated_and_deployed(desk: Desk) -> None:
    await desk.apply()
    await desk.handle(await desk.trained("job-1"), "e1")
    events = await desk.emitted()
    assert [type(event) for event in events] == [
        PipelineApplied,
        ModelVersionRegistered,
        ModelVersionGated,
        ModelVersionPromoted,
        DeploymentUpdated,
        JobRequested,
    ]
    (version,) = await desk.versions()
    assert (version.number, version.state, list(version.aliases)) == (1, "serving", ["champion"])
    assert events[1].digest == version.digest  # type: ignore[attr-defined]
    assert await desk.shares() == [(1, 100)]


@pytest.mark.parametrize("again", ["e1", "another event of the same job"])
async def test_a_job_registers_once_however_often_it_succeeds(desk: Desk, again: str) -> None:
    await desk.apply()
    event = await desk.trained("job-1")
    await desk.handle(event, "e1")
    before = await desk.emitted()
    await desk.handle(event, again)
    assert len(await desk.versions()) == 1
    assert await desk.emitted() == before


async def test_redelivery_over_the_bus_registers_once(desk: Desk) -> None:
    await desk.apply()
    event = await desk.trained("job-1")
    for _ in range(3):
        await desk.publish(event, "e1")
    assert await desk.loop() == 3
    assert [version.job for version in await desk.versions()] == ["job-1"]
    assert len([e for e in await desk.emitted() if isinstance(e, JobRequested)]) == 1


async def test_a_version_that_fails_its_gate_is_not_deployed(desk: Desk) -> None:
    await two_versions(desk)
    await desk.handle(await desk.trained("job-3", accuracy=0.5, champion=1), "e3")
    version = (await desk.versions())[-1]
    assert (version.state, list(version.aliases)) == ("rejected", [])
    failed = [dict(check)["sentence"] for check in version.checks if not dict(check)["passed"]]
    assert failed == [
        "accuracy 0.5 is not at least 0.9",
        "accuracy 0.5 against version 1's 0.95 is worse by 0.45, more than 0.05",
    ]
    assert await desk.shares() == [(1, 75), (2, 25)]
    assert isinstance((await desk.emitted())[-1], ModelVersionGated)


async def test_a_first_version_that_fails_leaves_nothing_deployed(desk: Desk) -> None:
    await desk.apply()
    await desk.handle(await desk.trained("job-1", accuracy=0.5), "e1")
    async with desk.context.db.transaction() as tx:
        assert await tx.one("select 1 from deployment") is None
    await desk.handle(await desk.trained("job-2"), "e2")
    assert await desk.shares() == [(2, 100)]


async def test_a_canary_is_promoted_by_the_sum_of_its_replicas(desk: Desk) -> None:
    await two_versions(desk)
    assert await desk.shares() == [(1, 75), (2, 25)]
    one, two = Observation(1, 60, 0), Observation(2, 12, 0)
    await desk.handle(observed(2, "a", one, two), "o1")
    await desk.handle(observed(2, "a", Observation(1, 30, 0), Observation(2, 6, 0)), "o2: late")
    assert await desk.shares() == [(1, 75), (2, 25)], "12 of 20 requests"
    await desk.handle(observed(2, "b", Observation(2, 8, 0)), "o3")
    assert await desk.shares() == [(2, 100)]
    promoted, updated = (await desk.emitted())[-2:]
    assert fields(promoted, "number", "previous") == (2, 1)
    assert fields(updated, "generation") == (3,)
    assert [version.state for version in await desk.versions()] == ["retired", "serving"]
    assert [list(version.aliases) for version in await desk.versions()] == [[], ["champion"]]


@pytest.mark.parametrize("bad", [Observation(2, 10, 1), Observation(2, 0, 0, quarantined=True)])
async def test_a_canary_with_errors_or_crashes_is_rolled_back(desk: Desk, bad: Observation) -> None:
    await two_versions(desk)
    await desk.handle(observed(2, "a", Observation(1, 30, 0), bad), "o1")
    assert await desk.shares() == [(1, 100)]
    rejected = (await desk.emitted())[-2]
    assert isinstance(rejected, ModelVersionRejected)
    assert (rejected.number, rejected.serving) == (2, 1)
    assert [version.state for version in await desk.versions()] == ["serving", "rejected"]


async def test_a_canary_is_superseded(desk: Desk) -> None:
    await two_versions(desk)
    await desk.handle(await desk.trained("job-3", champion=1), "e3")
    assert await desk.shares() == [(1, 75), (3, 25)]
    assert [version.state for version in await desk.versions()] == [
        "serving",
        "rejected",
        "canary",
    ]
    assert [list(version.aliases) for version in await desk.versions()][1:] == [[], ["challenger"]]


async def test_counts_of_an_older_generation_are_ignored(desk: Desk) -> None:
    await two_versions(desk)
    await desk.handle(observed(1, "a", Observation(2, 1000, 0)), "o1")
    await desk.handle(observed(9, "a", Observation(2, 1000, 0)), "o2")
    assert await desk.shares() == [(1, 75), (2, 25)]


async def test_observations_of_a_model_nobody_knows_are_ignored(desk: Desk) -> None:
    await desk.handle(observed(1, "a", Observation(1, 10, 10)), "o1")
    assert await desk.emitted() == []


async def test_the_generation_a_replica_serves_is_known(desk: Desk) -> None:
    await two_versions(desk)
    for number, generation in enumerate((2, 1, 7)):
        ready = DeploymentReady(
            project="default", model="digits", generation=generation, replica="a"
        )
        await desk.handle(ready, f"r{number}")
    assert (await desk.deployment()).ready_generation == 2


async def test_a_failed_training_is_kept_with_its_reason(desk: Desk) -> None:
    failed = JobFailed(
        project="default", job="job-1", kind="train", attempt=3, spec={}, reason="epoch 3: boom"
    )
    await desk.handle(failed, "f1")
    await desk.handle(failed, "f2")
    async with desk.context.db.transaction() as tx:
        (row,) = await tx.all("select job, attempt, reason from failed_job")
    assert row == {"job": "job-1", "attempt": 3, "reason": "epoch 3: boom"}


@pytest.mark.parametrize("blob", ["manifest", "weights", "graph", "transform"])
async def test_an_artifact_with_other_bytes_is_refused(desk: Desk, blob: str) -> None:
    await desk.apply()
    event = await desk.trained("job-1")
    manifest = event.result["manifest"]["digest"]
    content = {
        "manifest": manifest,
        **{
            name: desk_blob["digest"]
            for name, desk_blob in (await manifest_of(desk, manifest)).items()
        },
    }
    await desk.context.objects.put(key_of(content[blob]), b"other bytes")
    with pytest.raises(Corrupt, match=content[blob]):
        await desk.handle(event, "e1")
    assert await desk.versions() == []


async def manifest_of(desk: Desk, digest: str) -> dict[str, dict[str, str]]:

    manifest = json.loads(await desk.context.objects.get_blob(digest))
    return {name: manifest[name] for name in ("weights", "graph", "transform")}


async def test_an_artifact_that_is_not_there_is_refused(desk: Desk) -> None:
    await desk.apply()
    event = await desk.trained("job-1")
    graph = (await manifest_of(desk, event.result["manifest"]["digest"]))["graph"]["digest"]
    await desk.context.objects.delete(key_of(graph))
    with pytest.raises(Missing):
        await desk.handle(event, "e1")
    assert await desk.versions() == []


async def test_a_corrupt_artifact_ends_as_a_dead_letter_with_its_reason(desk: Desk) -> None:
    """The fifth delivery gives up; the service goes on with the next event."""
    await desk.apply()
    event = await desk.trained("job-1")
    await desk.context.objects.put(key_of(event.result["manifest"]["digest"]), b"{}")
    await desk.publish(event, "e1")
    await desk.publish(await desk.trained("job-2"), "e2")

    async def given_up() -> bool:
        await desk.loop()
        return bool(await desk.bus.read(DEAD_LETTERS, "dlq.>", 0, 10))

    await eventually(given_up, timeout_s=30)
    (letter,) = await desk.bus.read(DEAD_LETTERS, "dlq.>", 0, 10)
    assert letter.headers["Leptonic-Reason"].startswith("Corrupt: artifact")
    assert [version.job for version in await desk.versions()] == ["job-2"]


async def test_results_that_belong_to_no_pipeline_are_refused(desk: Desk) -> None:
    await desk.apply()
    with pytest.raises(Unknown, match="no revision 7"):
        await desk.handle(await desk.trained("job-1", revision=7), "e1")
    with pytest.raises(Refused, match="trains 'digits', not 'letters'"):
        await desk.handle(await desk.trained("job-2", model="letters"), "e2")
    assert await desk.versions() == []


async def test_a_version_remembers_the_trace_of_its_registration(desk: Desk) -> None:
    await desk.apply()
    with telemetry.span("the bus loop", parent=""):
        trace_id = telemetry.current().split("-")[1]
        await desk.handle(await desk.trained("job-1"), "e1")
    (version,) = await desk.versions()
    assert version.traceparent.split("-")[1] == trace_id
    assert (await desk.deployment()).targets[0].traceparent == version.traceparent
    (updated,) = [e for e in await desk.emitted() if isinstance(e, DeploymentUpdated)]
    assert updated.targets[0].traceparent == version.traceparent


async def test_a_version_never_changes(desk: Desk) -> None:
    await desk.apply()
    await desk.handle(await desk.trained("job-1"), "e1")
    for statement in (
        "update model_version set digest = 'x'",
        "update model_version set manifest = '{}'",
        "delete from model_version",
    ):
        with pytest.raises(psycopg.errors.RaiseException, match="immutable"):
            async with desk.context.db.transaction() as tx:
                await tx.execute(statement)


async def test_a_new_revision_reaches_what_is_deployed(desk: Desk) -> None:
    await two_versions(desk)
    await desk.apply(YAML.replace("trafficPercent: 25", "trafficPercent: 40"))
    assert await desk.shares() == [(1, 60), (2, 40)]
    assert (await desk.deployment()).generation == 3


async def test_jobs_of_another_kind_are_not_ours(desk: Desk) -> None:
    event = await desk.trained("job-1")

    await desk.handle(msgspec.structs.replace(event, kind="serve"), "e1")
    assert await desk.versions() == []
