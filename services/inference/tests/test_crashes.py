"""Nothing a model in a worker does to its process hurts more than its own batch."""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from services.inference import isolated, process
from services.inference.models import Crashed, RunFailed, Unloadable
from services.inference.tests import workers
from services.inference.tests.test_models import graph
from services.inference.tests.workers import (
    BAD,
    CALM,
    DECOUPLED,
    ONE,
    SIGNATURE,
    SYNCHRONOUS,
    TORN,
    Make,
    held,
    pid_of,
)
from stack.testing import eventually


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Make]:
    with workers.kept(tmp_path) as make:
        yield make


@pytest.mark.parametrize(
    ("fall", "cause"),
    [
        ("ctypes.string_at(0)", r"died of signal 11 \(SIGSEGV\) while it ran a batch.*in execute"),
        ("os._exit(7)", "ended with exit code 7 while it ran a batch; it said: about to fall"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"died of signal 9 \(SIGKILL\)"),
        ("os.abort()", r"died of signal 6 \(SIGABRT\)"),
    ],
)
def test_a_crash_is_one_batchs_error_and_says_its_cause(made: Make, fall: str, cause: str) -> None:
    causes: list[str] = []
    model = made(TORN.format(fall=fall), on_crash=causes.append)
    for crashes in (1, 2):
        with pytest.raises(Crashed, match=f"worker of model 'torn' version 3 {cause}") as caught:
            model.run({"x": BAD})
        assert model.run({"x": ONE})["y"].tolist() == [[1, 2]]
        assert model.crashes == crashes
        assert causes[-1] == str(caught.value)
    assert len(causes) == 2


def test_a_worker_killed_while_idle_is_back_too(made: Make) -> None:
    causes: SimpleQueue[str] = SimpleQueue()
    model = made(CALM, on_crash=causes.put)
    first = pid_of(model)
    os.kill(first, signal.SIGKILL)
    cause = causes.get(timeout=60)
    assert model.run({"x": ONE})["y"].tolist() == [[2, 3]]
    assert pid_of(model) != first
    assert cause.endswith("(SIGKILL)")


async def test_a_worker_that_does_not_start_again_is_tried_again(
    made: Make, tmp_path: Path
) -> None:
    causes: SimpleQueue[str] = SimpleQueue()
    flag = tmp_path / "flag"
    initialize = f"""
        def initialize(self, args):
            assert not os.path.exists("{flag}"), "not now"
    """
    model = made(TORN.format(fall="os._exit(1)") + initialize, on_crash=causes.put)
    flag.touch()
    with pytest.raises(Crashed, match="exit code 1 while it ran"):
        model.run({"x": BAD})
    assert causes.get(timeout=60).endswith(
        "exit code 1 while it ran a batch; it said: about to fall"
    )
    for _ in range(2):
        assert "version 3 did not start: AssertionError: not now" in causes.get(timeout=60)
    with pytest.raises(Crashed, match="crashed and is not back yet"):
        model.run({"x": ONE})
    flag.unlink()
    await eventually(model.up.is_set)
    assert model.run({"x": ONE})["y"].tolist() == [[1, 2]]


def test_a_worker_that_falls_again_and_again_waits_longer_each_time() -> None:
    pauses_s = [isolated.pause_s(falls) for falls in range(12)]
    assert pauses_s[:5] == [0, 0, 0.5, 1, 2]
    assert pauses_s[-1] == isolated.BACKOFF_S_MAX


def test_a_model_that_hangs_is_killed(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "RUN_S_MAX", 0.5)
    model = made(TORN.format(fall="threading.Event().wait()"))
    with pytest.raises(Crashed, match=r"was killed: it gave no answer for 0\.5 s while it ran"):
        model.run({"x": BAD})
    assert model.run({"x": ONE})["y"].tolist() == [[1, 2]]


def test_a_stream_that_is_silent_is_killed(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "RUN_S_MAX", 0.5)
    falls = DECOUPLED.replace("if x[0, 1] < 0:", "if x[0, 1] < 0:\n                Event().wait()")
    model = made("    from threading import Event\n" + falls, decoupled=True)
    stream = model.stream({"x": np.array([[1, -1]], np.float32)})
    assert next(stream)["y"].tolist() == [[1, -1]]
    with pytest.raises(Crashed, match=r"was killed: it gave no answer for 0\.5 s"):
        next(stream)


def test_streams_that_wait_for_each_other_are_not_silent(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of them is told nothing for longer than a silence may be: others are."""
    monkeypatch.setattr(isolated, "RUN_S_MAX", 2.0)
    slowly = SYNCHRONOUS.replace(
        "def execute", "def wait(self): threading.Event().wait(0.8)\n\n        def execute"
    )
    slowly = slowly.replace("x = x_of(request)", "x = x_of(request); self.wait()")
    model = made(slowly, decoupled=True)

    def ask(count: int) -> int:
        return len(list(model.stream({"x": np.array([[count, 0]], np.float32)})))

    with ThreadPoolExecutor(4) as callers:
        assert list(callers.map(ask, range(1, 5))) == [1, 2, 3, 4]
    assert model.crashes == 0


async def test_a_worker_that_cannot_be_started_is_tried_again(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(CALM)
    with monkeypatch.context() as nowhere:
        nowhere.setattr(process, "PYTHON", "/nowhere/python")
        os.kill(pid_of(model), signal.SIGKILL)
        await eventually(lambda: model.falls > 1)
    await eventually(model.up.is_set)
    assert model.run({"x": ONE})["y"].tolist() == [[2, 3]]


def test_a_model_whose_worker_cannot_be_started_is_not_loaded(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PYTHON", "/nowhere/python")
    with pytest.raises(Unloadable, match=r"cannot be started: .*/nowhere/python"):
        made(CALM)


async def test_what_a_model_started_ends_with_it(made: Make) -> None:
    model = made(
        """
        class TritonPythonModel:
            def initialize(self, args):
                self.other = __import__("subprocess").Popen(["sleep", "1000"])

            def execute(self, requests):
                return [answer(np.array([[self.other.pid, 0]], np.float64))]
        """
    )
    started = int(model.run({"x": ONE})["y"][0, 0])
    assert is_alive(started)
    os.kill(pid_of(model), signal.SIGKILL)
    await eventually(lambda: not is_alive(started))
    assert model.run({"x": ONE})["y"][0, 0] != started


def test_a_batch_that_cannot_be_sent_is_its_own_error(made: Make) -> None:
    """No descriptor is left for the shared memory of a large one."""
    model = made(CALM)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(RunFailed, match=r"torn could not be asked: .*Too many open files"):
            model.run({"x": np.ones((1 << 20, 2), np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert model.run({"x": ONE})["y"].tolist() == [[2, 3]]


async def test_a_line_without_end_is_heard_in_pieces(made: Make) -> None:
    model = made(TORN.format(fall="sys.stdout.write('a' * 100_000)"))
    assert model.worker is not None
    lines = model.worker.lines
    model.run({"x": BAD})
    await eventually(lambda: len(lines) >= 10)
    assert max(map(len, lines)) <= isolated.LINE_CHARS_MAX


def test_a_crash_ends_every_stream(made: Make) -> None:
    falls = DECOUPLED.replace("if x[0, 1] < 0:", "if x[0, 1] < 0:\n                os._exit(9)")
    model = made(falls, decoupled=True)
    with pytest.raises(Crashed, match="exit code 9"):
        list(model.stream({"x": np.array([[2, -1]], np.float32)}))
    assert len(list(model.stream({"x": np.array([[2, 0]], np.float32)}))) == 2


PARENT = """
import sys
from services.inference.isolated import in_worker
from libs.contracts.artifacts import Signature
model = in_worker("digits", "", open(sys.argv[1], "rb").read(), Signature([], []))
print(model.worker.process.pid, flush=True)
sys.stdin.read()
"""


async def test_a_worker_ends_with_the_service_even_when_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph("Identity", "FP32", ["rows", 2]))
    service = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PARENT,
        str(path),
        cwd=process.ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert service.stdout is not None
    worker = int(await service.stdout.readline())
    assert is_alive(worker)
    service.kill()
    await service.wait()
    await eventually(lambda: not is_alive(worker))


def is_alive(pid: int) -> bool:
    """A zombie is not: whoever adopted it may never wait for it."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_graph_of_the_platform_runs_in_a_worker_and_is_back_after_a_crash() -> None:
    model = isolated.in_worker("digits", "d", graph("Identity", "FP32", ["rows", 2]), SIGNATURE)
    try:
        assert model.run({"x": ONE})["y"].tolist() == [[1, 2]]
        os.kill(pid_of(model), signal.SIGKILL)
        with contextlib.suppress(Crashed):
            model.run({"x": ONE})
        assert model.run({"x": ONE})["y"].tolist() == [[1, 2]]
    finally:
        model.close()


def test_a_crash_under_load_is_one_requests(made: Make) -> None:
    """Eight callers wait their turn; one of them falls, and the others are answered."""
    model = made(TORN.format(fall="os._exit(1)"))
    given = [BAD if number == 100 else ONE for number in range(200)]

    def ask(array: Any) -> bool:
        try:
            return bool((model.run({"x": array})["y"] == ONE).all())
        except Crashed:
            return False

    with ThreadPoolExecutor(8) as callers:
        answered = list(callers.map(ask, given))
    assert [number for number, right in enumerate(answered) if not right] == [100]
    assert model.crashes == 1


async def test_nothing_of_a_closed_or_fallen_worker_is_held() -> None:
    """A joined thread is gone for the kernel a moment later."""
    built = graph("Identity", "FP32", ["rows", 2])
    before = held()
    for _ in range(10):
        model = isolated.in_worker("digits", "", built, SIGNATURE)
        os.kill(pid_of(model), signal.SIGKILL)
        with contextlib.suppress(Crashed):
            model.run({"x": ONE})
        model.run({"x": ONE})
        model.close()
    await eventually(lambda: held() == before)
