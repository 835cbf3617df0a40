"""Jobs of kind `ray` on a real Ray cluster: the engines' suite, and what only Ray can get wrong.

Each test leaves nothing on the cluster: no job, no placement group.
"""

import asyncio
import contextlib
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from libs.contracts.events import Resources
from services.scheduler.agents import Settings
from services.scheduler.ray_agent import RayEngine
from services.scheduler.tests.engines import Desk, stopped_of
from services.scheduler.tests.test_agent import is_over
from services.scheduler.tests.test_engines import (
    FOREVER,
    test_a_program_that_is_not_there_fails_the_job,
    test_a_worker_has_its_environment_and_the_users,
    test_a_worker_has_no_more_memory_than_its_share,
    test_how_it_failed_is_told_truly,
    test_one_worker_that_fails_ends_the_share,
    test_what_is_placed_runs_and_its_end_is_told,
    test_what_runs_and_what_ended_is_found_by_the_next_agent,
)
from stack import ports, process
from stack.testing import eventually, serving

SUITE = (
    test_a_program_that_is_not_there_fails_the_job,
    test_a_worker_has_its_environment_and_the_users,
    test_a_worker_has_no_more_memory_than_its_share,
    test_how_it_failed_is_told_truly,
    test_one_worker_that_fails_ends_the_share,
    test_what_is_placed_runs_and_its_end_is_told,
    test_what_runs_and_what_ended_is_found_by_the_next_agent,
)
"""Of the engines', run here on Ray."""
MARK = "RAY_OF_THE_TEST"
PORTS = (
    "port",
    "dashboard-port",
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "ray-client-server-port",
)
LONG_S = 120.0


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[str]:
    """Short: Ray's sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="lr-", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="session")
def cluster(ray_folder: str) -> Iterator[str]:
    """The address of a Ray of 4 CPUs, which ends with the session."""
    chosen = dict(zip(PORTS, ports.free(len(PORTS)), strict=True))
    address = f"http://127.0.0.1:{chosen['dashboard-port']}"
    mark = secrets.token_hex(8)
    probe = RayEngine(Settings(ray_address=address))

    async def ready() -> bool:
        try:
            return (await probe.offer()).capacity.cpu_milli == 4000
        except OSError:
            return False

    program = process.Program(
        name="ray", command=ray_start(chosen, ray_folder), ready=ready, environment=of_ray(mark)
    )
    try:
        with serving(program, Path(ray_folder)):
            yield address
    finally:
        end_marked(mark)


def ray_start(chosen: dict[str, int], folder: str) -> tuple[str, ...]:
    options: dict[str, Any] = {
        **chosen,
        "node-ip-address": "127.0.0.1",
        "num-cpus": 4,
        "memory": 2 << 30,
        "object-store-memory": 80 << 20,
        "temp-dir": folder,
        "include-log-monitor": False,
        "include-dashboard": True,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    ray = (sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--no-monitor")
    return (*ray, "--block", *words)


def of_ray(mark: str) -> dict[str, str]:
    """Jobs find `python` beside ours; no token, whatever other tests have set."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
    return {MARK: mark, "PATH": path, "RAY_AUTH_MODE": "disabled", "SPT_NOENV": "1", **quiet}


def end_marked(mark: str) -> None:
    """What Ray leaves behind: two of its agents stay for a minute."""
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if one.environ().get(MARK) == mark:
                one.kill()


@pytest_asyncio.fixture
async def desk(cluster: str, tmp_path: Path) -> AsyncIterator[Desk]:
    node = f"test-{secrets.token_hex(4)}"
    settings = Settings(node=node, ray_address=cluster)
    one = Desk(tmp_path, "ray", lambda _: RayEngine(settings))
    one.node, one.spec = node, {"grace_s": 1.0}
    yield one
    async with one.agent() as agent:
        await one.empty(agent)
        await eventually(lambda: is_clean(cluster), LONG_S)


async def is_clean(cluster: str) -> bool:
    engine = RayEngine(Settings(ray_address=cluster))
    groups = await asyncio.to_thread(engine.ask, "GET", "/api/v0/placement_groups")
    left = [one for one in groups["data"]["result"]["result"] if one["state"] != "REMOVED"]
    jobs = await asyncio.to_thread(engine.ask, "GET", "/api/jobs/")
    submitted = [one for one in jobs if one["submission_id"]]
    return not left and not submitted


def note(path: Path) -> str:
    """Code that says its process id."""
    return f"import os; open({str(path)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"


async def noted(path: Path) -> list[int]:
    lines = await eventually(lambda: path.exists() and path.read_text().splitlines(), LONG_S)
    return [int(line) for line in lines]


async def test_a_gang_has_a_bundle_for_each_worker(desk: Desk, tmp_path: Path) -> None:
    there = tmp_path / "there"
    share = Resources(cpu_milli=1500, memory_mib=100)
    placed = desk.placed("one", note(there) + FOREVER, workers=2, resources=share)
    async with desk.agent() as agent:
        await desk.say(placed)
        await eventually(lambda: there.exists() and there.read_text().count("\n") == 2, LONG_S)
        assert isinstance(agent.engine, RayEngine)
        told = await asyncio.to_thread(
            agent.engine.ask, "GET", "/api/v0/placement_groups?detail=true"
        )
        (group,) = [one for one in told["data"]["result"]["result"] if one["state"] == "CREATED"]
        needs = [one["unit_resources"] for one in group["bundles"]]
        assert needs == [{"CPU": 1.5, "memory": 100 << 20}] * 2
        await desk.say(stopped_of(placed))
        await desk.empty(agent)
    assert all(is_over(pid) for pid in await noted(there))


async def test_what_is_stopped_may_finish_in_its_grace(desk: Desk, tmp_path: Path) -> None:
    """Ray itself waits for 3 s only."""
    saved, there = tmp_path / "saved", tmp_path / "there"
    code = (
        "import signal, sys\n"
        "def end(*_):\n    signal.sigtimedwait([signal.SIGUSR1], 4)\n"
        f"    open({str(saved)!r}, 'w')\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n" + note(there) + FOREVER
    )
    placed = desk.placed("one", code, grace_s=60)
    async with desk.agent() as agent:
        await desk.say(placed)
        await noted(there)
        await desk.say(stopped_of(placed))
        await desk.empty(agent)
    assert saved.exists()


async def test_what_ignores_sigterm_is_killed_after_its_grace(desk: Desk, tmp_path: Path) -> None:
    there = tmp_path / "there"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    placed = desk.placed("one", deaf + note(there) + FOREVER, grace_s=0.2)
    async with desk.agent() as agent:
        await desk.say(placed)
        (pid,) = await noted(there)
        await desk.say(stopped_of(placed))
        await desk.empty(agent)
    assert is_over(pid)


@pytest.mark.parametrize(
    ("ancestor", "reason"), [("actor", "its actor is gone"), ("driver", "its driver is gone")]
)
async def test_a_worker_whose_actor_or_driver_is_killed_is_lost(
    desk: Desk, tmp_path: Path, ancestor: str, reason: str
) -> None:
    there = tmp_path / "there"
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", note(there) + FOREVER))
        (pid,) = await noted(there)
        command = psutil.Process(pid)
        (command.parent() if ancestor == "actor" else driver_of(desk.node)).kill()
        ended = await desk.ended("one")
        await desk.empty(agent)
    assert reason in ended.reason
    assert ended.retryable
    await eventually(lambda: is_over(pid), LONG_S)


def driver_of(node: str) -> psutil.Process:
    """The process that has the share's task among its variables, and is no worker of Ray's."""
    found = [one for one in psutil.process_iter() if is_driver(one, node)]
    (one,) = found
    return one


def is_driver(one: psutil.Process, node: str) -> bool:
    try:
        words = one.cmdline()
        return (
            "LEPTONIC_DRIVER" in " ".join(words)
            and node in one.environ()["RAY_JOB_CONFIG_JSON_ENV_VAR"]
        )
    except (psutil.Error, KeyError):
        return False


async def test_where_no_ray_answers_the_engine_is_away(tmp_path: Path) -> None:
    (port,) = ports.free(1)
    engine = RayEngine(Settings(ray_address=f"http://127.0.0.1:{port}"))
    with pytest.raises(ConnectionError, match=str(port)):
        await engine.workers()
