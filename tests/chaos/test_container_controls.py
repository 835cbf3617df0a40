"""The faults, done to two containers that do nothing else."""

import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stack.testing import eventually
from tests.chaos.container_controls import ContainerControls, docker

pytestmark = pytest.mark.compose

PROJECT = """
services:
  {name}:
    image: leptonic/collector:0.1.0
    init: true
    restart: unless-stopped
    stop_grace_period: 1s
    user: root
    command: {command}
    healthcheck: {{disable: true}}
    volumes: ["s3:/data"]
"""
VOLUME = """
volumes:
  s3: {driver_opts: {type: tmpfs, device: tmpfs, o: "size=4m"}}
"""
ASK = "import urllib.request as r; r.urlopen('http://nats:8080/there', timeout=2)"
EVENTUALLY_S = 60.0


@pytest.fixture
def controls(tmp_path: Path) -> Iterator[ContainerControls]:
    """`nats` serves its volume over HTTP, `filler` asks it and holds the volume."""
    serves = PROJECT.format(name="nats", command="[python, -m, http.server, '8080', -d, /data]")
    holds = PROJECT.format(name="filler", command="[sleep, infinity]").partition("services:\n")[2]
    file = tmp_path / "compose.yaml"
    file.write_text(serves + holds + VOLUME)
    project = f"leptonic-test-{secrets.token_hex(3)}"
    line = ("compose", "-f", str(file), "-p", project)
    docker(*line, "up", "--detach")
    try:
        made = ContainerControls(project, can_fill=True)
        docker("exec", made.container("filler"), "touch", "/data/there")
        yield made
    finally:
        docker(*line, "down", "--volumes", "--timeout", "1")


def hears(controls: ContainerControls) -> bool:
    """Whether the one container reaches the other by its name, and finds what was stored."""
    line = ["docker", "exec", controls.container("filler"), "python", "-c", ASK]
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


async def test_what_is_killed_or_restarted_comes_back_with_its_volume(
    controls: ContainerControls,
) -> None:
    for end in (controls.kill, controls.restart):
        before = await controls.pid("nats")
        await end("nats")
        await controls.back("nats")
        assert await controls.pid("nats") != before
        await eventually(lambda: hears(controls), EVENTUALLY_S)


async def test_what_is_paused_or_cut_off_is_not_heard_until_it_is_back(
    controls: ContainerControls,
) -> None:
    await eventually(lambda: hears(controls), EVENTUALLY_S)
    for begin, end in (
        (controls.pause, controls.resume),
        (controls.disconnect, controls.connect),
    ):
        await begin("nats")
        assert not hears(controls)
        await end("nats")
        await controls.back("nats")
        await eventually(lambda: hears(controls), EVENTUALLY_S)


async def test_a_full_volume_takes_nothing_until_there_is_room(
    controls: ContainerControls,
) -> None:
    write = ("exec", controls.container("nats"), "dd", "if=/dev/zero", "of=/data/more", "count=1")
    await controls.fill()
    with pytest.raises(AssertionError, match="No space left"):
        docker(*write)
    await controls.unfill()
    docker(*write)
