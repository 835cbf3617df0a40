"""A rolling restart: of processes by their supervisor, or of containers behind the balancer of
compose.replicas.yaml."""

import subprocess
import time
from pathlib import Path
from typing import Any

from leptonic import compose, launch
from leptonic.errors import Error

GATEWAY = "gateway"
LAYER = "COMPOSE_FILE=compose.yaml:compose.replicas.yaml"
READY_S = 180.0
STOP_S = 60
"""More than `stop_grace_period`: a container answers what it was asked before it ends."""


def roll(services: tuple[str, ...], data_dir: Path | None) -> dict[str, Any]:
    """Replaces services, all of them unless named, each start-first. Raises `Error`.

    Without a folder: the containers.
    """
    started = time.monotonic()
    wanted = services or compose.SERVICES
    done = roll_containers(wanted) if data_dir is None else launch.roll(data_dir, wanted)
    return {"rolled": done, "seconds": round(time.monotonic() - started, 2)}


def roll_containers(services: tuple[str, ...]) -> list[str]:
    if GATEWAY not in {one["Service"] for one in compose.containers()}:
        raise Error(f"no gateway runs to hand over from one container to the next: set {LAYER}")
    for service in services:
        replace(service)
    return list(services)


def replace(service: str) -> None:
    """A new container, and the old ones go; where it is not healthy it goes and they stay."""
    old = containers_of(service)
    if not old:
        raise Error(f"no container of {service} runs")
    scale = ("--scale", f"{service}={len(old) + 1}")
    wait = ("--wait", "--wait-timeout", str(int(READY_S)))
    line = ("up", "--detach", "--no-deps", "--no-recreate", *wait, *scale, service)
    try:
        compose.docker(*line, timeout_s=READY_S + compose.CALL_S)
    except Error as error:
        remove(containers_of(service) - old)
        raise Error(f"{service} was not replaced and goes on as it was: {error}") from None
    remove(old)


def containers_of(service: str) -> set[str]:
    """Their ids, also of those that do not run."""
    return set(compose.docker("ps", "--all", "--quiet", service).split())


def remove(ids: set[str]) -> None:
    for one in ids:
        for line in (("stop", "--time", str(STOP_S), one), ("rm", "--force", one)):
            done = subprocess.run(["docker", *line], capture_output=True, text=True, check=False)
            if done.returncode:
                raise Error(f"`docker {' '.join(line)}`: {done.stderr.strip()}")
