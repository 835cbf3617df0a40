"""What the scheduler makes durable through its door, and how soon it is back.

A scheduler process on a real Postgres and a real NATS (every message synced), with 5,000 nodes
that speak twice a second. Floors of the same run: the log lines and outbox rows that it wrote,
copied again in transactions as large, and an empty grpc.aio echo. `python -m bench.durable`.
"""

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter, process_time
from typing import Any

import grpc
import httpx
import psutil
import psycopg
import uvloop

from bench.fleet import Fleet
from bench.rows import Row, row, show
from libs.contracts.protos.scheduler_pb2 import (
    GetJobRequest,
    Resources,
    SubmitJobRequest,
    SubmitJobsRequest,
)
from libs.contracts.protos.scheduler_pb2_grpc import SchedulerStub
from stack import ports, process, servers
from stack.testing import Server, eventually

NODES = 5_000
CPU_MILLI = 64_000
ONE_AT_A_TIME, TOGETHER = 10_000, 90_000
"""Jobs of a round."""
BATCH = 500
IN_FLIGHT, BATCHES_IN_FLIGHT = 256, 4
DRAINED = 5_000
PASSWORD = "bench"  # noqa: S105 - of a server on loopback that lives for a run
READY_S = 120
LOOK_S = 0.25
TARGET = "the target"
FOLLOWED = "leptonic_scheduler_followed_line "


@dataclass
class World:
    folder: Path
    nats: str
    dsn: str
    bus: Server
    postgres: Server
    connection: psycopg.AsyncConnection[Any]

    def scheduler(self) -> Server:
        http, rpc = ports.free(2)
        environment = {
            "LEPTONIC_NATS_URL": self.nats,
            "LEPTONIC_POSTGRES_DSN": self.dsn,
            "LEPTONIC_SCHEDULER_HTTP_PORT": str(http),
            "LEPTONIC_SCHEDULER_GRPC_PORT": str(rpc),
            "LEPTONIC_LOG_LEVEL": "WARNING",
        }

        async def ready() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                async with httpx.AsyncClient() as client:
                    answer = await client.get(f"http://127.0.0.1:{http}/health/ready")
                    return answer.status_code == httpx.codes.OK
            return False

        program = process.Program(
            name="scheduler",
            command=(sys.executable, "-m", "services.scheduler"),
            ready=ready,
            doors=(rpc,),
            environment=environment,
        )
        return Server(program, self.folder / f"scheduler-{rpc}.log")

    def used(self, scheduler: Server) -> dict[str, float]:
        """Seconds of CPU so far; the nodes that speak are in the client's."""
        programs = {"the scheduler": scheduler, "Postgres": self.postgres, "NATS": self.bus}
        used = {name: cpu_of(one) for name, one in programs.items()}
        return {**used, "the client": process_time()}

    async def one(self, query: str, *parameters: Any) -> Any:
        row = await (await self.connection.execute(query.encode(), parameters)).fetchone()
        assert row is not None
        return row[0]

    async def until(self, query: str, *parameters: Any) -> None:
        """It answers true."""
        deadline = monotonic() + READY_S
        while not await self.one(query, *parameters):
            assert monotonic() < deadline, query
            await asyncio.sleep(LOOK_S)


def cpu_of(server: Server) -> float:
    assert server.running is not None
    root = psutil.Process(server.running.pid)
    return sum(sum(one.cpu_times()[:4]) for one in (root, *root.children(recursive=True)))


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="leptonic-durable-") as name:
        folder = Path(name)
        nats, postgres = ports.free(2)
        bus = Server(servers.nats(folder / "nats", nats), folder / "nats.log")
        db = Server(servers.postgres(folder / "postgres", postgres, PASSWORD), folder / "pg.log")
        async with contextlib.AsyncExitStack() as stack:
            for server in (bus, db):
                await server.start()
                stack.push_async_callback(server.stop)
            dsn = servers.postgres_dsn(postgres, PASSWORD)
            connecting = psycopg.AsyncConnection.connect(
                dsn, autocommit=True, options="-c search_path=scheduler"
            )
            connection = await stack.enter_async_context(await connecting)
            yield World(folder, servers.nats_url(nats), dsn, bus, db, connection)


@contextlib.asynccontextmanager
async def running(server: Server) -> AsyncIterator[SchedulerStub]:
    await server.start()
    try:
        (port,) = server.program.doors
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield SchedulerStub(channel)
    finally:
        await server.stop()


def jobs(prefix: str, count: int) -> list[SubmitJobRequest]:
    small = Resources(cpu_milli=1000, memory_mib=512)
    return [
        SubmitJobRequest(project="p", job=f"{prefix}-{number}", kind="train", resources=small)
        for number in range(count)
    ]


async def rate(
    call: Callable[[Any], Awaitable[Any]], requests: Sequence[Any], at_once: int
) -> float:
    """Answers/s."""
    window = asyncio.Semaphore(at_once)

    async def one(request: Any) -> None:
        async with window:
            await call(request)

    began = perf_counter()
    await asyncio.gather(*map(one, requests))
    return len(requests) / (perf_counter() - began)


async def echo(count: int) -> float:
    """Calls/s of an empty grpc.aio server, with as many under way."""
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.echo", stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    port = int(await program.stdout.readline())
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            await rate(call, [b"x" * 60] * 500, IN_FLIGHT)
            return await rate(call, [b"x" * 60] * count, IN_FLIGHT)
    finally:
        program.kill()
        await program.wait()


async def copied(world: World, count: int, lines: int) -> float:
    """Jobs/s of a bare COPY of as many log lines and outbox rows, `lines` a transaction."""
    log = (0.0, "JobSubmitted", b"x" * 300, "d" * 64)
    types = ("int8", "float8", "text", "bytea", "text"), ("text", "text", "bytea", "text")
    out = ("events.p.attempt.placed", b"x" * 550, "")
    connection = world.connection
    await connection.execute("create table floor_log (like log including all)")
    await connection.execute(
        "create table floor_out (id bigint generated always as identity primary key, "
        "event text unique, subject text, payload bytea, place text)"
    )
    began = perf_counter()
    for at in range(0, count, lines):
        async with connection.transaction(), connection.cursor() as cursor:
            async with cursor.copy("copy floor_log from stdin (format binary)") as copy:
                copy.set_types(types[0])
                for number in range(at, at + lines):
                    await copy.write_row((number, *log))
            columns = b"copy floor_out (event, subject, payload, place) from stdin (format binary)"
            async with cursor.copy(columns) as copy:
                copy.set_types(types[1])
                for number in range(at, at + lines):
                    await copy.write_row((f"{number:036}", *out))
    return count / (perf_counter() - began)


async def throughput(world: World, scheduler: Server, stub: SchedulerStub) -> list[Row]:
    await world.until("select count(*) >= %s from log where name = 'Heartbeat'", NODES)
    single = await rate(stub.SubmitJob, jobs("one", ONE_AT_A_TIME), IN_FLIGHT)
    before, waited = world.used(scheduler), await world.one("select count(*) from outbox")
    asked = jobs("many", TOGETHER)
    batches = [SubmitJobsRequest(jobs=asked[at : at + BATCH]) for at in range(0, TOGETHER, BATCH)]
    many = BATCH * await rate(stub.SubmitJobs, batches, BATCHES_IN_FLIGHT)
    used = {name: cpu - before[name] for name, cpu in world.used(scheduler).items()}
    logged = await world.one("select max(sequence) from log")
    assert logged >= ONE_AT_A_TIME + TOGETHER + NODES, logged
    left, began = await world.one("select count(*) from outbox"), perf_counter()
    meanwhile = (waited + TOGETHER - left) / TOGETHER * many
    await world.until("select count(*) < %s from outbox", max(1, left - DRAINED))
    drained = min(left, DRAINED) / (perf_counter() - began)
    floor = await copied(world, ONE_AT_A_TIME, BATCH)
    bare = await echo(ONE_AT_A_TIME)
    all_of_it = sum(used.values())
    copy = "the same rows by COPY"
    return [
        row(f"durable jobs/s, SubmitJobs of {BATCH}, {NODES:,} nodes", many, floor, copy, 0),
        row(f"durable jobs/s, SubmitJob, {IN_FLIGHT} under way", single, bare, "an empty echo", 0),
        row("events/s from the outbox meanwhile", meanwhile, many, "jobs/s", 0),
        row("events/s from the outbox afterwards", drained, floor, copy, 0),
        *(
            row(f"us of CPU a job, {name}", 1e6 * cpu / TOGETHER, 1e6 * all_of_it / TOGETHER, "all")
            for name, cpu in used.items()
        ),
    ]


async def answered(stub: SchedulerStub, began: float) -> float:
    """Seconds until a job is told about."""
    await stub.GetJob(GetJobRequest(project="p", job="one-0"), wait_for_ready=True)
    return perf_counter() - began


async def elsewhere(stub: SchedulerStub, fleet: Fleet) -> float:
    """Seconds from a node's last word until its work is placed on another."""
    asked = GetJobRequest(project="p", job="one-0")
    before = (await stub.GetJob(asked)).node
    began = perf_counter()
    del fleet.beats[before]

    async def has_moved() -> bool:
        return (await stub.GetJob(asked)).node not in (before, "")

    await eventually(has_moved, READY_S)
    return perf_counter() - began


async def has_read_along(world: World, standby: Server) -> bool:
    """A standby that has just started has not."""
    written = await world.one("select max(sequence) from scheduler.log")
    port = standby.program.environment["LEPTONIC_SCHEDULER_HTTP_PORT"]
    async with httpx.AsyncClient() as client:
        told = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    return bool(float(told.partition("\n" + FOLLOWED)[2].split("\n")[0] or 0) >= written)


async def measure() -> list[Row]:
    async with world() as one, Fleet(one.nats, NODES, CPU_MILLI) as fleet:
        first, second, third = (one.scheduler() for _ in range(3))
        async with running(first) as stub:
            found = await throughput(one, first, stub)
            moved = await elsewhere(stub, fleet)
            async with running(second) as standby:
                await eventually(lambda: has_read_along(one, second), READY_S)
                began = perf_counter()
                await first.kill()
                failover = await answered(standby, began)
                await second.kill()
        began = perf_counter()
        async with running(third) as stub:
            restart = await answered(stub, began)
            known = await one.one("select max(number) from job")
    return [
        *found,
        row("dead node to its work placed elsewhere, s", moved, 5.0, TARGET),
        row(f"kill -9 to a standby's answer, {known:,} jobs, s", failover, 2.0, TARGET),
        row(f"start to answer after kill -9, {known:,} jobs, s", restart, 2.0, TARGET),
    ]


def rows(_: Path) -> list[Row]:
    return uvloop.run(measure())


if __name__ == "__main__":
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    show(uvloop.run(measure()))
