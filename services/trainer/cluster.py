"""A Ray over several machines or containers: `ray start` as a child, on the head and on the others.

All of Ray's ports are fixed, from a node's own `port` on, so that a network's rules can name them;
a gang's members meet on ports of the system's choice. Whoever speaks to any of them needs the
cluster's token.
"""

import asyncio
import contextlib
import json
import logging
import re
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import msgspec

from libs.contracts.events import Resources
from services.trainer.domain import Lost

log = logging.getLogger(__name__)
SERVER_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
"""In this order after the head's own port."""
CLIENT_PORT = "ray-client-server-port"
"""The head's alone, after those: `ray start` opens it and cannot be told not to."""
WORKER_PORTS = 39
PORTS = 2 + len(SERVER_PORTS) + WORKER_PORTS
"""In a row; those of workers come last."""
STARTED = "Ray runtime started"
ERROR = re.compile(r"[\w.]*Error: ")
START_S = 180.0
END_S = 8.0
"""SIGTERM to the parent alone: it ends the others within 3 s."""
OBJECT_STORE_BYTES = 80 << 20
"""Only progress and results go through it; workers read data from object storage."""
MILLI = "cpu_milli"
"""A resource of ours on every node: Ray itself counts whole CPUs."""


class Node(msgspec.Struct, frozen=True):
    """One node, as it is started."""

    address: str
    """What it binds and advertises; empty: the one that reaches the head."""
    port: int
    """The first of its ports; on the head, the one that others join."""
    offers: Resources


def ray_start(node: Node, folder: str, joins: str) -> list[str]:
    """The command line; `joins` is the head's host:port, empty for the head itself."""
    options: dict[str, Any] = {
        name: node.port + number for number, name in enumerate(SERVER_PORTS, start=1)
    }
    client = node.port + len(SERVER_PORTS) + 1
    options |= {
        "min-worker-port": client + 1,
        "max-worker-port": client + WORKER_PORTS,
        "num-cpus": cpus_of(node.offers),
        "memory": node.offers.memory_mib << 20,
        "resources": json.dumps(resources_of(node.offers)),
        "object-store-memory": OBJECT_STORE_BYTES,
        "include-log-monitor": False,
        "temp-dir": folder,
    }
    if node.address:
        options["node-ip-address"] = node.address
    if joins:
        options["address"] = joins
    else:
        options |= {"port": node.port, CLIENT_PORT: client, "include-dashboard": False}
    role = [] if joins else ["--head", "--no-monitor"]
    words = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role, *words]


def cpus_of(offers: Resources) -> int:
    return max(1, offers.cpu_milli // 1000)


def resources_of(offers: Resources) -> dict[str, float]:
    return {MILLI: offers.cpu_milli}


@contextlib.asynccontextmanager
async def running(node: Node, folder: str, joins: str = "") -> AsyncIterator[Process]:
    """The node, once it has started, until the block ends. Raises `Lost`."""
    process = await asyncio.create_subprocess_exec(
        *ray_start(node, folder, joins), stdout=PIPE, stderr=STDOUT
    )
    started = asyncio.Event()
    reading = asyncio.create_task(read(process, started))
    try:
        await until_started(started, reading)
        yield process
    finally:
        # With the head the cluster ends: nobody has to be told, and the reaper takes the rest.
        await to_its_end(end(process, END_S if joins else 0))
        await reading


async def read(process: Process, started: asyncio.Event) -> str:
    """To the end of what it says; returns the last error, or else the last line."""
    error = ""
    assert process.stdout is not None
    async for said in process.stdout:
        line = said.decode(errors="replace").strip()
        log.debug("ray start: %s", line)
        if line and (ERROR.match(line) or not ERROR.match(error)):
            error = line
        if STARTED in line:
            started.set()
    return error


async def until_started(started: asyncio.Event, said: asyncio.Task[str]) -> None:
    waiting = asyncio.create_task(started.wait())
    await asyncio.wait({waiting, said}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not started.is_set():
        problem = said.result() if said.done() else f"nothing for {START_S:g} s"
        raise Lost(f"Ray did not start: {problem}")


async def to_its_end(ending: Coroutine[Any, Any, None]) -> None:
    """Also when whoever waits for it is cancelled again and again."""
    task = asyncio.create_task(ending)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})


async def end(process: Process, patience_s: float) -> None:
    if process.returncode is None and patience_s:
        process.terminate()
        await asyncio.wait({asyncio.ensure_future(process.wait())}, timeout=patience_s)
    if process.returncode is None:
        process.kill()
        await process.wait()
