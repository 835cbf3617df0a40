"""An edge site and its hub: what the site acked reaches the hub once, whatever is killed."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from libs.bus import RECORDS, TRACE_HEADER, Delivery, PublishFailed, ReadFailed, jetstream
from libs.bus.jetstream import JetStreamBus
from stack import ports, servers
from stack.process import Program
from stack.testing import PASSWORD, Server, eventually

CONF = Path(__file__).parents[2] / "deploy" / "compose"
SUBJECT = "records.default.digits"
RECORDS_MAX = 2_000
BATCH = 50
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
RECOVERY_S = 60.0
HELD_MIB_MAX = 2


@dataclass
class Site:
    url: str
    """Where publishers connect."""
    leaf: Server
    forwarder: Server
    hub: Server
    hub_url: str


async def start(*servers: Server) -> None:
    for server in servers:
        await server.start()


@pytest.fixture
def sites(tmp_path: Path) -> list[Site]:
    """Two, stopped, of one hub."""
    port, leaf_port = ports.free(2)
    secrets = {
        "token.conf": "",
        "leaf.conf": f"authorization {{ user: edge, password: {PASSWORD} }}",
    }
    doors = {4222: port, 7422: leaf_port}
    hub = server(nats(tmp_path / "hub", CONF / "nats.conf", secrets, doors), tmp_path)
    made = []
    for name in ("first", "second"):
        url, *own = edge(tmp_path / name, leaf_port)
        leaf, forwarder = (server(one, tmp_path / name) for one in own)
        made.append(Site(url, leaf, forwarder, hub, servers.nats_url(port)))
    return made


@pytest_asyncio.fixture
async def site(sites: list[Site]) -> AsyncIterator[Site]:
    one, other = sites
    try:
        yield one
    finally:
        for each in (one.forwarder, one.leaf, other.forwarder, other.leaf, one.hub):
            await each.stop()


def server(program: Program, folder: Path) -> Server:
    return Server(program, folder / f"{program.name}.log")


def edge(folder: Path, hub_port: int) -> tuple[str, Program, Program]:
    """Where its publishers connect, its NATS and its forwarder."""
    port, health = ports.free(2)
    url = f"nats://site:{PASSWORD}@{ports.LOOPBACK}:{port}"
    secret = f"SITE_PASSWORD: {PASSWORD}\nUPLINK_PASSWORD: {PASSWORD}\n"
    secret += f'HUB: "nats-leaf://edge:{PASSWORD}@{ports.LOOPBACK}:{hub_port}"\n'
    options = {
        "LEPTONIC_NATS_URL": url,
        "LEPTONIC_EDGE_HUB_URL": url.replace("site:", "uplink:"),
        "LEPTONIC_EDGE_SITE": folder.name,
        "LEPTONIC_EDGE_HTTP_PORT": str(health),
        "LEPTONIC_EDGE_HELD_MIB_MAX": str(HELD_MIB_MAX),
    }
    forwarder = Program(
        name="forwarder",
        command=(sys.executable, "-m", "stack.edge"),
        environment=options,
        ready=lambda: servers.answers(health, "/health/ready"),
    )
    conf = CONF / "nats-edge.conf"
    return url, nats(folder / "nats", conf, {"site.conf": secret}, {4222: port}), forwarder


def nats(folder: Path, conf: Path, secrets: Mapping[str, str], port: Mapping[int, int]) -> Program:
    """A server as its container runs it, but on loopback, on other ports and without monitoring."""
    text = conf.read_text().replace("/data", f"{folder}/data")
    text = text.replace('http: "0.0.0.0:8222"\n', "")
    for inside, outside in port.items():
        text = text.replace(f"0.0.0.0:{inside}", f"{ports.LOOPBACK}:{outside}")
    (folder / "secrets").mkdir(parents=True)
    for name, secret in secrets.items():
        (folder / "secrets" / name).write_text(secret)
    (folder / "nats.conf").write_text(text)

    async def ready() -> bool:
        return (await servers.first_line(port[4222])).startswith(b"INFO ")

    command = (str(servers.SCRIPTS / "nats-server"), "-c", str(folder / "nats.conf"))
    return Program(name=folder.name, command=command, ready=ready)


async def publish(bus: JetStreamBus, numbers: range) -> None:
    """A message a record, under the publisher's id."""
    for n in numbers:
        await bus.publish(SUBJECT, b'{"n":%d}' % n, id=f"n-{n}")


async def publish_batches(bus: JetStreamBus, numbers: range) -> None:
    """`BATCH` records a message, without an id: as any NATS client may."""
    for first in numbers[::BATCH]:
        batch = msgspec.json.encode([{"n": n} for n in range(first, first + BATCH)])
        await bus.context.publish(
            SUBJECT, batch, headers={TRACE_HEADER: TRACE, "ce-id": f"{first}"}
        )


async def held(local: JetStreamBus) -> int:
    """Messages the hub has not acked."""
    return int((await local.context.stream_info("EDGE")).state.messages)


async def nothing_held(local: JetStreamBus) -> bool:
    return await held(local) == 0


async def arrived(hub: JetStreamBus) -> list[Delivery]:
    with contextlib.suppress(ReadFailed):  # it may just be away
        return await hub.read(RECORDS, "records.>", 0, 2 * RECORDS_MAX)
    return []


def numbers_in(deliveries: list[Delivery]) -> list[int]:
    decoded = [msgspec.json.decode(one.payload) for one in deliveries]
    return sorted(
        one["n"] for batch in decoded for one in (batch if isinstance(batch, list) else [batch])
    )


async def test_what_the_site_took_while_the_hub_was_away_arrives_once(site: Site) -> None:
    await start(site.hub, site.leaf, site.forwarder)
    async with jetstream.connect(site.hub_url), jetstream.connect(site.url, streams=()) as local:
        await publish_batches(local, range(BATCH))
        await eventually(lambda: nothing_held(local))
        await site.hub.stop()
        await publish_batches(local, range(BATCH, RECORDS_MAX))
        assert await held(local) == RECORDS_MAX // BATCH - 1
        await site.hub.start()
        await eventually(lambda: nothing_held(local), RECOVERY_S)
    async with jetstream.connect(site.hub_url) as hub:
        came = await arrived(hub)
    assert numbers_in(came) == list(range(RECORDS_MAX))
    assert {one.subject for one in came} == {SUBJECT}
    assert {one.headers[TRACE_HEADER] for one in came} == {TRACE}
    assert sorted(int(one.headers["ce-id"]) for one in came) == list(range(0, RECORDS_MAX, BATCH))


async def test_whatever_is_killed_while_records_flow_each_arrives_once(site: Site) -> None:
    await start(site.hub, site.leaf, site.forwarder)
    victims = (site.forwarder, site.leaf, site.hub, site.forwarder)
    share = RECORDS_MAX // len(victims)
    async with (
        jetstream.connect(site.hub_url) as hub,
        jetstream.connect(site.url, streams=()) as local,
    ):

        async def more_arrived() -> bool:
            return len(await arrived(hub)) > first

        for turn, victim in enumerate(victims):
            first = turn * share
            publishing = asyncio.create_task(publish(local, range(first, first + share)))
            await eventually(more_arrived, RECOVERY_S)
            await victim.kill()
            await victim.start()
            await publishing
        await eventually(lambda: nothing_held(local), RECOVERY_S)
        assert numbers_in(await arrived(hub)) == list(range(RECORDS_MAX))


async def test_two_sites_deliver_side_by_side(site: Site, sites: list[Site]) -> None:
    """What one did not name, nobody mistakes for another's."""
    await start(site.hub)
    async with jetstream.connect(site.hub_url) as hub:
        for one in sites:
            await start(one.leaf, one.forwarder)
        for one in sites:
            async with jetstream.connect(one.url, streams=()) as local:
                await publish_batches(local, range(RECORDS_MAX))
                await eventually(lambda local=local: nothing_held(local), RECOVERY_S)  # type: ignore[misc]
        came = numbers_in(await arrived(hub))
        assert came == sorted([*range(RECORDS_MAX), *range(RECORDS_MAX)])
    # Two servers of one name would take turns.
    assert "Leafnode connection closed" not in site.hub.log.read_text()


async def test_a_full_site_refuses_and_loses_nothing(site: Site) -> None:
    await start(site.leaf, site.forwarder)
    async with jetstream.connect(site.url, streams=()) as local:
        taken = await publish_until_refused(local)
        assert await held(local) == taken == (HELD_MIB_MAX << 20) // 100_000
        await start(site.hub)
        async with jetstream.connect(site.hub_url) as hub:
            await eventually(lambda: nothing_held(local), RECOVERY_S)
            await publish(local, range(taken, taken + 1))
            await eventually(lambda: nothing_held(local), RECOVERY_S)
            assert numbers_in(await arrived(hub)) == list(range(taken + 1))


async def publish_until_refused(local: JetStreamBus) -> int:
    """How many were taken."""
    taken = 0
    with contextlib.suppress(PublishFailed):
        while taken < RECORDS_MAX:
            payload = msgspec.json.encode({"n": taken, "padding": "x" * 100_000})
            await local.publish(SUBJECT, payload, id=f"n-{taken}")
            taken += 1
    return taken
