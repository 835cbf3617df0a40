"""What every engine does alike: the same suite over local processes and over Docker.

Docker's part belongs to `make test-compose`, and is left out, saying so, where no engine answers.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from libs.contracts.events import AttemptFailed, AttemptStarted, AttemptSucceeded, Resources
from services.scheduler.tests.engines import PATIENCE_S, Desk, containers, processes, stopped_of
from services.scheduler.workers import spec_of, workers_of
from stack.testing import eventually

FOREVER = "import signal\nwhile True: signal.pause()\n"
ENGINES = ("processes", pytest.param("containers", marks=pytest.mark.compose))


@pytest_asyncio.fixture(params=ENGINES)
async def desk(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Desk]:
    if request.param == "processes":
        with processes(tmp_path) as opened:
            yield opened
        return
    try:
        async with containers(tmp_path) as opened:
            yield opened
    except ConnectionError as error:
        pytest.skip(f"no Docker engine answers; scripts/engine.sh can start one: {error}")


async def test_what_is_placed_runs_and_its_end_is_told(desk: Desk) -> None:
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", "print('hello')"))
        ended = await desk.ended("one")
        await desk.empty(agent)
    assert isinstance(ended, AttemptSucceeded)
    assert ended.result == {"tail": "hello\n"}
    assert [type(one) for one in desk.told("one")] == [AttemptStarted, AttemptSucceeded]


@pytest.mark.parametrize(
    ("code", "reason", "retryable"),
    [
        ("raise SystemExit(3)", "exit code 3", False),
        ("import os; os.kill(os.getpid(), 9)", "signal 9", True),
        ("raise ValueError('what it said')", "what it said", False),
    ],
)
async def test_how_it_failed_is_told_truly(
    desk: Desk, code: str, reason: str, retryable: bool
) -> None:
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", code))
        ended = await desk.ended("one")
        await desk.empty(agent)
    assert isinstance(ended, AttemptFailed)
    assert reason in ended.reason
    assert ended.retryable is retryable


async def test_what_ignores_sigterm_is_killed_after_its_grace(desk: Desk) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER
    placed = desk.placed("one", stubborn, grace_s=0.2)
    async with desk.agent() as agent:
        await desk.say(placed)
        await desk.running(agent, "one")
        await desk.say(stopped_of(placed))
        await desk.empty(agent)
    assert [type(one) for one in desk.told("one")] == [AttemptStarted]


async def test_one_worker_that_fails_ends_the_share(desk: Desk) -> None:
    code = "import os\nif os.environ['RANK'] == '1': raise SystemExit(4)\n" + FOREVER
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", code, workers=3))
        ended = await desk.ended("one")
        await desk.empty(agent)
    assert "worker 1 ended with exit code 4" in ended.reason


async def test_a_worker_has_its_environment_and_the_users(desk: Desk) -> None:
    names = ("JOB", "JOB_TOKEN", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MINE")
    code = f"import os; print(*[os.environ[name] for name in {names}])"
    async with desk.agent():
        await desk.say(desk.placed("one", code, 7, rank=3, env={"MINE": "yes", "RANK": "9"}))
        ended = await desk.ended("one")
    assert ended.result["tail"] == "one 7 3 0 1 yes\n"


async def test_a_worker_has_no_more_memory_than_its_share(desk: Desk) -> None:
    share = Resources(cpu_milli=500, memory_mib=128)
    async with desk.agent():
        await desk.say(desk.placed("one", "b'x' * (256 << 20)", resources=share))
        ended = await desk.ended("one")
    assert "memory" in ended.reason.lower()
    assert not ended.retryable


async def test_a_program_that_is_not_there_fails_the_job(desk: Desk) -> None:
    spec = {**desk.spec, "argv": ["there-is-no-such-program"]}
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", "", spec=spec))
        ended = await desk.ended("one")
        await desk.empty(agent)
    assert isinstance(ended, AttemptFailed)
    assert not ended.retryable


async def test_what_runs_and_what_ended_is_found_by_the_next_agent(desk: Desk) -> None:
    async with desk.agent() as first:
        await desk.say(desk.placed("runs", FOREVER))
        await desk.say(desk.placed("ends", FOREVER, token=2))
        await desk.running(first, "runs")
        await desk.running(first, "ends")
    engine = first.engine

    async def has_ended() -> bool:
        (one,) = [one for one in await engine.workers() if one.worker.job == "ends"]
        await engine.stop([one.worker])
        return not one.running

    await eventually(has_ended, PATIENCE_S)
    async with desk.agent() as second:
        assert "signal 15" in (await desk.ended("ends")).reason
        assert {one.job for one in (await desk.heartbeat()).running} >= {"runs"}
        await desk.say(stopped_of(desk.placed("runs", "")))
        await desk.empty(second)


async def test_what_is_started_twice_runs_once(desk: Desk) -> None:
    placed = desk.placed("one", FOREVER)
    share = workers_of(placed, "")
    async with desk.agent() as agent:
        for _ in range(2):
            await agent.engine.start(share, spec_of(placed))
        assert [one.worker for one in await agent.engine.workers()] == share
        await desk.say(stopped_of(placed))
        await desk.empty(agent)


async def test_a_newer_attempt_ends_the_older(desk: Desk) -> None:
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", FOREVER, token=5))
        await desk.running(agent, "one")
        await desk.say(desk.placed("one", "print('newer')", token=8))
        ended = await desk.ended("one")
        await desk.empty(agent)
    assert (ended.token, ended.result) == (8, {"tail": "newer\n"})
