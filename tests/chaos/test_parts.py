"""The parts of the suite by themselves, for `make test`: the schedule, the network, the report."""

import asyncio
import contextlib
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from stack import ports
from stack.ports import LOOPBACK
from stack.testing import eventually
from tests.chaos import proxy, report, schedule
from tests.chaos.invariants import Found, Kill, compare, is_explained, is_right
from tests.chaos.load import Acked, Answer
from tests.chaos.process_controls import signal_tree
from tests.chaos.proxy import Link, Plan
from tests.chaos.report import Row

SILENCE_S = 0.3


def test_a_seed_is_a_schedule() -> None:
    assert schedule.whole(7) == schedule.whole(7)
    assert schedule.whole(7) != schedule.whole(8)


@pytest.mark.parametrize("kind", [schedule.KILL, schedule.PAUSE, schedule.DISCONNECT])
def test_everything_is_a_victim_of_everything(kind: str) -> None:
    faults = [one for one in schedule.whole(1) if one.kind == kind]
    assert {victim for one in faults for victim in one.victims} == set(schedule.VICTIMS)


def test_one_fault_can_be_chosen() -> None:
    faults = schedule.whole(1)
    assert [one.label for one in schedule.only(faults, "pause nats")] == ["pause nats"]
    assert {one.kind for one in schedule.only(faults, "fill")} == {"fill"}
    assert all("nats" in one.victims for one in schedule.only(faults, "nats"))
    assert schedule.only(faults, "") == faults


def test_slices_are_whole_batches_of_all_records() -> None:
    counts = schedule.slices(20_000, 39, 50)
    assert (len(counts), sum(counts)) == (39, 20_000)
    assert max(counts) - min(counts) <= 50


@contextlib.asynccontextmanager
async def echo_behind_a_cable(tmp_path: Path) -> AsyncIterator[tuple[Plan, int]]:
    """Yields the plan and the port at this end of the cable."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
        writer.close()

    control, near = ports.free(2)
    server = await asyncio.start_server(echo, LOOPBACK, 0)
    far = server.sockets[0].getsockname()[1]
    plan = Plan(control, [Link("here", "there", "echo", near, far)])
    file = tmp_path / "network.json"
    file.write_bytes(msgspec.json.encode(plan))
    command = (sys.executable, "-m", "tests.chaos.proxy", str(file))
    async with server:
        process = await asyncio.create_subprocess_exec(*command)
        try:
            await eventually(lambda: not ports.is_free(control))
            yield plan, near
        finally:
            process.terminate()
            await process.wait()


@pytest.mark.parametrize("end", ["here", "there"])
async def test_a_cut_cable_is_silent_and_loses_nothing(tmp_path: Path, end: str) -> None:
    async with echo_behind_a_cable(tmp_path) as (plan, port):
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        writer.write(b"one\n")
        assert await reader.readline() == b"one\n"
        await proxy.cut(plan, {end})
        writer.write(b"two\n")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE_S):
                await reader.readline()
        await proxy.cut(plan, {"somebody else"})
        assert await reader.readline() == b"two\n"
        writer.close()


async def test_a_tree_of_processes_stands_still_and_goes_on(tmp_path: Path) -> None:
    script = "(while :; do echo x; done) & wait"
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", script, stdout=asyncio.subprocess.PIPE, process_group=0
    )
    assert process.stdout is not None
    try:
        await process.stdout.readline()
        signal_tree(process.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE_S):
                await everything(process.stdout)
        signal_tree(process.pid, signal.SIGCONT)
        assert await process.stdout.readline() == b"x\n"
    finally:
        process.send_signal(signal.SIGCONT)
        signal_tree(process.pid, signal.SIGKILL)
        await process.wait()


async def everything(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        continue


def test_what_is_lost_or_doubled_is_counted() -> None:
    books = [Acked("a", 7, range(2), 0.0), Acked("b", 8, range(2, 4), 0.0)]
    whole = [Counter([(7, 0, 0), (7, 1, 1)]), Counter([(8, 0, 2), (8, 1, 3)])]
    for parts, lost, doubled in (
        (whole, 0, 0),
        (whole[:1], 2, 0),
        ([*whole, whole[0]], 0, 2),
        ([*whole, Counter([(9, 0, 0)])], 0, 1),
    ):
        found = Found()
        compare(parts, books, found)
        assert (found.lost, found.doubled) == (lost, doubled)


def test_an_answer_is_right_for_its_row_and_its_version_only() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    expected = {"1": (np.array([0, 1]), probabilities)}
    right = Answer("1", 1, 1, [0.2, 0.8], True)
    assert is_right(right, expected)
    for wrong in (
        right._replace(version="2"),
        right._replace(row=0),
        right._replace(label=0),
        right._replace(probabilities=[0.3, 0.7]),
        right._replace(id_matches=False),
    ):
        assert not is_right(wrong, expected)


def test_only_a_kill_of_a_caller_explains_an_orphan() -> None:
    orphan = {"service": "preprocess", "start_ns": 100e9, "end_ns": 101e9}
    assert is_explained(orphan, [Kill("ingest", 100.5)])
    assert not is_explained(orphan, [Kill("trainer", 100.5), Kill("nats", 100.5)])
    assert not is_explained(orphan, [Kill("ingest", 30.0)])
    assert not is_explained(orphan, [])


def test_a_table_replaces_only_its_own(tmp_path: Path) -> None:
    file = tmp_path / "reliability.md"
    file.write_text(
        "a\n<!-- chaos embedded begins -->\nold\n<!-- chaos embedded ends -->\n"
        "b\n<!-- chaos compose begins -->\n<!-- chaos compose ends -->\nc\n"
    )
    row = Row(fault="pause nats", kind="embedded", acked=50, failed=1, answered=9, lands_s=1.25)
    report.write("embedded", report.section([row], "make chaos", "all"), file)
    report.write("embedded", report.section([row], "make chaos", "all"), file)
    text = file.read_text()
    assert "old" not in text
    assert text.count("| pause nats | embedded | 50 | 0 | 0 | 0 | 0 | 0 | 1 of 10 | 1.2 |") == 1
    assert text.startswith("a\n")
    assert text.endswith("b\n<!-- chaos compose begins -->\n<!-- chaos compose ends -->\nc\n")
