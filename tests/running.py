"""A whole stack for a test, of processes or of containers: started by the command a user would
run, on free ports, with state of its own.
"""

import asyncio
import contextlib
import functools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from leptonic import compose
from sklearn.datasets import load_digits

from libs.bus import PublishFailed
from libs.bus.jetstream import JetStreamBus, connect
from stack import ports
from stack.testing import eventually

ROOT = Path(__file__).resolve().parent.parent
READY_S = 60.0
STAGE_S = 120.0
STOP_S = 45.0
STACKS = ("embedded", pytest.param("compose", marks=pytest.mark.compose))
"""What a test of a whole stack is parametrised over."""
S3_KEYS = ("s3_access_key", "s3_secret_key")
UP = ("up", "-d", "--wait", "--no-build")
PUBLISHED = re.compile(r"\$\{(STACK_\w+_PORT):-")


class Stack:
    """What a user knows of a running stack: its stack.json and its doors."""

    kind = "embedded"

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.http = httpx.AsyncClient(timeout=10)

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.data_dir / "stack.json").read_text())
        return found

    def endpoint(self, name: str) -> str:
        address: str = self.state["endpoints"][name]
        return address

    def pid(self, process: str) -> int:
        number: int = self.state["processes"][process]["pid"]
        return number

    async def get(self, service: str, path: str) -> dict[str, Any]:
        response = await self.http.get(self.endpoint(service) + path)
        response.raise_for_status()
        found: dict[str, Any] = response.json()
        return found

    async def try_get(self, service: str, path: str) -> dict[str, Any]:
        """{} while the service is away or does not know it yet."""
        try:
            return await self.get(service, path)
        except httpx.HTTPError:
            return {}

    async def apply(self, pipeline: dict[str, Any]) -> None:
        body = {"yaml": yaml.safe_dump(pipeline)}
        url = self.endpoint("registry") + "/v1/projects/default/pipelines"
        response = await self.http.post(url, json=body)
        assert response.status_code == 200, response.text

    async def events(self, type_part: str = "") -> list[dict[str, Any]]:
        """Every event so far whose type contains `type_part`."""
        found: list[dict[str, Any]] = []
        last = 0
        while True:
            page = await self.try_get("registry", f"/v1/events?after={last}&limit=1000")
            if not page or not page["events"]:
                return [event for event in found if type_part in event["type"]]
            found += page["events"]
            last = page["last"]

    async def event(
        self, type_part: str, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = STAGE_S
    ) -> dict[str, Any]:
        """The first such event's data, waited for."""

        async def find() -> dict[str, Any] | None:
            matching = (e["data"] for e in await self.events(type_part) if wanted(e["data"]))
            return next(matching, None)

        found: dict[str, Any] = await until(find, f"no {type_part} event", timeout_s)
        return found

    def log(self, service: str) -> list[str]:
        """The lines it has written so far."""
        return (self.data_dir / "logs" / f"{service}.log").read_text().splitlines()

    def kill(self, process: str) -> int:
        """SIGKILL; returns the pid that was."""
        pid = self.pid(process)
        os.kill(pid, signal.SIGKILL)
        return pid

    async def back(self, process: str, old_pid: int) -> None:
        """Waits until the supervisor has a successor that is ready."""

        async def ready() -> bool:
            entry = self.state["processes"][process]
            return entry["pid"] != old_pid and bool(entry["ready"])

        await until(ready, f"{process} is not back", READY_S)


class Containers(Stack):
    """The same of a Compose project, which the environment names."""

    kind = "compose"

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.endpoints = dict(compose.locate().endpoints)

    def endpoint(self, name: str) -> str:
        """Ports and token stay the same as long as the project lives."""
        return self.endpoints[name]

    def log(self, service: str) -> list[str]:
        """Not `docker compose logs`: v2.26 begins each line with a terminal's escape code."""
        (container,) = (one for one in compose.containers() if one["Service"] == service)
        line = ["docker", "logs", container["ID"]]
        done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
        return done.stdout.decode().splitlines()

    @property
    def state(self) -> dict[str, Any]:
        running = compose.containers()
        keys = {name: self.secret(f"LEPTONIC_{name.upper()}") for name in S3_KEYS}
        found = {one["Service"]: self.entry(one) for one in running}
        return {"endpoints": self.endpoints, "processes": found, "secrets": keys}

    @staticmethod
    def entry(container: dict[str, Any]) -> dict[str, Any]:
        """Its pid is its init's, outside; 0 while it does not run."""
        line = ["docker", "inspect", "--format", "{{.State.Pid}}", container["ID"]]
        pid = int(subprocess.run(line, capture_output=True, check=True).stdout)
        return {**compose.process_of(container), "pid": pid}

    def pid(self, process: str) -> int:
        (one,) = (c for c in compose.containers() if c["Service"] == process)
        number: int = self.entry(one)["pid"]
        return number

    @functools.cache  # noqa: B019 - a test has one
    def secret(self, variable: str) -> str:
        folder = compose.TOKEN.rpartition("/")[0]
        return compose.docker("exec", "-T", "registry", "cat", f"{folder}/{variable}").strip()

    async def back(self, process: str, old_pid: int) -> None:
        async def ready() -> bool:
            there = [c for c in compose.containers() if c["Service"] == process]
            return any(
                self.entry(c)["pid"] not in (0, old_pid) and compose.process_of(c)["ready"]
                for c in there
            )

        await until(ready, f"{process} is not back", READY_S)


async def until(find: Callable[[], Any], problem: str, timeout_s: float) -> Any:
    """`eventually`, with a problem in words."""
    try:
        return await eventually(find, timeout_s)
    except AssertionError as error:
        raise AssertionError(f"{problem} after {timeout_s:.0f} s: {error}") from error


def running_stack(
    data_dir: Path, kind: str = "embedded"
) -> contextlib.AbstractAsyncContextManager[Stack]:
    return running_processes(data_dir) if kind == "embedded" else running_containers(data_dir)


@contextlib.contextmanager
def compose_project(files: str = "compose.yaml") -> Iterator[str]:
    """The environment of a project of its own, on free ports; nothing of it is left at the end.

    The images are those that `make test-compose` has built.
    """
    published = sorted(set(PUBLISHED.findall((ROOT / "compose.yaml").read_text())))
    numbers = map(str, ports.free(len(published)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPOSE_FILE", files)
        patch.setenv("COMPOSE_PROJECT_NAME", f"leptonic-test-{secrets.token_hex(3)}")
        for name, number in zip(published, numbers, strict=True):
            patch.setenv(name, number)
        try:
            yield os.environ["COMPOSE_PROJECT_NAME"]
        finally:
            compose.docker("down", "--volumes", "--timeout", "5", timeout_s=compose.UP_S)


@contextlib.asynccontextmanager
async def running_containers(data_dir: Path, files: str = "compose.yaml") -> AsyncIterator[Stack]:
    with compose_project(files):
        try:
            await asyncio.to_thread(compose.docker, *UP, timeout_s=compose.UP_S)
            stack = Containers(data_dir)
            try:
                yield stack
            finally:
                await stack.http.aclose()
        finally:
            data_dir.parent.mkdir(parents=True, exist_ok=True)
            (data_dir.parent / "compose.log").write_text(compose.docker("logs", "--no-color"))


@contextlib.asynccontextmanager
async def running_processes(data_dir: Path) -> AsyncIterator[Stack]:
    log = data_dir.parent / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - fork and exec take 2 ms
            [sys.executable, "-m", "stack", "--data-dir", str(data_dir), "--ports", "auto"],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    stack = Stack(data_dir)
    try:

        async def ready() -> bool:
            if process.poll() is not None:
                raise RuntimeError(log.read_text()[-3000:])
            try:
                entries = stack.state["processes"]
            except (FileNotFoundError, KeyError):
                return False
            return len(entries) >= 9 and all(entry["ready"] for entry in entries.values())

        await until(ready, "the stack is not ready", READY_S)
        yield stack
    finally:
        await stack.http.aclose()
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.wait, STOP_S)


def digits(first: int, count: int) -> list[dict[str, Any]]:
    """Handwritten digits `first` to `first + count` of scikit-learn's 1,797, as records."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = range(first, first + count)
    return [{"pixels": pixels[i].tolist(), "label": int(labels[i])} for i in chosen]


def digits_pipeline(name: str, records: int, **train: Any) -> dict[str, Any]:
    """The digits example under another name, with a smaller trigger."""
    pipeline: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "digits.yaml").read_text())
    pipeline["pipeline"] = name
    pipeline["dataset"]["name"] = name
    pipeline["deployment"]["model"] = name
    pipeline["triggers"] = {"records": records}
    pipeline["gates"] = [{"metric": "accuracy", "min": 0.5}]
    pipeline["train"].update(train)
    return pipeline


async def publish(
    bus: JetStreamBus,
    dataset: str,
    records: Sequence[dict[str, Any]],
    batch: int = 50,
    headers: dict[str, str] | None = None,
) -> list[int]:
    """Publishes until everything is acked, as a careful stranger would; returns the sequences."""
    acked = []
    for start in range(0, len(records), batch):
        payload = json.dumps(records[start : start + batch]).encode()
        while True:
            try:
                sequence = await bus.publish(
                    f"records.default.{dataset}", payload, id=f"{dataset}-{start}", headers=headers
                )
            except PublishFailed:
                continue
            acked.append(sequence)
            break
    return acked


@contextlib.asynccontextmanager
async def stranger(stack: Stack) -> AsyncIterator[JetStreamBus]:
    async with connect(stack.endpoint("nats"), name="stranger") as bus:
        yield bus
