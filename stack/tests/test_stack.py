"""The real supervisor, in a process of its own, over the real servers."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from stack import ports
from stack.servers import answers
from stack.supervisor import backoff_s
from stack.testing import eventually

ENDS_S = 15.0
CODE = (
    "import sys; from stack import app; from stack.tests import tables;"
    "sys.exit(app.main(sys.argv[2:], eval(sys.argv[1])))"
)


def launch(folder: Path, table: str, mode: str = "auto") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CODE, table, "--data-dir", str(folder), "--ports", mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextmanager
def up(folder: Path, table: str = "app.servers_and_collector") -> Iterator[subprocess.Popen[str]]:
    """A stack that is ready; stopped after the block, if it runs until then."""
    process = launch(folder, table)
    try:
        until_said(process, "ready: ")
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=ENDS_S)


def until_said(process: subprocess.Popen[str], text: str) -> str:
    """Everything up to the line with the text; fails when it ends without."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"ended with {process.wait()}: {said}")


def state(folder: Path) -> Any:
    return json.loads((folder / "stack.json").read_text())


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return list(psutil.Process(process.pid).children(recursive=True))


def assert_all_end(processes: list[psutil.Process]) -> None:
    assert processes
    _, alive = psutil.wait_procs(processes, timeout=ENDS_S)
    assert [one.cmdline() for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


async def test_up_tells_where_everything_is_and_down_leaves_nothing(tmp_path: Path) -> None:
    with up(tmp_path) as process:
        told = state(tmp_path)
        assert psutil.Process(told["pid"]).ppid() == process.pid
        assert {n for n, p in told["processes"].items() if p["ready"] and not p["restarts"]} == {
            *("nats", "postgres", "s3", "collector")
        }
        assert (tmp_path / "stack.json").stat().st_mode & 0o777 == 0o600
        assert await answers(told["ports"]["traces"], "/v1/services")
        started = family(process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=ENDS_S)
        assert process.returncode == 0, output
        assert_all_end(started)
    after = state(tmp_path)
    assert (after["pid"], after["processes"]) == (None, {})
    assert after["secrets"] == told["secrets"]


async def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    with up(tmp_path):
        before = state(tmp_path)["processes"]
        for one in before.values():
            os.kill(one["pid"], signal.SIGKILL)

        def all_are_back() -> bool:
            now = state(tmp_path)["processes"].items()
            return all(
                p["ready"] and p["restarts"] and p["pid"] != before[n]["pid"] for n, p in now
            )

        await eventually(all_are_back)


async def test_nothing_is_left_of_a_killed_supervisor_and_it_starts_again(tmp_path: Path) -> None:
    with up(tmp_path) as process:
        started = family(process)
        before = state(tmp_path)
        os.kill(before["pid"], signal.SIGKILL)
        with up(tmp_path):
            assert process.wait(ENDS_S) == 128 + signal.SIGKILL
            assert_all_end(started)
            assert state(tmp_path)["ports"] == before["ports"]


async def test_a_newer_process_takes_over_and_one_that_fails_does_not(tmp_path: Path) -> None:
    with up(tmp_path, "tables.replaceable"):
        first = state(tmp_path)["processes"]["door"]["pid"]
        assert leptonic_roll(tmp_path, "door") == {"rolled": ["door"]}
        told = state(tmp_path)
        second = told["processes"]["door"]
        assert second["pid"] != first
        assert (second["restarts"], second["ready"]) == (0, True)
        assert not psutil.pid_exists(first)
        assert (tmp_path / "roll.json").stat().st_mode & 0o777 == 0o600
        (tmp_path / "broken").touch()
        assert "door was not replaced and goes on as it was" in leptonic_roll(tmp_path, "door")
        assert state(tmp_path)["processes"]["door"] == second
        assert "no service is called 'window'" in leptonic_roll(tmp_path, "window")


def leptonic_roll(folder: Path, service: str) -> Any:
    """What `leptonic up --roll` answers; its words where it fails."""
    leptonic = str(Path(sys.executable).with_name("leptonic"))
    line = [leptonic, "up", "--roll", "--json", "--data-dir", str(folder), service]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if done.stderr else 0)
    if done.stderr:
        return done.stderr
    answer = json.loads(done.stdout)
    assert answer.pop("seconds") >= 0
    return answer


@pytest.mark.parametrize("of", ["the supervisor", "its guard"])
async def test_a_kill_leaves_not_even_a_child_in_a_session_of_its_own(
    tmp_path: Path, of: str
) -> None:
    with up(tmp_path, "tables.leaving_strays") as process:
        started = family(process)
        assert int((tmp_path / "stray").read_text()) in [one.pid for one in started]
        pid = process.pid if of == "its guard" else state(tmp_path)["pid"]
        os.kill(pid, signal.SIGKILL)
        assert_all_end(started)


async def test_a_second_stack_on_one_folder_names_the_first(tmp_path: Path) -> None:
    with up(tmp_path, "tables.leaving_strays") as process:
        told = (tmp_path / "stack.json").read_bytes()
        second = launch(tmp_path, "tables.leaving_strays")
        output, _ = second.communicate(timeout=ENDS_S)
        assert second.returncode == 1
        assert f"already runs on {tmp_path} (pid {state(tmp_path)['pid']})" in output
        assert (tmp_path / "stack.json").read_bytes() == told
        assert process.poll() is None


def test_a_port_in_use_is_named_with_its_component_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ports.is_free(ports.DOORS["nats"]):
            taken.bind((ports.LOOPBACK, ports.DOORS["nats"]))
            taken.listen()
        process = launch(tmp_path, "tables.leaving_strays", mode="fixed")
        output, _ = process.communicate(timeout=ENDS_S)
    assert process.returncode == 1
    assert "port 4222, which nats needs" in output
    assert not (tmp_path / "logs").exists()


async def test_what_a_killed_program_leaves_is_ended(tmp_path: Path) -> None:
    with up(tmp_path, "tables.leaving_strays"):
        stray = psutil.Process(int((tmp_path / "stray").read_text()))
        os.kill(state(tmp_path)["processes"]["mother"]["pid"], signal.SIGKILL)
        assert_all_end([stray])
        await eventually(lambda: state(tmp_path)["processes"]["mother"]["restarts"] == 1)
        assert state(tmp_path)["processes"]["needy"]["restarts"] == 0


async def test_a_stack_whose_output_nobody_reads_keeps_running(tmp_path: Path) -> None:
    with up(tmp_path, "tables.leaving_strays") as process:
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        os.kill(state(tmp_path)["processes"]["mother"]["pid"], signal.SIGKILL)
        await eventually(lambda: state(tmp_path)["processes"]["mother"]["restarts"] == 1)
        process.terminate()
        assert process.wait(ENDS_S) == 0


async def test_what_a_program_leaves_is_ended_with_the_stack(tmp_path: Path) -> None:
    with up(tmp_path, "tables.leaving_strays") as process:
        stray = psutil.Process(int((tmp_path / "stray").read_text()))
        process.terminate()
        assert process.wait(ENDS_S) == 0
        assert_all_end([stray])


def test_a_failing_program_is_tried_again_with_backoff(tmp_path: Path) -> None:
    process = launch(tmp_path, "tables.failing")
    said = until_said(process, "ready: ")
    process.terminate()
    process.communicate(timeout=ENDS_S)
    assert [f"ended with 7; starting again in {s} s" in said for s in (0.1, 0.2, 0.4, 0.8)] == [
        *(True, True, True, False)
    ]


@pytest.mark.parametrize(("failures", "pause"), [(0, 0.1), (1, 0.2), (6, 5.0), (10_000, 5.0)])
def test_backoff_doubles_up_to_a_bound(failures: int, pause: float) -> None:
    assert backoff_s(failures) == pause


def test_ports_are_chosen_again_unless_taken() -> None:
    first = ports.choose("auto", {})
    assert len(set(first.values())) == len(first)
    assert ports.choose("auto", first) == first
    with socket.create_server((ports.LOOPBACK, first["postgres"])):
        second = ports.choose("auto", first)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {"postgres"}
