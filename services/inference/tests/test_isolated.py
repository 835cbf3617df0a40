"""A model in a worker: what it takes, computes and gives, and what it may not."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from libs.contracts.artifacts import Tensor
from services.inference import isolated
from services.inference.isolated import Isolated
from services.inference.models import Crashed, RunFailed, Unloadable
from services.inference.tests import workers
from services.inference.tests.test_models import graph, resident_bytes
from services.inference.tests.workers import (
    BAD,
    CALM,
    DECOUPLED,
    ONE,
    SYNCHRONOUS,
    TORN,
    Make,
    held,
    pid_of,
)
from services.inference.worker import Spec


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Make]:
    with workers.kept(tmp_path) as make:
        yield make


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


def test_streams_of_a_model_with_threads_of_its_own_do_not_wait_for_each_other(made: Make) -> None:
    model = made(DECOUPLED, decoupled=True)
    slow = model.stream({"x": np.array([[100, 0]], np.float32)})
    next(slow)
    assert len(list(model.stream({"x": np.array([[5, 0]], np.float32)}))) == 5
    assert len(list(slow)) == 99


def test_streams_of_a_model_without_threads_come_one_after_the_other(made: Make) -> None:
    model = made(SYNCHRONOUS, decoupled=True)
    first = model.stream({"x": np.array([[100, 0]], np.float32)})
    next(first)
    second = model.stream({"x": np.array([[5, 0]], np.float32)})
    next(second)
    assert len(list(first)) == 99
    assert len(list(second)) == 4


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


def test_shared_batches_leave_nothing(made: Make) -> None:
    model = made(CALM)
    given = np.ones((1 << 20, 2), np.float32)
    model.run({"x": given})
    before, size = held(), resident_bytes()
    for _ in range(40):
        model.run({"x": given})
    assert all(now <= was for now, was in zip(held(), before, strict=True))
    assert resident_bytes() - size < 3 * given.nbytes
