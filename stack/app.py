"""The embedded stack: three servers, the trace collector and the six services, on loopback.

`python -m stack --data-dir .leptonic --ports fixed|auto` runs in the foreground until SIGTERM or
SIGINT. `<data-dir>/stack.json` tells where everything is, `<data-dir>/logs/` what it said.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from libs.settings import SERVICES
from stack import ports, servers, state
from stack.guard import guarded
from stack.ports import LOOPBACK, InUse
from stack.process import NotReady, Program
from stack.state import Locked, Process, Roll, Secrets, State
from stack.supervisor import Supervisor

SERVERS = ("nats", "postgres", "s3")
PYTHON = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONUNBUFFERED": "1"}
"""Compiling its imports again is half of a service's start: 2.4 s of 2 to 4 (2 cores, loaded)."""

Table = Callable[[Path, Mapping[str, int], Secrets], list[Program]]
"""(data folder, ports, secrets) -> what runs."""


def main(arguments: Sequence[str] | None = None, table: Table | None = None) -> int:
    """Returns the exit code: 1 for a folder or a port in use, or a program that cannot start."""
    parser = argparse.ArgumentParser(prog="python -m stack", description=__doc__)
    parser.add_argument("--data-dir", type=Path, default=Path(".leptonic"), help="all its state")
    parser.add_argument(
        "--ports", choices=("fixed", "auto"), default="fixed", help="doors on known or free ports"
    )
    given = parser.parse_args(arguments)
    folder = given.data_dir.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with state.locked(folder) as lock:
            return guarded(lambda: supervise(folder, given.ports, table or everything, lock))
    except Locked as error:
        sys.stderr.write(f"{error}\n")
        return 1


def supervise(folder: Path, mode: str, table: Table, lock: IO[str]) -> int:
    """Returns the exit code."""
    state.sign(lock)
    try:
        asyncio.run(up(folder, mode, table))
    except (InUse, NotReady) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


async def up(folder: Path, mode: str, table: Table) -> None:
    """Runs until SIGTERM or SIGINT."""
    known = state.load(folder)
    known.ports = ports.choose(mode, known.ports)
    programs = table(folder, known.ports, known.secrets)
    known.endpoints = endpoints(known.ports, known.secrets)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    def changed() -> None:
        known.processes = {
            name: Process(
                pid=member.running.pid if member.running else None,
                restarts=member.restarts,
                ready=member.ready.is_set(),
            )
            for name, member in supervisor.members.items()
        }
        state.save(known, folder)

    supervisor = Supervisor(programs, folder / "logs", say, changed)
    with told(known, folder):
        async with rolling(known, folder, supervisor):
            await supervisor.run(stop)
    say("stopped")


@contextlib.asynccontextmanager
async def rolling(known: State, folder: Path, supervisor: Supervisor) -> AsyncIterator[None]:
    """Restarts services one after the other whenever SIGUSR1 says that it is asked for."""
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked.set)

    async def roll_when_asked() -> None:
        while True:
            await asked.wait()
            asked.clear()
            known.roll = state.roll_asked(folder)
            state.save(known, folder)
            await roll(known.roll, supervisor, lambda: state.save(known, folder))

    task = asyncio.create_task(roll_when_asked())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def roll(asked: Roll, supervisor: Supervisor, changed: Callable[[], None]) -> None:
    for name in asked.services:
        try:
            await supervisor.replace(name)
        except NotReady as error:
            asked.error = str(error)
            say(f"{name}: not replaced: {error}")
            changed()
            return
        asked.done.append(name)
        changed()


@contextlib.contextmanager
def told(known: State, folder: Path) -> Iterator[None]:
    """stack.json says that the stack runs, as long as the block lasts."""
    known.pid = os.getpid()
    known.started_at = datetime.now(UTC).isoformat()
    known.processes = {}
    known.roll = None
    state.save(known, folder)
    try:
        yield
    finally:
        known.pid = None
        known.processes = {}
        state.save(known, folder)


def everything(folder: Path, port: Mapping[str, int], keys: Secrets) -> list[Program]:
    return [*servers_and_collector(folder, port, keys), *services(folder, port, keys)]


def servers_and_collector(folder: Path, port: Mapping[str, int], keys: Secrets) -> list[Program]:
    return [
        servers.nats(folder / "nats", port["nats"]),
        servers.postgres(folder / "postgres", port["postgres"], keys.postgres_password),
        servers.s3(folder / "s3", port, keys.s3_access_key, keys.s3_secret_key),
        collector(folder / "traces" / "traces.db", port["otlp"], port["traces"]),
    ]


def collector(file: Path, otlp_port: int, http_port: int) -> Program:
    listens = ("--otlp-port", str(otlp_port), "--http-port", str(http_port))
    return Program(
        name="collector",
        command=(sys.executable, "-m", "stack.collector", "--file", str(file), *listens),
        environment=PYTHON,
        ready=lambda: servers.answers(http_port, "/health/ready"),
    )


def services(folder: Path, port: Mapping[str, int], keys: Secrets) -> list[Program]:
    cache = {"LEPTONIC_INFERENCE_CACHE_DIR": str(folder / "models")}
    environment = {**cache, **environment_of(port, keys)}
    return [service(name, port, environment) for name in SERVICES]


def service(name: str, port: Mapping[str, int], environment: Mapping[str, str]) -> Program:
    path = "/v2/health/ready" if name == "inference" else "/health/ready"
    http_port = port[f"{name}_http"]
    return Program(
        name=name,
        command=(sys.executable, "-m", f"services.{name}"),
        environment=environment,
        ready=lambda: servers.answers(http_port, path),
        doors=tuple(port[door] for door in ports.DOORS if door.startswith(f"{name}_")),
        after=(*SERVERS, "collector"),
    )


def environment_of(port: Mapping[str, int], keys: Secrets) -> dict[str, str]:
    """Every service gets all of it, and reads its own. An OTLP endpoint that is set stays."""
    own = {f"LEPTONIC_{n.upper()}_PORT": str(port[n]) for n in ports.DOORS if n != "nats"}
    common = {
        "LEPTONIC_HOST": LOOPBACK,
        "LEPTONIC_SHARE_PORTS": "true",
        "LEPTONIC_NATS_URL": servers.nats_url(port["nats"]),
        "LEPTONIC_POSTGRES_DSN": servers.postgres_dsn(port["postgres"], keys.postgres_password),
        "LEPTONIC_S3_ENDPOINT": f"{LOOPBACK}:{port['s3']}",
        "LEPTONIC_S3_ACCESS_KEY": keys.s3_access_key,
        "LEPTONIC_S3_SECRET_KEY": keys.s3_secret_key,
        "LEPTONIC_REGISTRY_GRPC": f"{LOOPBACK}:{port['registry_grpc']}",
        "LEPTONIC_INGEST_GRPC": f"{LOOPBACK}:{port['ingest_grpc']}",
    }
    otlp = os.environ.get("LEPTONIC_OTLP_ENDPOINT") or f"{LOOPBACK}:{port['otlp']}"
    return {**PYTHON, **own, **common, "LEPTONIC_OTLP_ENDPOINT": otlp}


def endpoints(port: Mapping[str, int], keys: Secrets) -> dict[str, str]:
    """What stack.json tells."""
    http = {
        **{name: port[f"{name}_http"] for name in SERVICES if name != "inference"},
        **{name: port[name] for name in ("inference_http", "inference_metrics", "inference_api")},
        "traces": port["traces"],
    }
    grpc = {f"{name}_grpc": port[f"{name}_grpc"] for name in SERVICES}
    plain = {**grpc, "otlp": port["otlp"], "s3": port["s3"]}
    return {
        "nats": servers.nats_url(port["nats"]),
        **{name: f"http://{LOOPBACK}:{number}" for name, number in http.items()},
        **{name: f"{LOOPBACK}:{number}" for name, number in plain.items()},
        "postgres": servers.postgres_dsn(port["postgres"], keys.postgres_password),
    }


def say(line: str) -> None:
    """Progress, as long as somebody reads it: a stack outlives the terminal it was started from."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
