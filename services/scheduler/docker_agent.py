"""`python -m services.scheduler.docker_agent`: runs jobs of kind `container` on a Docker engine.

A worker is a container whose labels tell everything about it, so it is found again by whatever
agent of this node comes next. Its image is pulled where the engine has none. It has an init of
Docker's, because a process that is the first of its container ignores the signals it does not
handle. The engine is the one that Docker's own variables (`DOCKER_HOST`, ...) name.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from http import HTTPStatus
from time import monotonic
from typing import Any

import docker
import msgspec
import uvloop
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.types import DeviceRequest, LogConfig

from libs import telemetry
from libs.contracts.events import Resources
from libs.settings import load
from services.scheduler.agent import Offer
from services.scheduler.agents import Settings, serve
from services.scheduler.workers import TAIL_BYTES_MAX, Refused, Seen, Spec, Unusable, Worker

log = logging.getLogger(__name__)
LABEL = "ai.leptonic."
TIMEOUT_S = 30
TAIL_LINES = 100
LOG = LogConfig(type=LogConfig.types.JSON, config={"max-size": "8m", "max-file": "1"})
RUNNING = ("running", "paused", "restarting")
GOING = (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT)
"""What Docker says of a container that has ended or is being removed meanwhile."""
SIGNALLED = 128
"""An exit code above it, as Docker's init says it, is a signal's number more."""


class Labelled(msgspec.Struct, frozen=True):
    """What a container carries beside the labels that people read."""

    worker: Worker
    grace_s: float


class DockerEngine:
    kind = "container"

    def __init__(self, node: str, settings: Settings) -> None:
        self.node = node
        self.settings = settings
        self.connected: docker.DockerClient | None = None
        self.kill_at: dict[str, float] = {}

    async def offer(self) -> Offer:
        return await asyncio.to_thread(self.measure)

    async def workers(self) -> list[Seen]:
        return await asyncio.to_thread(self.look)

    async def start(self, share: Sequence[Worker], spec: Spec) -> None:
        if not spec.image:
            raise Unusable("spec.image: empty, and this node runs containers only")
        for worker in share:
            await asyncio.to_thread(self.launch, worker, spec)

    async def stop(self, share: Sequence[Worker]) -> None:
        for worker in share:
            await asyncio.to_thread(self.end, worker)

    async def remove(self, share: Sequence[Worker]) -> None:
        for worker in share:
            await asyncio.to_thread(self.clear, worker)

    # --- in a thread, each

    @property
    def client(self) -> docker.DockerClient:
        if self.connected is None:
            try:
                self.connected = docker.from_env(timeout=TIMEOUT_S)
            except DockerException as error:  # of all that say that it is away, no OSError
                raise ConnectionError(str(error)) from error
        return self.connected

    def measure(self) -> Offer:
        """What the settings leave open is the engine's."""
        said, has = self.settings, self.client.info()
        cpu_milli = said.cpu_milli or has["NCPU"] * 1000
        gpu_milli = 1000 if said.gpus else 0
        capacity = Resources(cpu_milli, said.memory_mib, gpu_milli, max(1, said.gpus))
        return Offer(capacity, said.gpu_model)

    def look(self) -> list[Seen]:
        mine = {"label": f"{LABEL}node={self.node}"}
        listed = self.client.containers.list(all=True, filters=mine, sparse=True)
        seen = [seen_of(container) for container in listed]
        return [one for one in seen if one is not None]

    def launch(self, worker: Worker, spec: Spec) -> None:
        container = self.find(worker) or self.create(worker, spec)
        if container.status != "created":
            return
        try:
            container.start()
        except APIError as error:
            container.remove(force=True)
            raise refusal(error) from error

    def create(self, worker: Worker, spec: Spec) -> Container:
        self.have(spec.image)
        try:
            return self.client.containers.create(**arguments(worker, spec))
        except APIError as error:
            raise refusal(error) from error

    def have(self, image: str) -> None:
        try:
            self.client.images.get(image)
        except ImageNotFound:
            log.info("%s: pulls %s", self.node, image)
            try:
                self.client.images.pull(image)
            except APIError as error:
                said = said_by(error)
                raise Unusable(f"spec.image: {image!r} cannot be pulled: {said}") from error

    def end(self, worker: Worker) -> None:
        """SIGTERM when it is asked for first, SIGKILL once it is asked for after the grace."""
        container = self.find(worker)
        if container is None:
            return
        now = monotonic()
        kill_at = self.kill_at.get(worker.name)
        if kill_at is None:
            self.kill_at[worker.name] = now + labelled(container.labels).grace_s
            self.send(container, "SIGTERM")
        elif now >= kill_at:
            self.send(container, "SIGKILL")

    def drop(self, container: Container) -> None:
        try:
            container.remove(v=True)
        except APIError as error:
            if error.status_code not in GOING:
                raise

    def send(self, container: Container, name: str) -> None:
        try:
            container.kill(name)
        except APIError as error:
            if error.status_code not in GOING:
                raise

    def find(self, worker: Worker) -> Container | None:
        try:
            return self.client.containers.get(name_of(worker))
        except NotFound:
            return None

    def clear(self, worker: Worker) -> None:
        container = self.find(worker)
        if container is not None:
            self.drop(container)
        self.kill_at.pop(worker.name, None)


def name_of(worker: Worker) -> str:
    """One of a name at a time, says Docker: so an attempt cannot be started twice."""
    return f"leptonic-{worker.name}"


def arguments(worker: Worker, spec: Spec) -> dict[str, Any]:
    told = worker.environment()
    told.pop("CUDA_VISIBLE_DEVICES", None)  # a container's GPUs are numbered from 0
    memory = f"{worker.resources.memory_mib}m" if worker.resources.memory_mib else None
    ids = [str(gpu) for gpu in worker.gpus]
    return {
        "image": spec.image,
        "command": spec.argv,
        "name": name_of(worker),
        "environment": {**spec.env, **told},
        "working_dir": spec.cwd or None,
        "labels": labels_of(worker, spec),
        "nano_cpus": worker.resources.cpu_milli * 1_000_000 or None,
        "mem_limit": memory,
        "memswap_limit": memory,
        "device_requests": [DeviceRequest(device_ids=ids, capabilities=[["gpu"]])] if ids else None,
        "init": True,
        "log_config": LOG,
    }


def labels_of(worker: Worker, spec: Spec) -> dict[str, str]:
    names = ("project", "job", "attempt", "token", "node", "rank")
    readable = {f"{LABEL}{name}": str(getattr(worker, name)) for name in names}
    whole = msgspec.json.encode(Labelled(worker, spec.grace_s)).decode()
    return {**readable, f"{LABEL}worker": whole}


def labelled(labels: dict[str, str]) -> Labelled:
    return msgspec.json.decode(labels[f"{LABEL}worker"], type=Labelled)


def seen_of(listed: Container) -> Seen | None:
    """None for one that was removed while we looked."""
    worker = labelled(listed.attrs["Labels"]).worker
    if listed.status in RUNNING:
        return Seen(worker, running=True)
    try:
        listed.reload()
        tail = listed.logs(tail=TAIL_LINES)[-TAIL_BYTES_MAX:].decode(errors="replace")
    except APIError as error:
        if error.status_code not in GOING:
            raise
        return None
    state = listed.attrs["State"]
    if state["Status"] in RUNNING:
        return Seen(worker, running=True)
    if state["Status"] == "created":
        return Seen(worker, running=False, problem="it was created, not started", lost=True)
    code = state["ExitCode"]
    problem = state["Error"]
    if state["OOMKilled"]:
        problem = f"out of memory: it may use {worker.resources.memory_mib} MiB"
    return Seen(worker, False, SIGNALLED - code if code > SIGNALLED else code, problem, tail=tail)


def refusal(error: APIError) -> Unusable:
    """The user's mistake, or the engine's trouble."""
    kind = Unusable if error.is_client_error() else Refused
    return kind(f"docker: {said_by(error)}")


def said_by(error: APIError) -> str:
    return str(error.explanation or error)


async def main(settings: Settings) -> None:
    await serve(settings, DockerEngine(settings.placed_on, settings))


if __name__ == "__main__":
    telemetry.log_everything("agent")
    uvloop.run(main(load(Settings, "agent", os.environ)))
