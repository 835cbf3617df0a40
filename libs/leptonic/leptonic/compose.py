"""A stack of containers: where Compose published its doors, and what it says of each container."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from leptonic import launch
from leptonic.errors import Error
from leptonic.stackfile import Stack

FILE = "compose.yaml"
UP_S = 600.0
"""The images may have to be built first."""
CALL_S = 60.0
TAIL_LINES = 5
TOKEN = "/run/secrets/leptonic/LEPTONIC_NATS_TOKEN"  # noqa: S105 - where it lies, not what it is
DOORS = {
    "nats": ("nats://{token}@", 4222),
    "ingest": ("http://", 8010),
    "preprocess": ("http://", 8011),
    "trainer": ("http://", 8012),
    "registry": ("http://", 8013),
    "scheduler": ("http://", 8014),
    "inference_http": ("http://", 8000),
    "inference_grpc": ("", 8001),
    "ingest_grpc": ("", 9010),
    "preprocess_grpc": ("", 9011),
    "trainer_grpc": ("", 9012),
    "registry_grpc": ("", 9013),
    "scheduler_grpc": ("", 9014),
    "inference_metrics": ("http://", 8002),
    "inference_api": ("http://", 8015),
    "traces": ("http://", 4318),
    "otlp": ("", 4317),
    "s3": ("", 9000),
}
"""Endpoint -> how its address begins, and the port inside, which no two containers share."""
SERVICES = ("ingest", "preprocess", "trainer", "registry", "inference", "scheduler")


def folder() -> Path:
    """Where compose.yaml lies: here, else in the checkout the platform is installed from."""
    return Path.cwd() if Path(FILE).exists() else launch.platform_root()


def docker(*arguments: str, timeout_s: float = CALL_S) -> str:
    """`docker compose <arguments>` -> stdout. Raises `Error` with what it said."""
    line = ["docker", "compose", *arguments]
    try:
        done = subprocess.run(
            line, cwd=folder(), capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        raise Error("there is no docker here", code="NOT_RUNNING") from None
    except subprocess.TimeoutExpired:
        raise Error(f"`{' '.join(line)}` took over {timeout_s:.0f} s") from None
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-TAIL_LINES:])
        raise Error(f"`{' '.join(line)}` ended with {done.returncode}: {said}")
    return done.stdout


def containers() -> list[dict[str, Any]]:
    """What runs of the project, as `docker compose ps` tells it."""
    return [json.loads(line) for line in docker("ps", "--format", "json").splitlines()]


def locate() -> Stack:
    """The project that runs. Raises `Error` when none does."""
    running = containers()
    if not running:
        problem = f"no containers of {folder() / FILE} run"
        raise Error(f"{problem}: start them with `docker compose up -d --wait`", code="NOT_RUNNING")
    return Stack(
        source=str(folder() / FILE),
        endpoints=endpoints(published(running), token_of(running)),
        started_at=min(one["CreatedAt"] for one in running),
        processes={one["Name"]: process_of(one) for one in running},
        options="--stack compose",
    )


def endpoints(addresses: Mapping[int, str], token: str) -> dict[str, str]:
    """Name -> address, for every door that is published."""
    return {
        name: scheme.format(token=token) + addresses[port]
        for name, (scheme, port) in DOORS.items()
        if port in addresses
    }


def published(running: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Port inside a container -> host:port outside."""
    return {
        door["TargetPort"]: f"{door['URL']}:{door['PublishedPort']}"
        for one in running
        for door in one["Publishers"] or ()
        if door["PublishedPort"]
    }


def process_of(container: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "pid": container["ID"],
        "restarts": None,
        "ready": container["State"] == "running" and container["Health"] in ("healthy", ""),
    }


def token_of(running: Sequence[Mapping[str, Any]]) -> str:
    """What a publisher shows to NATS; "" while no service runs that could tell it."""
    telling = [one["Service"] for one in running if one["Service"] in SERVICES]
    for service in telling:
        with contextlib.suppress(Error):
            return docker("exec", "-T", service, "cat", TOKEN).strip()
    return ""


def up() -> float:
    """Starts what does not run, until every container is healthy; seconds it took."""
    started = time.monotonic()
    docker("up", "--detach", "--wait", "--quiet-pull", timeout_s=UP_S)
    return time.monotonic() - started


def down() -> float:
    """Stops and removes the containers; volumes stay. Seconds it took."""
    started = time.monotonic()
    docker("down", timeout_s=UP_S)
    return time.monotonic() - started


@contextlib.contextmanager
def running(keep: bool) -> Iterator[Stack]:
    """The project's stack: one that runs stays, one started here is stopped at the end."""
    ran = bool(containers())
    up()
    try:
        yield locate()
    finally:
        if not ran and not keep:
            down()
