"""The process itself, on a real bus and a real Postgres."""

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from libs.bus import EVENTS
from libs.bus.jetstream import JetStreamBus
from libs.bus.loop import ACK_WAIT_S
from libs.contracts.envelope import Envelope, decode, encode
from libs.contracts.events import (
    AttemptPlaced,
    AttemptStarted,
    AttemptSucceeded,
    Event,
    JobRequested,
    JobSucceeded,
    Resources,
    subject_of,
)
from services.scheduler.stimuli import Heartbeat, Running
from stack import ports, process
from stack.testing import Server, eventually

TRACE = "00-{:032x}-00f067aa0ba902b7-01"
BEAT_S = 0.2
REDELIVERED_S = ACK_WAIT_S + 20
"""What the killed process had been handed and not acked comes again after the ack wait."""


class Agent:
    """A node as its agent would be, without anything to run."""

    def __init__(self, bus: JetStreamBus, node: str) -> None:
        self.bus = bus
        self.heartbeat = Heartbeat(node, "1", ["train"], Resources(2000, 4096))
        self.running: list[Running] = []
        self.silenced = asyncio.Event()

    async def beat(self) -> None:
        while not self.silenced.is_set():
            said = msgspec.structs.replace(self.heartbeat, running=self.running)
            await self.bus.broadcast(f"heartbeats.{said.node}", msgspec.json.encode(said))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self.silenced.wait()


@contextlib.asynccontextmanager
async def beating(agent: Agent) -> AsyncIterator[Agent]:
    task = asyncio.create_task(agent.beat())
    try:
        yield agent
    finally:
        agent.silenced.set()
        await task


class Service:
    """`python -m services.scheduler`, its HTTP door, and what it says on the bus."""

    def __init__(self, folder: Path, bus: JetStreamBus, nats_url: str, dsn: str) -> None:
        http, grpc = ports.free(2)
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{http}", timeout=30)
        self.bus = bus
        environment = {
            "LEPTONIC_NATS_URL": nats_url,
            "LEPTONIC_POSTGRES_DSN": dsn,
            "LEPTONIC_SCHEDULER_HTTP_PORT": str(http),
            "LEPTONIC_SCHEDULER_GRPC_PORT": str(grpc),
        }
        program = process.Program(
            name="scheduler",
            command=(sys.executable, "-m", "services.scheduler"),
            ready=self.is_ready,
            environment=environment,
        )
        self.server = Server(program, folder / f"scheduler-{http}.log")

    async def is_ready(self) -> bool:
        try:
            return (await self.http.get("/health/ready")).status_code == 200
        except httpx.HTTPError:
            return False

    async def is_live(self) -> bool:
        try:
            return (await self.http.get("/health/live")).status_code == 200
        except httpx.HTTPError:
            return False

    async def job(self, name: str) -> dict[str, Any]:
        response = await self.http.get(f"/v1/projects/p/jobs/{name}")
        return response.json() if response.status_code == 200 else {}

    async def state(self, name: str) -> str:
        return str((await self.job(name)).get("state", ""))

    async def submit(self, name: str, **fields: Any) -> httpx.Response:
        return await self.http.post(
            "/v1/projects/p/jobs", json={"job": name, "kind": "train", **fields}
        )

    async def publish(self, event: Event, trace: int = 1, id: str = "") -> None:
        payload = encode(
            event,
            id=id or str(uuid.uuid4()),
            service="test",
            time="2026-11-21T00:00:00Z",
            traceparent=TRACE.format(trace),
        )
        await self.bus.publish(subject_of(event), payload, id=str(uuid.uuid4()))

    async def said(self, kind: type[Event]) -> list[tuple[Envelope, Any]]:
        subject = f"events.*.{kind.entity}.{kind.verb}"
        return [decode(one.payload) for one in await self.bus.read(EVENTS, subject, 0, 100)]

    async def placed(self, name: str) -> AttemptPlaced:
        """Its last placement."""

        async def last() -> AttemptPlaced | None:
            found = [event for _, event in await self.said(AttemptPlaced) if event.job == name]
            return found[-1] if found else None

        placed: AttemptPlaced = await eventually(last, timeout_s=30)
        return placed


@pytest.fixture
async def service(
    tmp_path: Path, bus: JetStreamBus, nats_url: str, postgres_dsn: str
) -> AsyncIterator[Service]:
    one = Service(tmp_path, bus, nats_url, postgres_dsn)
    await one.server.start()
    try:
        yield one
    finally:
        await one.http.aclose()
        await one.server.stop()


def running(service: Service) -> Any:
    assert service.server.running is not None
    return service.server.running


def request(job: str, **fields: Any) -> JobRequested:
    return JobRequested(project="p", job=job, kind="train", **fields)


def about(placed: AttemptPlaced) -> dict[str, Any]:
    fields = msgspec.structs.asdict(placed)
    return {name: fields[name] for name in ("project", "job", "attempt", "token", "node")}


async def test_a_job_runs_once_and_its_trace_goes_on(service: Service) -> None:
    async with beating(Agent(service.bus, "n")):
        await service.publish(request("j", spec={"epochs": 3}), trace=7, id="one")
        await service.publish(request("j", spec={"epochs": 3}), trace=7, id="one")
        await service.publish(request("j", spec={"epochs": 3}), trace=7, id="other")
        placed = await service.placed("j")
        assert placed.spec == {"epochs": 3}
        await service.publish(AttemptStarted(**about(placed)))
        await eventually(lambda: is_state(service, "j", "running"))
        result = AttemptSucceeded(**about(placed), result={"accuracy": 0.5, "rows": 3})
        await service.publish(result, trace=8)
        await service.publish(result, trace=9)
        await eventually(lambda: is_state(service, "j", "succeeded"))
        await service.publish(request("j"))
        await service.publish(request("last"))
        await service.placed("last")
    assert [event.job for _, event in await service.said(AttemptPlaced)] == ["j", "last"]
    ((envelope, succeeded),) = await service.said(JobSucceeded)
    assert succeeded.spec == {"epochs": 3}
    assert succeeded.result == {"accuracy": 0.5, "rows": 3}
    assert envelope.traceparent[3:35] == f"{8:032x}", "goes on from the result"
    (envelope, _), _ = await service.said(AttemptPlaced)
    assert envelope.traceparent[3:35] == f"{7:032x}", "goes on from the request"
    assert envelope.traceparent != TRACE.format(7), "in a span of its own"


async def is_state(service: Service, job: str, state: str) -> bool:
    return await service.state(job) == state


async def test_killed_in_mid_run_it_goes_on_where_it_was(service: Service) -> None:
    agent = Agent(service.bus, "n")
    async with beating(agent):
        await service.submit("runs")
        placed = await service.placed("runs")
        agent.running = [Running("p", "runs", placed.attempt, placed.token)]
        await service.publish(AttemptStarted(**about(placed)))
        await eventually(lambda: is_state(service, "runs", "running"))
        await service.submit("waits", workers=2)
        before = (await service.http.get("/v1/projects/p/jobs")).json()
        assert [job["state"] for job in before["jobs"]] == ["running", "waiting"]
        await service.server.kill()
        await service.publish(AttemptSucceeded(**about(placed)))
        await service.publish(request("while-away", workers=2))
        agent.running = []
        await service.server.start()
        after = await eventually(lambda: ended(service, "runs"), REDELIVERED_S)
        assert after["state"] == "succeeded"
        assert after["attempt"] == 1, "its node was not taken for lost"
        assert (await service.placed("waits")).token == placed.token + 1
        await eventually(lambda: is_state(service, "while-away", "waiting"), REDELIVERED_S)
    assert len(await service.said(JobSucceeded)) == 1


async def ended(service: Service, job: str) -> dict[str, Any]:
    found = await service.job(job)
    return found if found.get("state") in ("succeeded", "failed") else {}


async def test_a_silent_node_is_lost_and_its_job_goes_elsewhere(service: Service) -> None:
    async with beating(Agent(service.bus, "a")):
        await service.submit("j")
        assert (await service.placed("j")).node == "a"
    async with beating(Agent(service.bus, "b")):
        await eventually(lambda: is_on(service, "j", "b"), timeout_s=30)
    job = await service.job("j")
    assert job["attempt"] == 2
    assert job["reason"] == "node a was silent for more than 2.5 s"
    (a, b) = (await service.http.get("/v1/nodes")).json()["nodes"]
    assert (a["health"], a["allocated"]["cpu_milli"]) == ("Unhealthy", "0")
    assert (b["health"], b["jobs"]) == ("Healthy", ["j"])
    assert b["last_heartbeat_at"] > a["last_heartbeat_at"]


async def is_on(service: Service, job: str, node: str) -> bool:
    return bool((await service.job(job)).get("node") == node)


async def test_it_leads_again_after_postgres_dropped_it(
    service: Service, postgres_dsn: str
) -> None:
    async with beating(Agent(service.bus, "n")):
        first = running(service).pid
        others = "select pg_terminate_backend(pid) from pg_stat_activity where pid in ({})"
        mine = (
            "select pid from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        async with await psycopg.AsyncConnection.connect(postgres_dsn) as connection:
            await connection.execute(others.format(mine).encode())
        await service.publish(request("j"))
        assert (await service.placed("j")).attempt == 1
        log = service.server.log
        await eventually(lambda: log.read_text().count('"message": "leads"') == 2, timeout_s=30)
        await eventually(service.is_ready)
        assert running(service).pid == first
        assert running(service).poll() is None


async def test_doors_refuse_with_the_field_and_stay_open(service: Service) -> None:
    refused = await service.submit("j", resources={"cpu_milli": -5})
    assert refused.status_code == 400
    assert refused.json()["field"] == "resources.cpu_milli"
    assert (await service.submit("j", workers=-1)).json()["field"] == "workers"
    assert (await service.submit("")).json()["field"] == "job"
    accepted = (await service.submit("j", kind="fly", spec={"lr": 0.1, "epochs": 2})).json()
    assert accepted["reason"] == "no node runs jobs of kind 'fly' (announced: none)"
    queues = (await service.http.get("/v1/queues")).json()["queues"]
    assert [(queue["queue"], queue["waiting"]) for queue in queues] == [("default", 1)]
    cancel = "/v1/projects/p/jobs/j:cancel"
    assert (await service.http.post(cancel)).json()["state"] == "cancelled"
    again = await service.http.post(cancel)
    assert again.status_code == 409
    assert again.json()["code"] == "FAILED_PRECONDITION"
    assert (await service.http.post("/v1/projects/p/jobs/x:cancel")).status_code == 404


async def test_a_standby_answers_once_the_leader_was_told_to_end(
    service: Service, tmp_path: Path, nats_url: str, postgres_dsn: str
) -> None:
    await service.submit("j")
    standby = Service(tmp_path, service.bus, nats_url, postgres_dsn)
    program = standby.server.program
    standby.server.running = await process.start(program, standby.server.log)
    try:
        await eventually(standby.is_ready, timeout_s=60)
        asked = asyncio.create_task(standby.state("j"))
        assert await service.state("j") == "waiting"
        assert not asked.done()
        running(service).terminate()
        async with asyncio.timeout(10):
            assert await process.until_exit(running(service)) == 0
        assert await asked == "waiting"
    finally:
        await standby.http.aclose()
        await standby.server.stop()


async def test_a_standby_leads_once_the_leader_was_killed(
    service: Service, tmp_path: Path, nats_url: str, postgres_dsn: str
) -> None:
    await service.submit("j")
    standby = Service(tmp_path, service.bus, nats_url, postgres_dsn)
    await standby.server.start()
    try:
        await service.server.kill()
        assert await standby.state("j") == "waiting"
        async with beating(Agent(service.bus, "n")):
            assert (await standby.placed("j")).token == 1
    finally:
        await standby.http.aclose()
        await standby.server.stop()


async def test_many_jobs_in_one_request(service: Service) -> None:
    path = "/v1/projects/p/jobs:submit"
    wanted = [{"job": f"j{number}", "kind": "train"} for number in range(200)]
    async with beating(Agent(service.bus, "n")):
        await service.submit("j0")
        await service.placed("j0")
        answered = await service.http.post(path, json={"jobs": wanted})
    states = {one["job"]: (one["state"], one["node"]) for one in answered.json()["jobs"]}
    assert list(states) == [one["job"] for one in wanted]
    assert [states[job] for job in ("j0", "j1", "j2")] == [("placed", "n")] * 2 + [("waiting", "")]
    bad = [{"job": "good", "kind": "train"}, {"job": "bad", "kind": "train", "workers": -1}]
    refused = await service.http.post(path, json={"jobs": bad})
    assert (refused.status_code, refused.json()["field"]) == (400, "workers")
    assert await service.job("good") == {}
