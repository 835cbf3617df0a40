"""Faults done to a Compose project: the engine's own kill, pause and disconnect."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from libs.objectstore import ObjectStore
from tests.chaos.controls import Ground
from tests.running import READY_S, ROOT, Stack, running_stack, until

LABEL = "com.docker.compose"
FILES = f"compose.yaml{os.pathsep}tests/chaos/small_volume.yaml"
BACK_S = 2 * READY_S
"""A health check is asked every few seconds."""
FILL = "dd if=/dev/zero of=/data/filler bs=1M 2>/dev/null; df /data | grep -q '100%'"
STATE = "{{.State.Pid}} {{.State.Running}} {{if .State.Health}}{{.State.Health.Status}}{{end}}"


class ContainerControls:
    """`tests.chaos.controls.Controls` on the containers of one project."""

    kind = "compose"

    def __init__(self, project: str, can_fill: bool) -> None:
        self.project = project
        self.network = f"{project}_default"
        self.can_fill = can_fill
        self.ended: dict[str, str] = {}
        """Victim -> the pid that was told to end."""

    def container(self, victim: str) -> str:
        """Its id, whatever it does now."""
        labels = (f"{LABEL}.project={self.project}", f"{LABEL}.service={victim}")
        filters = [text for label in labels for text in ("--filter", f"label={label}")]
        (found,) = docker("ps", "--all", "--quiet", *filters).split()
        return found

    def state(self, victim: str) -> tuple[str, bool]:
        """(pid, whether it runs and is healthy)."""
        words = docker("inspect", "--format", STATE, self.container(victim)).split()
        return words[0], words[1] == "true" and words[2:] in ([], ["healthy"])

    async def kill(self, victim: str) -> None:
        """Not `docker kill`: what that ends, the engine does not start again."""
        pid = await self.pid(victim)
        self.ended[victim] = pid
        os.kill(int(pid), signal.SIGKILL)

    async def pid(self, victim: str) -> str:
        async def alive() -> str | None:
            pid, _ = await asyncio.to_thread(self.state, victim)
            return pid if pid not in ("0", self.ended.get(victim)) else None

        found: str = await until(alive, f"{victim} does not run", READY_S)
        return found

    async def restart(self, victim: str) -> None:
        self.ended[victim] = await self.pid(victim)
        await self.engine("restart", "--time", "15", self.container(victim))

    async def pause(self, victim: str) -> None:
        await self.pid(victim)
        await self.engine("pause", self.container(victim))

    async def resume(self, victim: str) -> None:
        await self.engine("unpause", self.container(victim))

    async def disconnect(self, victim: str) -> None:
        await self.engine("network", "disconnect", self.network, self.container(victim))

    async def connect(self, victim: str) -> None:
        """Under its name: the engine forgets it."""
        name = ("--alias", victim)
        await self.engine("network", "connect", *name, self.network, self.container(victim))

    async def fill(self) -> None:
        await self.engine("exec", self.container("filler"), "sh", "-c", FILL)

    async def unfill(self) -> None:
        await self.engine("exec", self.container("filler"), "rm", "/data/filler")

    async def back(self, victim: str) -> None:
        async def ready() -> bool:
            pid, ready = await asyncio.to_thread(self.state, victim)
            return ready and pid != self.ended.get(victim)

        await until(ready, f"{victim} is not back", BACK_S)

    async def engine(self, *arguments: str) -> None:
        await asyncio.to_thread(docker, *arguments)


def docker(*arguments: str) -> str:
    """Raises `AssertionError` with what it said."""
    done = subprocess.run(
        ["docker", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"docker {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@contextlib.asynccontextmanager
async def running(data_dir: Path) -> AsyncIterator[Ground]:
    """A project of its own, with a small S3 volume."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSE_FILE", FILES)
        async with running_stack(data_dir, "compose") as stack:
            controls = ContainerControls(os.environ["COMPOSE_PROJECT_NAME"], can_fill=True)
            yield ground_of(stack, controls)


def ground_of(stack: Stack, controls: ContainerControls) -> Ground:
    keys = stack.state["secrets"]
    objects = ObjectStore(
        stack.endpoint("s3"), keys["s3_access_key"], keys["s3_secret_key"], "leptonic"
    )
    return Ground(
        stack, controls, objects, stack.endpoint("nats"), stack.endpoint("inference_grpc")
    )
