"""Versions come and go and no request is refused; what does not verify is never served."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import msgspec
import pytest

from libs.bus.jetstream import JetStreamBus
from libs.contracts.events import (
    AttemptStarted,
    DeploymentObserved,
    DeploymentReady,
    DeploymentUpdated,
)
from libs.contracts.protos import registry_pb2, registry_pb2_grpc
from libs.database import Database, Transaction
from libs.doors.serve import grpc_door
from libs.objectstore import ObjectStore, key_of
from services.inference import agent, store
from services.inference.app import Settings
from services.inference.tests import stage
from services.inference.tests.conftest import ROW, Replica, labels, request, started
from services.inference.tests.stage import Platform, corrupt, register
from stack.testing import eventually

OFFSET = 100
"""Version 2 answers with labels this much larger."""


async def ready_events(platform: Platform) -> list[int]:
    return [event.generation for event in await platform.seen(DeploymentReady)]


async def deployed(replica: Replica, platform: Platform, objects: ObjectStore) -> Any:
    """Version 1 at 100 %."""
    await platform.place()
    one = await register(objects, 1, 100, stage.digits())
    await platform.deploy(1, one)
    await replica.until_announced(1)
    return one


async def test_it_is_ready_at_once_and_serves_what_is_placed_here_only(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    await eventually(replica.agent.ready)
    await platform.place("other", node="elsewhere")
    await deployed(replica, platform, objects)
    assert labels(await replica.infer(ROW)) == [1]
    (begun,) = await eventually(lambda: platform.seen(AttemptStarted))
    assert (begun.job, begun.token) == ("serve-digits", 1)
    assert await eventually(lambda: ready_events(platform)) == [1]
    assert set(replica.agent.endpoints.by_key) == {("default", "digits")}


async def test_versions_are_swapped_under_load_and_no_request_fails(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    await deployed(replica, platform, objects)
    two = await register(objects, 2, 100, stage.digits(OFFSET))
    answers: Counter[tuple[str, int]] = Counter()
    stop = asyncio.Event()

    async def client() -> None:
        while not stop.is_set():
            answer = await replica.infer(ROW)
            answers[answer.model_version, labels(answer)[0]] += 1

    async with asyncio.TaskGroup() as clients:
        for _ in range(8):
            clients.create_task(client())
        await eventually(lambda: answers["1", 1] > 50)
        await platform.deploy(2, two)
        await eventually(lambda: answers["2", 1 + OFFSET] > 50, timeout_s=30)
        stop.set()
    assert set(answers) == {("1", 1), ("2", 1 + OFFSET)}
    await replica.until_announced(2)
    index = replica.agent.endpoints.index(ready_only=True)
    assert [row[1] for row in index] == ["2"], "the old version is gone"


async def test_a_canary_gets_exactly_its_share_and_a_client_may_choose(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    one = await deployed(replica, platform, objects)
    two = await register(objects, 2, 20, stage.digits(OFFSET))
    await platform.deploy(2, msgspec.structs.replace(one, percent=80), two)
    await replica.until_announced(2)
    answers = [await replica.infer(ROW) for _ in range(100)]
    assert Counter(answer.model_version for answer in answers) == {"1": 80, "2": 20}
    assert labels(await replica.infer(ROW, version="2")) == [1 + OFFSET]

    async def observed() -> list[tuple[int, int, int]]:
        events = await platform.seen(DeploymentObserved)
        return [(o.number, o.requests, o.errors) for o in events[-1].observations] if events else []

    async def counted() -> bool:
        return await observed() == [(1, 80, 0), (2, 21, 0)]

    await eventually(counted)


async def test_corrupt_bytes_are_never_served_and_the_previous_version_goes_on(
    replica: Replica,
    platform: Platform,
    objects: ObjectStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await deployed(replica, platform, objects)
    two = await register(objects, 2, 100, stage.digits(OFFSET))
    right = await corrupt(objects, two)
    await platform.deploy(2, two)
    with caplog.at_level(logging.ERROR):
        await eventually(lambda: "digits version 2: failed to load: artifact" in caplog.text)
    assert labels(await replica.infer(ROW)) == [1]
    with pytest.raises(grpc.aio.AioRpcError, match="version 2 is not found"):
        await replica.infer(ROW, version="2")
    assert await ready_events(platform) == [1]
    await objects.put(key_of(two.digest), right)
    await replica.until_announced(2)
    assert labels(await replica.infer(ROW)) == [1 + OFFSET]


async def test_a_restart_serves_again_without_scheduler_and_registry(
    settings: Settings, bus: JetStreamBus, platform: Platform, objects: ObjectStore
) -> None:
    async with started(settings, bus) as replica:
        one = await deployed(replica, platform, objects)
        await replica.infer(ROW)
    right = await corrupt(objects, one)
    async with started(settings, bus) as replica:
        await eventually(lambda: replica.agent.owed)
        assert not await replica.agent.ready(), "what it owes is not loaded yet"
        await objects.put(key_of(one.digest), right)
        await eventually(replica.agent.ready)
        assert labels(await replica.infer(ROW)) == [1]
        beat = msgspec.json.decode(replica.agent.node.heartbeat(replica.agent.assignments, []))
        assert beat["running"] == [
            {"project": "default", "job": "serve-digits", "attempt": 1, "token": 1}
        ]

        async def counted() -> bool:
            events = await platform.seen(DeploymentObserved)
            return bool(events) and events[-1].observations[0].requests == 2

        await eventually(counted)


async def test_a_replica_that_is_stopped_and_placed_again_goes_on_answering(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    await deployed(replica, platform, objects)
    served = dict(replica.agent.endpoints.by_key)
    await platform.stop(token=2)
    await eventually(lambda: replica.agent.unwanted)
    await replica.infer(ROW)
    await platform.place(token=3)
    await eventually(lambda: replica.agent.assignments and not replica.agent.unwanted)
    await replica.infer(ROW)
    assert replica.agent.endpoints.by_key == served


async def test_a_stopped_attempt_is_unloaded_and_an_older_placement_starts_nothing(
    replica: Replica,
    platform: Platform,
    objects: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agent, "LINGER_S", 0.1)
    await deployed(replica, platform, objects)
    await platform.stop(token=2)
    await eventually(lambda: not replica.agent.endpoints.by_key)
    with pytest.raises(grpc.aio.AioRpcError, match="no replica of model 'digits' answers"):
        await replica.infer(ROW)
    await platform.place(token=1)
    await platform.place(token=3)
    await eventually(lambda: replica.agent.assignments)
    assert [one.token for one in replica.agent.assignments] == [3]
    await eventually(lambda: replica.agent.endpoints.is_routed(("default", "digits")))


class Held:
    """Postgres, whose word that it has committed is on its way until `heard`."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.heard = asyncio.Event()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        async with self.db.transaction() as tx:
            yield tx
        await self.heard.wait()


async def requests_in(db: Database, deployment: DeploymentUpdated) -> int:
    async with db.transaction() as tx:
        found = await store.tallies(tx, deployment)
    return sum(one.requests for one in found.values())


async def test_a_count_that_is_cancelled_is_in_postgres_once(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    await deployed(replica, platform, objects)
    one, endpoint = replica.agent, replica.agent.endpoints.find("digits")
    db, deployment = one.db, endpoint.deployment
    assert deployment is not None
    async with endpoint.turn:
        await replica.infer(ROW)
        held = Held(db)
        counting = asyncio.create_task(one.observe_endpoint(endpoint))
        one.db = held  # type: ignore[assignment]

    async def committed() -> bool:
        return await requests_in(db, deployment) == 1

    await eventually(committed)
    counting.cancel()
    await asyncio.wait([counting])
    one.db = db
    held.heard.set()
    await one.observe_once()
    assert await requests_in(db, deployment) == 1


async def test_what_a_model_answered_until_it_was_removed_is_in_postgres(
    replica: Replica, platform: Platform, objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "LINGER_S", 0.1)
    monkeypatch.setattr(agent, "OBSERVE_S", 3600)
    await deployed(replica, platform, objects)
    endpoint = replica.agent.endpoints.find("digits")
    assert endpoint.deployment is not None
    await asyncio.gather(*[replica.infer(ROW) for _ in range(20)])
    await platform.stop(token=2)
    await eventually(lambda: not replica.agent.endpoints.by_key)
    db, deployment = replica.agent.db, endpoint.deployment

    async def counted() -> bool:
        return await requests_in(db, deployment) == 20

    await eventually(counted)


async def test_it_announces_itself_every_second(replica: Replica, bus: JetStreamBus) -> None:
    heard = bus.listen("heartbeats.>")
    async with asyncio.timeout(10):
        subject, payload = await anext(heard)
    beat = msgspec.json.decode(payload)
    assert (subject, beat["node"], beat["kinds"]) == (
        "heartbeats.inference",
        "inference",
        ["serve"],
    )
    assert beat["incarnation"] == replica.agent.node.incarnation


class Desk(registry_pb2_grpc.RegistryServicer):
    """A registry that desires one deployment."""

    def __init__(self, desired: DeploymentUpdated) -> None:
        self.desired = desired

    async def ListDeployments(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        targets = [
            registry_pb2.TrafficTarget(**msgspec.structs.asdict(t)) for t in self.desired.targets
        ]
        one = registry_pb2.Deployment(
            project=request.project,
            model=self.desired.model,
            generation=self.desired.generation,
            targets=targets,
            request_log_percent=100,
        )
        one.batching.update({"max_batch_size": 3})
        return registry_pb2.ListDeploymentsResponse(deployments=[one])


async def test_a_missed_event_is_made_good_by_asking_the_registry(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    """The registry is away at first."""
    await platform.place()
    await eventually(lambda: replica.agent.assignments)
    target = await register(objects, 1, 100, stage.digits())
    desk = Desk(stage.deployment(4, target))
    port = int(replica.settings.registry_grpc.rpartition(":")[2])

    async def ready() -> bool:
        return True

    async with grpc_door(
        "127.0.0.1",
        port,
        lambda server: registry_pb2_grpc.add_RegistryServicer_to_server(desk, server),
        [],
        ready,
    ):
        await replica.until_announced(4)
    assert labels(await replica.infer(ROW)) == [1]
    with pytest.raises(grpc.aio.AioRpcError, match="batch-size must be <= 3"):
        await replica.infer(*[ROW] * 4)


async def test_a_request_that_makes_the_graph_raise_fails_alone_and_is_counted(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    await platform.place("lookup")
    target = await register(objects, 1, 100, stage.lookup(), stage.LOOKUP, "lookup")
    await platform.deploy(1, target, model="lookup")
    await replica.until_announced(1, "lookup")

    async def look_up(index: int) -> float:
        asked = {"name": "index", "datatype": "INT64", "shape": [1], "data": [index]}
        answer = await replica.http.post("/v2/models/lookup/infer", json={"inputs": [asked]})
        if answer.status_code != 200:
            assert (answer.status_code, "lookup" in answer.json()["error"]) == (500, True)
            return -1
        return float(answer.json()["outputs"][0]["data"][0])

    indices = [0, 1, 7, 2] * 8
    answers = await asyncio.gather(*map(look_up, indices))
    assert answers == [{0: 0, 1: 10, 2: 20, 7: -1}[index] for index in indices]

    async def counted() -> bool:
        events = await platform.seen(DeploymentObserved)
        last = events[-1].observations[0] if events else None
        return last is not None and (last.requests, last.errors) == (32, 8)

    await eventually(counted)


async def test_a_full_queue_is_said_on_both_doors(
    replica: Replica, platform: Platform, objects: ObjectStore
) -> None:
    await platform.place()
    target = await register(objects, 1, 100, stage.digits())
    await platform.deploy(1, target, max_queue_size=1, max_queue_delay_microseconds=500_000)
    await replica.until_announced(1)
    accepted = asyncio.create_task(replica.infer(ROW))
    served = replica.agent.endpoints.find("digits").served["1"]
    await eventually(lambda: served.counts().waiting)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await replica.oip.ModelInfer(request(ROW))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    asked = {"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": ROW}
    answer = await replica.http.post("/v2/models/digits/infer", json={"inputs": [asked]})
    assert (answer.status_code, "maximum queue size" in answer.json()["error"]) == (503, True)
    assert labels(await accepted) == [1]
