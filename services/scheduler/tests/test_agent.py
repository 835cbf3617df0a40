"""An agent runs what is placed on its node, whatever happens to it meanwhile.

What is placed runs once and its end is told; what runs is adopted by the next agent, what ended
while there was none is told then; an older token starts nothing beside a newer one; whatever is
stopped ends, also if it does not want to; nothing is left behind; and a bus that loses acks hears
each thing under one id.
"""

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from libs.bus import PublishFailed
from libs.bus.memory import MemoryBus
from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptSucceeded,
    Resources,
)
from services.scheduler.process_agent import OLD
from services.scheduler.tests.engines import NODE, Desk, processes, stopped_of
from services.scheduler.workers import Seen, Worker, verdict_of
from stack.testing import eventually

UNTIL_TOLD = "open({!r}).read()\n"
"""A pipe with a name: it ends when somebody has opened it to write, and closed it."""
FAILURES = 5
FOREVER = "import signal\nwhile True: signal.pause()\n"


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with processes(tmp_path) as one:
        yield one


def note(path: Path) -> str:
    """Code that adds a line to the file."""
    return f"open({str(path)!r}, 'a').write('ran\\n')\n"


async def test_workers_know_who_they_are(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import os; print(*[os.environ[n] for n in ('JOB', 'JOB_TOKEN', 'RANK', 'LOCAL_RANK',"
        " 'WORLD_SIZE', 'CUDA_VISIBLE_DEVICES')], 'SECRET' in os.environ)"
    )
    monkeypatch.setenv("SECRET", "of the platform")
    async with desk.agent():
        await desk.say(desk.placed("one", code, 7, workers=1, rank=3, gpus=[[0, 1]]))
        ended = await desk.ended("one")
    assert ended.result["tail"] == "one 7 3 0 1 0,1 False\n"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({}, "argv"),
        ({"argv": []}, "spec.argv: empty"),
        ({"argv": ["true"], "grace_s": 1e9}, "grace_s"),
        ({"argv": ["there-is-no-such-program"]}, "No such file"),
        ({"argv": ["true"], "image": "debian"}, "no containers"),
    ],
)
async def test_what_cannot_start_is_not_tried_again(
    desk: Desk, spec: dict[str, object], reason: str
) -> None:
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", "", spec=spec))
        ended = await desk.ended("one")
        await desk.empty(agent)
    assert reason in ended.reason
    assert not ended.retryable


async def test_a_worker_has_no_more_memory_than_its_share(desk: Desk) -> None:
    share = Resources(cpu_milli=100, memory_mib=64)
    async with desk.agent():
        await desk.say(desk.placed("one", "b'x' * (80 << 20)", resources=share))
        ended = await desk.ended("one")
    assert "MemoryError" in ended.reason


async def test_the_next_agent_adopts_what_runs(desk: Desk, tmp_path: Path) -> None:
    go, ran = tmp_path / "go", tmp_path / "ran"
    os.mkfifo(go)
    async with desk.agent() as first:
        await desk.say(desk.placed("one", note(ran) + UNTIL_TOLD.format(str(go))))
        await desk.running(first, "one")
    async with desk.agent() as second:
        beat = await desk.heartbeat()
        assert beat.incarnation == second.incarnation
        assert [one.job for one in beat.running] == ["one"]
        go.write_text("")
        assert isinstance(await desk.ended("one"), AttemptSucceeded)
        await desk.empty(second)
    assert ran.read_text() == "ran\n"


async def test_what_ended_without_an_agent_is_told_by_the_next(desk: Desk, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    async with desk.agent() as first:
        await desk.say(desk.placed("one", UNTIL_TOLD.format(str(go)) + "print('late')"))
        await desk.running(first, "one")
    go.write_text("")

    async def is_over() -> bool:
        return not any(one.running for one in await first.engine.workers())

    await eventually(is_over)
    async with desk.agent() as second:
        assert (await desk.ended("one")).result == {"tail": "late\n"}
        await desk.empty(second)


async def test_an_instruction_that_comes_again_starts_nothing(desk: Desk, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    placed = desk.placed("one", note(ran))
    async with desk.agent() as first:
        await desk.say(placed)
        await desk.ended("one")
        await desk.empty(first)
    async with desk.agent() as second:
        await desk.say(placed)
        await desk.say(desk.placed("two", note(ran), token=2))
        await desk.ended("two")
        await desk.empty(second)
    assert ran.read_text() == "ran\nran\n"
    assert len(desk.told("one")) == 2


async def test_what_was_stopped_before_it_came_never_starts(desk: Desk, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    placed = desk.placed("one", note(ran))
    async with desk.agent():
        await desk.say(stopped_of(placed))
        await desk.say(placed)
        await desk.say(desk.placed("two", "", token=2))
        await desk.ended("two")
    assert not ran.exists()
    assert desk.told("one") == []


async def test_what_is_stopped_may_finish_in_its_grace(desk: Desk, tmp_path: Path) -> None:
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    code = (
        "import signal, sys\n"
        f"def end(*_):\n    open({str(saved)!r}, 'w').write('all')\n    sys.exit(0)\n"
        f"signal.signal(signal.SIGTERM, end)\nopen({str(ready)!r}, 'w')\n" + FOREVER
    )
    placed = desk.placed("one", code, grace_s=60)
    async with desk.agent() as agent:
        await desk.say(placed)
        await eventually(ready.exists)
        await desk.say(stopped_of(placed))
        await desk.empty(agent)
    assert saved.read_text() == "all"


async def test_a_newer_attempt_ends_the_older_and_never_the_other_way(
    desk: Desk, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", FOREVER, token=5))
        await desk.running(agent, "one")
        await desk.say(desk.placed("one", note(ran) + FOREVER, token=8))
        await eventually(ran.exists)
        assert [one.worker.token for one in await agent.engine.workers()] == [8]
        await desk.say(desk.placed("one", note(ran), token=6))
        await desk.say(desk.placed("two", "", token=9))
        await desk.ended("two")
        assert ran.read_text() == "ran\n"
        await desk.say(stopped_of(desk.placed("one", "", token=8)))
        await desk.empty(agent)


async def test_a_worker_that_is_half_removed_is_none(desk: Desk) -> None:
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", ""))
        await desk.ended("one")
        await desk.empty(agent)
    left = desk.folder / "workers" / f"half{OLD}"
    left.mkdir()
    assert await agent.engine.workers() == []
    desk.make(desk.folder)
    assert not left.exists()


async def test_a_share_that_was_started_in_part_is_given_back(desk: Desk) -> None:
    """As if the agent had died between its workers."""
    async with desk.agent() as first:
        await desk.say(desk.placed("one", FOREVER, workers=2))
        await desk.running(first, "one")
    half = (await first.engine.workers())[0].worker

    async def has_ended() -> bool:
        await first.engine.stop([half])
        seen = {one.worker: one.running for one in await first.engine.workers()}
        return not seen[half]

    await eventually(has_ended)
    await first.engine.remove([half])
    async with desk.agent() as second:
        ended = await desk.ended("one")
        await desk.empty(second)
    assert "1 of 2 workers are left" in ended.reason
    assert ended.retryable


async def test_a_worker_whose_supervisor_was_killed_is_lost_and_its_command_ends(
    desk: Desk, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    code = f"import os; open({str(there)!r}, 'w').write(str(os.getpid()))\n" + FOREVER
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", code))
        pid = int(await eventually(lambda: there.exists() and there.read_text()))
        (shim,) = (desk.folder / "workers").glob("*/pid")
        os.kill(int(shim.read_text()), signal.SIGKILL)
        ended = await desk.ended("one")
        await desk.empty(agent)
    assert ended.retryable
    await eventually(lambda: is_over(pid))


async def test_a_command_ends_with_the_test_that_started_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid-of-command"
    code = f"import os; open({str(pid)!r}, 'w').write(str(os.getpid()))\n" + FOREVER
    with processes(tmp_path) as desk:
        async with desk.agent():
            await desk.say(desk.placed("one", code))
            started = int(await eventually(lambda: pid.exists() and pid.read_text()))
        assert not is_over(started)
    await eventually(lambda: is_over(started))


def is_over(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


class Forgetful(MemoryBus):
    """Of what the agent says first, every other ack is lost, and every other publish."""

    failures = 0

    async def publish(
        self, subject: str, payload: bytes, *, id: str, headers: Mapping[str, str] | None = None
    ) -> int:
        if not id.startswith(NODE) or self.failures == FAILURES:
            return await super().publish(subject, payload, id=id, headers=headers)
        self.failures += 1
        if self.failures % 2:
            await super().publish(subject, payload, id=id, headers=headers)
        raise PublishFailed("no ack came")


async def test_a_bus_that_loses_acks_hears_each_thing_once(desk: Desk) -> None:
    bus = desk.bus = Forgetful()
    async with desk.agent() as agent:
        await desk.say(desk.placed("one", "print(1)"))
        await desk.ended("one")
        await desk.empty(agent)
    assert bus.failures == FAILURES
    assert [type(one) for one in desk.told("one")] == [AttemptStarted, AttemptSucceeded]


async def test_two_agents_of_one_node_work_one_after_the_other(desk: Desk) -> None:
    async with desk.agent() as first:
        await desk.say(desk.placed("one", ""))
        await desk.ended("one")
        async with desk.agent() as second:
            assert (await desk.heartbeat()).incarnation == first.incarnation
            assert (await desk.heartbeat()).incarnation == first.incarnation
    async with desk.agent() as third:
        assert (await desk.heartbeat()).incarnation == third.incarnation
    assert second.offer.capacity.cpu_milli == 0  # it never came to look


def test_an_end_without_its_fault_is_tried_again_and_the_users_is_not() -> None:
    worker = Worker("default", "one", 1, 1, NODE, rank=0, local=0, here=1, world=1)
    ends = {
        "exit code": Seen(worker, False, 1),
        "signal": Seen(worker, False, -9),
        "out of memory": Seen(worker, False, -9, "out of memory"),
        "machine": Seen(worker, False, None, "gone", lost=True),
    }
    verdicts = {name: verdict_of([seen]) for name, seen in ends.items()}
    retried = {n for n, v in verdicts.items() if isinstance(v, AttemptFailed) and v.retryable}
    assert retried == {"signal", "machine"}
    assert verdict_of([Seen(worker, True)]) is None


def test_two_nodes_of_one_engine_have_no_name_in_common() -> None:
    """A gang has the same attempt and token on all its nodes."""
    names = {
        Worker("default", "one", 1, 1, node, rank=0, local=0, here=1, world=2).name
        for node in ("a", "b")
    }
    assert len(names) == 2


def test_an_attempt_of_an_older_scheduler_has_no_limits() -> None:
    placed = AttemptPlaced(
        project="p", job="j", attempt=1, token=1, node=NODE, kind="command", workers=1
    )
    assert placed.resources.memory_mib == 0
