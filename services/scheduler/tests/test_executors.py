"""Jobs through the whole of it: the API, the scheduler's process, an agent's process, an engine.

What runs is run once, whichever of the processes is killed meanwhile.
"""

import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from libs.bus.jetstream import JetStreamBus
from libs.contracts.events import JobSucceeded
from services.scheduler.tests.engines import IMAGE, PATIENCE_S, containers, reaped
from services.scheduler.tests.test_service import REDELIVERED_S, Service, ended, is_state
from stack import process
from stack.testing import Server, eventually

NODE = "node-of-the-test"
SOON_S = 60.0


class AgentProcess:
    """`python -m services.scheduler.<module>` beside a scheduler, ready once that knows it."""

    def __init__(
        self, service: Service, folder: Path, nats_url: str, module: str, node: str
    ) -> None:
        self.service = service
        self.folder = folder
        self.node = node
        program = process.Program(
            name=module,
            command=(sys.executable, "-m", f"services.scheduler.{module}"),
            ready=self.is_known,
            environment={
                "LEPTONIC_NATS_URL": nats_url,
                "LEPTONIC_AGENT_NODE": node,
                "LEPTONIC_AGENT_FOLDER": str(folder),
            },
        )
        self.server = Server(program, folder / f"{module}.log")

    async def is_known(self) -> bool:
        nodes = (await self.service.http.get("/v1/nodes")).json()["nodes"]
        return [one["health"] for one in nodes if one["node"] == self.node] == ["Healthy"]

    async def standby(self) -> Server:
        """Another of the same node, as far as it comes while the first one lives."""
        other = Server(self.server.program, self.folder / "standby.log")
        other.running = await process.start(other.program, other.log)
        lock = str(self.folder / self.node / "lock")
        waiting = psutil.Process(other.running.pid)
        await eventually(lambda: lock in {one.path for one in waiting.open_files()}, SOON_S)
        return other


@contextlib.asynccontextmanager
async def opened(
    module: str, folder: Path, bus: JetStreamBus, nats_url: str, dsn: str, node: str = NODE
) -> AsyncIterator[AgentProcess]:
    service = Service(folder, bus, nats_url, dsn)
    agent = AgentProcess(service, folder, nats_url, module, node)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(reaped(folder))
        stack.push_async_callback(service.http.aclose)
        for server in (service.server, agent.server):
            stack.push_async_callback(server.stop)
            await server.start()
        yield agent


@pytest_asyncio.fixture
async def agent(
    tmp_path: Path, bus: JetStreamBus, nats_url: str, postgres_dsn: str
) -> AsyncIterator[AgentProcess]:
    async with opened("process_agent", tmp_path, bus, nats_url, postgres_dsn) as one:
        yield one


def held(folder: Path) -> list[str]:
    """A command that says that it ran, and ends once its pipe was opened and closed."""
    os.mkfifo(folder / "go")
    code = "open('{0}/ran', 'a').write('ran\\n'); open('{0}/go').read(); print('through')"
    return [sys.executable, "-I", "-S", "-c", code.format(folder)]


async def runs(agent: AgentProcess, folder: Path) -> None:
    """A job that is held."""
    await agent.service.submit("one", kind="command", spec={"argv": held(folder)})
    await eventually(lambda: is_state(agent.service, "one", "running"), PATIENCE_S)


async def test_a_job_runs_and_its_end_is_told(agent: AgentProcess) -> None:
    service = agent.service
    say = [sys.executable, "-c", "import os; print(os.environ['JOB'], 'says', os.environ['X'])"]
    await service.submit("good", kind="command", spec={"argv": say, "env": {"X": "hello"}})
    await service.submit("bad", kind="command", spec={"argv": [sys.executable, "-c", "1 / 0"]})
    good = await eventually(lambda: ended(service, "good"), PATIENCE_S)
    assert (good["state"], good["result"]) == ("succeeded", {"tail": "good says hello\n"})
    bad = await eventually(lambda: ended(service, "bad"), PATIENCE_S)
    assert (bad["state"], bad["attempt"]) == ("failed", 1)
    assert "ZeroDivisionError" in bad["reason"]


async def test_what_runs_is_adopted_when_its_agent_is_killed(
    agent: AgentProcess, tmp_path: Path
) -> None:
    service = agent.service
    await runs(agent, tmp_path)
    next_one = await agent.standby()
    try:
        await agent.server.kill()
        await eventually(lambda: b"adopts 1 workers" in next_one.log.read_bytes(), SOON_S)
        (tmp_path / "go").write_text("")
        job = await eventually(lambda: ended(service, "one"), PATIENCE_S)
    finally:
        await next_one.stop()
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert job["result"] == {"tail": "through\n"}
    assert (tmp_path / "ran").read_text() == "ran\n"


async def test_what_runs_goes_on_when_the_scheduler_is_killed(
    agent: AgentProcess, tmp_path: Path
) -> None:
    service = agent.service
    await runs(agent, tmp_path)
    await service.server.kill()
    (tmp_path / "go").write_text("")
    await service.server.start()
    job = await eventually(lambda: ended(service, "one"), REDELIVERED_S)
    assert (job["state"], job["attempt"]) == ("succeeded", 1)
    assert (tmp_path / "ran").read_text() == "ran\n"
    # It is durable before it is told.
    assert len(await eventually(lambda: service.said(JobSucceeded))) == 1


@pytest.mark.compose
async def test_a_job_runs_in_a_container(
    tmp_path: Path, bus: JetStreamBus, nats_url: str, postgres_dsn: str
) -> None:
    with contextlib.suppress(ConnectionError):
        # It has pulled the image, and leaves nothing of its node behind.
        async with containers(tmp_path) as desk:
            place = tmp_path, bus, nats_url, postgres_dsn, desk.node
            async with opened("docker_agent", *place) as agent:
                spec = {"image": IMAGE, "argv": ["python3", "-c", "print('inside')"]}
                await agent.service.submit("one", kind="container", spec=spec)
                job = await eventually(lambda: ended(agent.service, "one"), PATIENCE_S)
            assert (job["state"], job["result"]) == ("succeeded", {"tail": "inside\n"})
            return
    pytest.skip("no Docker engine answers; scripts/engine.sh can start one")
