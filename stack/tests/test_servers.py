"""What was acked is there after SIGKILL, on every server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from minio.error import S3Error

from libs.bus import RECORDS, jetstream
from libs.objectstore import ObjectStore, Unavailable
from stack import ports, servers
from stack.testing import ACCESS_KEY, PASSWORD, Server, eventually, serving


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[tuple[Server, str]]:
    (port,) = ports.free(1)
    with serving(servers.nats(tmp_path / "nats", port), tmp_path) as server:
        yield server, servers.nats_url(port)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[tuple[Server, str]]:
    (port,) = ports.free(1)
    with serving(servers.postgres(tmp_path / "postgres", port, PASSWORD), tmp_path) as server:
        yield server, servers.postgres_dsn(port, PASSWORD)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[tuple[Server, ObjectStore]]:
    taken = ports.choose("auto", {}, ports.S3_PORTS)
    with serving(servers.s3(tmp_path / "s3", taken, ACCESS_KEY, PASSWORD), tmp_path) as server:
        address = f"{ports.LOOPBACK}:{taken['s3']}"
        yield server, ObjectStore(address, ACCESS_KEY, PASSWORD, "kept")


async def test_nats_keeps_what_it_acked(nats: tuple[Server, str]) -> None:
    server, url = nats
    async with jetstream.connect(url) as bus:
        for n in range(100):
            assert await bus.publish("records.p.d", b"%d" % n, id=str(n)) == n + 1
        await server.kill()
    await server.start()
    async with jetstream.connect(url) as bus:
        subscription = await bus.subscribe(RECORDS, "reader", ["records.>"])
        kept = await subscription.fetch(200, 2)
        assert [int(one.payload) for one in kept] == list(range(100))
        assert await bus.publish("records.p.d", b"again", id="99") == 100, "stored twice"


async def test_postgres_keeps_what_was_committed(postgres: tuple[Server, str]) -> None:
    server, dsn = postgres
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("create table kept as select generate_series(1, 1000) as n")
        await server.kill()
    await server.start()
    with psycopg.connect(dsn) as connection:
        assert connection.execute("select sum(n) from kept").fetchone() == (500500,)


async def test_postgres_starts_although_its_old_pid_is_anothers(
    postgres: tuple[Server, str], tmp_path: Path
) -> None:
    server, _ = postgres
    await server.kill()
    lock = tmp_path / "postgres" / "postmaster.pid"
    _, _, rest = lock.read_text().partition("\n")
    lock.write_text(f"1\n{rest}")
    await server.start()


async def test_postgres_waits_for_the_children_of_a_killed_one(
    postgres: tuple[Server, str],
) -> None:
    """One that is stopped stands for one that gets no processor for a while."""
    server, _ = postgres
    assert server.running is not None
    slow = psutil.Process(server.running.pid).children()[0]
    slow.suspend()
    await server.kill()
    asyncio.get_running_loop().call_later(0.3, slow.resume)
    await server.start()


async def test_postgres_asks_for_the_password(postgres: tuple[Server, str]) -> None:
    _, dsn = postgres
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(dsn.replace(PASSWORD, "guessed"))


async def test_s3_keeps_what_it_took(s3: tuple[Server, ObjectStore]) -> None:
    server, objects = s3
    await objects.create_bucket()
    for n in range(20):
        await objects.put(f"part/{n:02}", b"%d" % n * 5000)
    await server.kill()
    await server.start()
    assert len(await objects.list("part/")) == 20
    for n in range(20):
        assert await got(objects, f"part/{n:02}") == b"%d" % n * 5000


async def got(objects: ObjectStore, key: str) -> bytes:
    """Just after its start the server may say that it is not available yet (4.48)."""
    found = b""

    async def is_there() -> bool:
        nonlocal found
        try:
            found = await objects.get(key)
        except Unavailable:
            return False
        return True

    await eventually(is_there)
    return found


async def test_s3_does_not_delete_a_bucket_that_holds_something(
    s3: tuple[Server, ObjectStore],
) -> None:
    _, objects = s3
    await objects.create_bucket()
    await objects.put("kept", b"1")
    with pytest.raises(S3Error, match="BucketNotEmpty"):
        await objects.call(objects.client.remove_bucket, objects.bucket)


async def test_s3_asks_for_the_keys(s3: tuple[Server, ObjectStore]) -> None:
    _, objects = s3
    stranger = ObjectStore(objects.client._base_url.host, ACCESS_KEY, "guessed", "kept")
    with pytest.raises(S3Error, match="AccessDenied"):
        await stranger.create_bucket()
