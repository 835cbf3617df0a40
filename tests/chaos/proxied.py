"""The embedded stack with a cable between every two of its programs.

`python -m tests.chaos.proxied --data-dir <folder> --ports auto`; `<folder>/network.json` tells the
cables. All else is the stack as users run it.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from libs.settings import SERVICES
from stack import app, ports, servers
from stack.ports import LOOPBACK
from stack.process import Program
from stack.state import Secrets
from tests.chaos.proxy import STRANGER, Link, Plan

FILE = "network.json"
DOORS = {
    "nats": "nats",
    "postgres": "postgres",
    "s3": "s3",
    "otlp": "collector",
    "registry_grpc": "registry",
    "ingest_grpc": "ingest",
    "inference_grpc": "inference",
}
"""Every door that somebody else uses -> whose it is."""


def plan_of(port: Mapping[str, int]) -> Plan:
    pairs = [
        (source, door, target)
        for source in (STRANGER, *SERVICES)
        for door, target in DOORS.items()
        if source != target
    ]
    control, *free = ports.free(len(pairs) + 1, avoid=port.values())
    links = [
        Link(source, target, door, listen, port[door])
        for (source, door, target), listen in zip(pairs, free, strict=True)
    ]
    return Plan(control, links)


def environment(plan: Plan, service: str, port: Mapping[str, int], keys: Secrets) -> dict[str, str]:
    """A service's own doors are where they are; those of others are at the end of a cable."""

    def at(door: str) -> int:
        return port[door] if DOORS[door] == service else plan.port(service, door)

    return {
        **app.environment_of(port, keys),
        "LEPTONIC_NATS_URL": servers.nats_url(at("nats")),
        "LEPTONIC_POSTGRES_DSN": servers.postgres_dsn(at("postgres"), keys.postgres_password),
        "LEPTONIC_S3_ENDPOINT": f"{LOOPBACK}:{at('s3')}",
        "LEPTONIC_REGISTRY_GRPC": f"{LOOPBACK}:{at('registry_grpc')}",
        "LEPTONIC_INGEST_GRPC": f"{LOOPBACK}:{at('ingest_grpc')}",
        "LEPTONIC_OTLP_ENDPOINT": f"{LOOPBACK}:{at('otlp')}",
    }


def network(file: Path, plan: Plan) -> Program:
    async def ready() -> bool:
        return not ports.is_free(plan.control)

    return Program(
        name="network",
        command=(sys.executable, "-m", "tests.chaos.proxy", str(file)),
        environment=app.PYTHON,
        prepare=lambda: write(file, plan),
        ready=ready,
    )


def write(file: Path, plan: Plan) -> None:
    file.write_bytes(msgspec.json.encode(plan))


def services(plan: Plan, port: Mapping[str, int], keys: Secrets) -> Iterator[Program]:
    for name in SERVICES:
        program = app.service(name, port, environment(plan, name, port, keys))
        yield replace(program, after=(*program.after, "network"))


def table(folder: Path, port: Mapping[str, int], keys: Secrets) -> list[Program]:
    plan = plan_of(port)
    return [
        network(folder / FILE, plan),
        *app.servers_and_collector(folder, port, keys),
        *services(plan, port, keys),
    ]


if __name__ == "__main__":
    sys.exit(app.main(table=table))
