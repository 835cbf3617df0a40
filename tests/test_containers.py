"""The containers at rest: few, small, healthy, and close-mouthed."""

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import nats
import nats.errors
import pytest
from leptonic import compose
from leptonic.errors import Error

from libs.settings import SERVICES
from tests.running import compose_project, until
from tests.test_compose_file import CORE_MAX

pytestmark = [pytest.mark.slow, pytest.mark.compose]
MIB = 1 << 20
AT_REST_BYTES_MAX = 3 << 30
WARM_S = 120.0
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
HELD = re.compile(r"([\d.]+)(B|KiB|MiB|GiB)")
SECRETS = compose.TOKEN.rpartition("/")[0]
MODES = "%m %p\\n"
TOKEN_CHARACTERS_MIN = 32


def docker(*arguments: str) -> str:
    return subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def project() -> Iterator[str]:
    with compose_project() as name:
        compose.up()
        yield name


def inspected() -> dict[str, Any]:
    """Service -> what Docker says of its container."""
    running = compose.containers()
    found = json.loads(docker("inspect", *(one["ID"] for one in running)))
    return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in found}


def secret_mounts(container: dict[str, Any]) -> list[dict[str, Any]]:
    return [m for m in container["Mounts"] if "secrets" in m.get("Name", "")]


def held_bytes(container: str) -> int:
    used = docker("stats", "--no-stream", "--format", "{{.MemUsage}}", container)
    found = HELD.match(used)
    assert found, used
    return int(float(found[1]) * UNITS[found[2]])


async def trainer_is_warm() -> bool:
    """Its workers have imported torch: that is what it holds while nothing happens."""
    async with httpx.AsyncClient() as http:
        answer = await http.get(compose.locate().endpoint("scheduler") + "/v1/nodes")
    nodes = {one["node"]: one for one in answer.json()["nodes"]}
    return "trainer" in nodes and nodes["trainer"]["health"] == "Healthy"


async def test_the_core_is_small_at_rest(project: str, capsys: pytest.CaptureFixture[str]) -> None:
    await until(trainer_is_warm, "the trainer is not warm", WARM_S)
    running = inspected()
    assert len(running) <= CORE_MAX
    assert {one["State"]["Health"]["Status"] for one in running.values()} == {"healthy"}
    held = {name: held_bytes(one["Id"]) for name, one in running.items()}
    with capsys.disabled():
        for name, one in sorted(running.items()):
            size = int(docker("image", "inspect", "--format", "{{.Size}}", one["Image"]))
            print(f"| {name} | {size / 1e6:.0f} MB | {held[name] / MIB:.0f} MiB |")  # noqa: T201 - the table of docs/containers.md
        print(f"| in all | | {sum(held.values()) / MIB:.0f} MiB |")  # noqa: T201 - as above
    assert sum(held.values()) < AT_REST_BYTES_MAX


def test_no_secret_is_readable_by_others_or_in_the_open(project: str) -> None:
    running = inspected()
    modes = compose.docker("exec", "-T", "ingest", "find", SECRETS, "-type", "f", "-printf", MODES)
    assert modes
    assert {line.split()[0] for line in modes.splitlines()} == {"600"}
    for service in ("nats", "postgres", "s3"):
        (mount,) = secret_mounts(running[service])
        there = compose.docker("exec", "-T", service, "ls", "-ln", mount["Destination"])
        assert {line[:10] for line in there.splitlines()[1:]} == {"-rw-------"}
    token = compose.docker("exec", "-T", "ingest", "cat", compose.TOKEN)
    assert len(token) >= TOKEN_CHARACTERS_MIN
    told = json.dumps(running) + compose.docker("logs", "--no-color")
    assert token not in told


def test_each_server_sees_only_its_own_secrets(project: str) -> None:
    mounted = {
        service: {m["Name"].removeprefix(f"{project}_") for m in secret_mounts(one)}
        for service, one in inspected().items()
    }
    services = {service: {"secrets"} for service in SERVICES}
    servers = {service: {f"secrets-{service}"} for service in ("nats", "postgres", "s3")}
    assert mounted == {**services, **servers, "collector": set()}


def test_ours_run_as_nobody_on_a_file_system_they_cannot_change(project: str) -> None:
    for service in (*SERVICES, "collector"):
        assert compose.docker("exec", "-T", service, "id", "-u").strip() == "10001"
        with pytest.raises(Error, match="Read-only file system"):
            compose.docker("exec", "-T", service, "touch", "/app/here")


async def test_a_publisher_without_the_token_is_turned_away(project: str) -> None:
    address = compose.locate().endpoint("nats").rpartition("@")[2]
    with pytest.raises(nats.errors.Error, match=r"(?i)authorization"):
        await nats.connect(f"nats://{address}", allow_reconnect=False)


def test_a_restart_keeps_secrets_and_data(project: str) -> None:
    token = compose.docker("exec", "-T", "ingest", "cat", compose.TOKEN)
    compose.down()
    compose.up()
    assert compose.docker("exec", "-T", "ingest", "cat", compose.TOKEN) == token
