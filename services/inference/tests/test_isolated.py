"""A model in a worker: what it computes, and that nothing it does hurts more than its own batch."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import pytest

from libs.contracts.artifacts import Signature, Tensor
from services.inference import isolated
from services.inference.isolated import Isolated
from services.inference.models import Crashed, RunFailed, Unloadable
from services.inference.tests.test_models import graph, resident_bytes
from services.inference.worker import Spec
from stack.testing import eventually

SIGNATURE = Signature([Tensor("x", "FP32", [-1, 2])], [Tensor("y", "FP32", [-1, 2])])
PRELUDE = """
    import ctypes, os, signal, sys, threading
    import numpy as np
    import triton_python_backend_utils as pb_utils

    def x_of(request):
        return pb_utils.get_input_tensor_by_name(request, "x").as_numpy()

    def answer(array):
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", array)])
"""
CALM = """
    class TritonPythonModel:
        def execute(self, requests):
            return [answer(x_of(request) + 1) for request in requests]
"""
TORN = """
    class TritonPythonModel:
        def execute(self, requests):
            x = x_of(requests[0])
            if x[0, 0] < 0:
                print("about to fall")
                {fall}
            return [answer(x)]
"""
DECOUPLED = """
    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                sender = request.get_response_sender()
                threading.Thread(target=self.say, args=[sender, x_of(request)]).start()

        def say(self, sender, x):
            for n in range(int(x[0, 0])):
                sender.send(answer(x + n))
            if x[0, 1] < 0:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("enough")))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
ONE = np.array([[1, 2]], np.float32)
BAD = np.array([[-1, 2]], np.float32)
Make = Callable[..., Isolated]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Make]:
    models: list[Isolated] = []

    def make(code: str, signature: Signature = SIGNATURE, **stated: Any) -> Isolated:
        place = tmp_path / "model" / "3"
        place.mkdir(parents=True)
        text = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
        (place / "model.py").write_text(text)
        limits = {
            name: stated.pop(name) for name in ("config", "memory_bytes_max") if name in stated
        }
        spec = Spec(
            name="torn",
            version="3",
            kind="python",
            file=str(place / "model.py"),
            folder=str(place.parent),
            batched=True,
            **limits,
        )
        models.append(Isolated(spec, signature=signature, **stated))
        return models[-1]

    yield make
    for model in models:
        model.close()


def pid_of(model: Isolated) -> int:
    assert model.worker is not None
    return model.worker.process.pid


def test_a_model_of_triton_is_served_as_it_is(made: Make) -> None:
    model = made(
        """
        class TritonPythonModel:
            def initialize(self, args):
                self.config = __import__("json").loads(args["model_config"])
                self.named = (args["model_name"], args["model_version"], args["model_repository"])
                self.kind = pb_utils.triton_string_to_numpy(
                    pb_utils.get_output_config_by_name(self.config, "y")["data_type"]
                )

            def execute(self, requests):
                pb_utils.Logger.log_info("here")
                assert self.named[:2] == ("torn", "3")
                assert os.path.isdir(self.named[2] + "/3")
                return [answer((x_of(one) * 2).astype(self.kind)) for one in requests]
        """,
        config='{"output": [{"name": "y", "data_type": "TYPE_FP64"}]}',
    )
    outputs = model.run({"x": ONE})
    assert outputs["y"].dtype == np.float64
    assert outputs["y"].tolist() == [[2, 4]]
    assert (model.platform, model.batched, model.decoupled) == ("python", True, False)


@pytest.mark.parametrize("kind", ["?", "<u2", "<i8", "<f2", "<f8", "|i1"])
def test_every_kind_of_array_travels(made: Make, kind: str) -> None:
    model = made(CALM.replace("+ 1", ""))
    given = np.array([[0, 1], [1, 0]], kind)
    given_back = model.run({"x": given})["y"]
    assert given_back.dtype == given.dtype
    assert given_back.tolist() == given.tolist()


def test_strings_are_bytes_to_the_model_and_back(made: Make) -> None:
    model = made(
        """
        class TritonPythonModel:
            def execute(self, requests):
                x = x_of(requests[0])
                assert all(isinstance(one, bytes) for one in x.flat)
                return [answer(np.array([[one + b"\\xff" for one in row] for row in x], object))]
        """
    )
    outputs = model.run({"x": np.array([["é", b"\x00"], ["", "long" * 50_000]], object)})
    assert outputs["y"].tolist() == [
        ["é".encode() + b"\xff", b"\x00\xff"],
        [b"\xff", b"long" * 50_000 + b"\xff"],
    ]


@pytest.mark.parametrize("rows", [0, 1, 20_463, 20_464, 20_480, 500_000])
def test_batches_of_any_size_arrive_whole(made: Make, rows: int) -> None:
    """Around 160 KiB, where they go over to shared memory; and strided ones."""
    given = np.random.default_rng(rows).random((2, rows), np.float32).T
    assert (made(CALM).run({"x": given})["y"] == given + 1).all()


@pytest.mark.parametrize(
    ("fall", "why"),
    [
        ("raise KeyError('no such thing')", "KeyError: 'no such thing'"),
        ("sys.exit(3)", "SystemExit: 3"),
        ("return []", "0 responses for 1 request"),
        ("return None", "gave no answer"),
    ],
)
def test_what_the_model_raises_is_one_batchs_error(made: Make, fall: str, why: str) -> None:
    model = made(TORN.format(fall=fall))
    worker = pid_of(model)
    with pytest.raises(RunFailed, match=why):
        model.run({"x": BAD})
    assert model.run({"x": ONE})["y"].tolist() == [[1, 2]]
    assert pid_of(model) == worker
    assert model.crashes == 0


def test_more_memory_than_it_may_take_is_an_error(made: Make) -> None:
    model = made(TORN.format(fall="np.ones(1 << 29)"), memory_bytes_max=1 << 30)
    with pytest.raises(RunFailed, match=r"Unable to allocate 4\.00 GiB"):
        model.run({"x": BAD})
    assert model.run({"x": ONE})["y"].tolist() == [[1, 2]]


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


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: .*nowhere_to_be_found"),
        ("os._exit(5)", "worker of model 'torn' version 3 ended with exit code 5"),
        ("class TritonPythonModel:\n        def initialize(self, args): 1 / 0", "ZeroDivision"),
    ],
)
def test_what_does_not_start_is_not_loaded(made: Make, code: str, why: str) -> None:
    with pytest.raises(Unloadable, match=f"failed to load 'torn': {why}"):
        made("    " + code + "\n")


def test_a_decoupled_model_answers_as_often_as_it_likes(made: Make) -> None:
    model = made(DECOUPLED, decoupled=True)
    for count in (3, 0, 1):
        given = np.array([[count, 0]], np.float32)
        found = [one["y"].tolist() for one in model.stream({"x": given})]
        assert found == [[[count + n, n]] for n in range(count)]


def test_streams_of_one_model_do_not_wait_for_each_other(made: Make) -> None:
    model = made(DECOUPLED, decoupled=True)
    slow = model.stream({"x": np.array([[100, 0]], np.float32)})
    next(slow)
    assert len(list(model.stream({"x": np.array([[5, 0]], np.float32)}))) == 5
    assert len(list(slow)) == 99


def test_an_error_ends_a_stream_after_what_was_said(made: Make) -> None:
    stream = made(DECOUPLED, decoupled=True).stream({"x": np.array([[1, -1]], np.float32)})
    assert next(stream)["y"].tolist() == [[1, -1]]
    with pytest.raises(RunFailed, match="enough"):
        next(stream)


def test_a_stream_that_nobody_reads_does_not_grow(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated, "ANSWERS_WAITING_MAX", 4)
    model = made(DECOUPLED, decoupled=True)
    slow = model.stream({"x": np.array([[5000, 0]], np.float32)})
    next(slow)
    list(model.stream({"x": np.array([[0, 0]], np.float32)}))
    with pytest.raises(RunFailed, match="4 answers wait already"):
        list(slow)


def test_a_crash_ends_every_stream(made: Make) -> None:
    falls = DECOUPLED.replace("if x[0, 1] < 0:", "if x[0, 1] < 0:\n                os._exit(9)")
    model = made(falls, decoupled=True)
    with pytest.raises(Crashed, match="exit code 9"):
        list(model.stream({"x": np.array([[2, -1]], np.float32)}))
    assert len(list(model.stream({"x": np.array([[2, 0]], np.float32)}))) == 2


def test_its_last_word_is_said_when_it_is_closed(
    made: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    model = made(CALM + "\n        def finalize(self): print('farewell')\n")
    worker = pid_of(model)
    model.close()
    assert "farewell" in caplog.text
    with pytest.raises(Crashed, match="was told to end"):
        model.run({"x": ONE})
    assert not Path(f"/proc/{worker}").exists()


def test_a_worker_has_no_settings_and_no_files_of_the_service(
    made: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LEPTONIC_TOKEN", "hush")
    with (tmp_path / "private").open("w") as private:
        os.set_inheritable(private.fileno(), True)
        model = made(
            """
            class TritonPythonModel:
                def execute(self, requests):
                    files = "/proc/self/fd"
                    names = [os.path.realpath(f"{files}/{n}") for n in os.listdir(files)]
                    seen = "hush" in os.environ.values() or any("private" in one for one in names)
                    return [answer(np.array([[seen]]))]
            """
        )
        assert model.run({"x": ONE})["y"].tolist() == [[False]]


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
        cwd=isolated.ROOT,
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


def test_many_threads_share_a_worker(made: Make) -> None:
    model = made(CALM)
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(50):
            given = np.full((1, 2), number, np.float32)
            if model.run({"x": given})["y"].tolist() != [[number + 1] * 2]:
                wrong.append(number)

    threads = [Thread(target=ask, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_graph_runs_in_a_worker_too(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph("Identity", "BF16", ["rows", 2]))
    spec = Spec(
        name="ops", version="1", kind="onnx", file=str(path), folder=str(tmp_path), batched=True
    )
    model = Isolated(spec)
    try:
        assert model.signature.outputs == [Tensor("y", "BF16", [-1, 2])]
        assert model.run({"x": np.array([[7, 8]], "<u2")})["y"].tolist() == [[7, 8]]
        with pytest.raises(RunFailed, match="Invalid rank"):
            model.run({"x": np.array([7], "<u2")})
    finally:
        model.close()


def test_a_library_of_ops_that_is_none_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph("Op", "FP32", ["rows"], domain="their.domain"))
    spec = Spec(
        name="ops",
        version="1",
        kind="onnx",
        file=str(path),
        folder=str(tmp_path),
        libraries=[str(tmp_path / "libops.so")],
        batched=True,
    )
    with pytest.raises(Unloadable, match=r"failed to load 'ops': .*libops\.so"):
        Isolated(spec)


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


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))


def test_nothing_of_a_closed_or_fallen_worker_is_held() -> None:
    built = graph("Identity", "FP32", ["rows", 2])
    before = held()
    for _ in range(10):
        model = isolated.in_worker("digits", "", built, SIGNATURE)
        os.kill(pid_of(model), signal.SIGKILL)
        with contextlib.suppress(Crashed):
            model.run({"x": ONE})
        model.run({"x": ONE})
        model.close()
    assert held() == before


def test_shared_batches_leave_nothing(made: Make) -> None:
    model = made(CALM)
    given = np.ones((1 << 20, 2), np.float32)
    model.run({"x": given})
    before, size = held(), resident_bytes()
    for _ in range(40):
        model.run({"x": given})
    assert held() == before
    assert resident_bytes() - size < 3 * given.nbytes
