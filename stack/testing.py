"""Fixtures for tests on real servers; the root conftest.py offers them to every test.

The servers start once a session, in a temporary folder on free ports; every test gets a fresh
database, a fresh bucket and empty streams.
"""

import asyncio
import contextlib
import secrets
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from inspect import isawaitable
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from libs.bus import STREAMS, jetstream
from libs.bus.jetstream import JetStreamBus
from libs.objectstore import ObjectStore
from stack import ports, process, servers

EVENTUALLY_S = 10.0
POLL_S = 0.02
ACCESS_KEY = "testing"
PASSWORD = "testing-only"  # noqa: S105 - of a server on loopback that lives for a test


async def eventually(
    check: Callable[[], Any | Awaitable[Any]], timeout_s: float = EVENTUALLY_S
) -> Any:
    """The first true value of `check()`; an AssertionError in it counts as not yet.

    Fails with the last value, or the last AssertionError, after `timeout_s`.
    """
    deadline = monotonic() + timeout_s
    while True:
        failure: AssertionError | None = None
        value = None
        try:
            found = check()
            value = await found if isawaitable(found) else found
        except AssertionError as error:
            failure = error
        if value:
            return value
        if monotonic() > deadline:
            raise failure or AssertionError(f"still {value!r} after {timeout_s} s")
        await asyncio.sleep(POLL_S)


@dataclass
class Server:
    """A program a test may kill and start again."""

    program: process.Program
    log: Path
    running: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self.running = await process.start(self.program, self.log)
        await process.until_ready(self.program, self.running, self.log)

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.running is not None
        self.running.kill()
        await process.until_exit(self.running)

    async def stop(self) -> None:
        if self.running is not None:
            await process.stop(self.program, self.running)


@contextlib.contextmanager
def serving(program: process.Program, folder: Path) -> Iterator[Server]:
    """Runs a program for as long as the block lasts, across event loops."""
    server = Server(program, folder / f"{program.name}.log")
    try:
        asyncio.run(server.start())
        yield server
    finally:
        asyncio.run(server.stop())


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL. Default `sync_interval`: what tests check is not the disk."""
    folder = tmp_path_factory.mktemp("nats")
    (port,) = ports.free(1)
    with serving(servers.nats(folder / "data", port, sync="2m"), folder):
        yield servers.nats_url(port)


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Its port."""
    folder = tmp_path_factory.mktemp("postgres")
    (port,) = ports.free(1)
    with serving(servers.postgres(folder / "data", port, PASSWORD), folder):
        yield port


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its host:port."""
    folder = tmp_path_factory.mktemp("s3")
    taken = ports.choose("auto", {}, ports.S3_PORTS)
    with serving(servers.s3(folder / "data", taken, ACCESS_KEY, PASSWORD), folder):
        yield f"{ports.LOOPBACK}:{taken['s3']}"


@pytest_asyncio.fixture
async def nats_url(nats_server: str) -> str:
    """A NATS server whose streams, if there are any, are empty and without consumers."""
    async with jetstream.connect(nats_server) as connected:
        for stream in STREAMS:
            await connected.context.delete_stream(stream.name)
    return nats_server


@pytest_asyncio.fixture
async def bus(nats_url: str) -> AsyncIterator[JetStreamBus]:
    """Connected, with empty streams."""
    async with jetstream.connect(nats_url, name="test") as connected:
        yield connected


@pytest.fixture
def postgres_dsn(postgres_server: int) -> Iterator[str]:
    """A fresh database, dropped after the test."""
    name = f"test_{secrets.token_hex(6)}"
    admin = servers.postgres_dsn(postgres_server, PASSWORD)
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"create database {name}".encode())
        yield servers.postgres_dsn(postgres_server, PASSWORD, name)
        connection.execute(f"drop database {name} with (force)".encode())


@pytest_asyncio.fixture
async def objects(s3_server: str) -> AsyncIterator[ObjectStore]:
    """A fresh bucket; `.bucket` and the session's keys are what a service needs to reach it.

    It goes after the test: every bucket holds a volume, and the server has some 70 of them.
    """
    store = ObjectStore(s3_server, ACCESS_KEY, PASSWORD, f"test-{secrets.token_hex(6)}")
    await store.create_bucket()
    yield store
    for key in await store.list(""):
        await store.delete(key)
    await store.call(store.client.remove_bucket, store.bucket)


@pytest.fixture
def reaching_servers(
    nats_url: str, postgres_dsn: str, s3_server: str, objects: ObjectStore
) -> dict[str, str]:
    """What a service's process is told of them."""
    return {
        "LEPTONIC_NATS_URL": nats_url,
        "LEPTONIC_POSTGRES_DSN": postgres_dsn,
        "LEPTONIC_S3_ENDPOINT": s3_server,
        "LEPTONIC_S3_ACCESS_KEY": ACCESS_KEY,
        "LEPTONIC_S3_SECRET_KEY": PASSWORD,
        "LEPTONIC_S3_BUCKET": objects.bucket,
    }
