"""`leptonic serve` as a stranger meets it: what it says, what it answers, how it ends."""

import contextlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.inference.tests.test_repository import put
from stack.testing import eventually

END_S = 60
URL = re.compile(r"HTTP (http://[^,]+), gRPC (\S+), metrics (\S+)")


class Running:
    def __init__(self, process: "subprocess.Popen[str]", lines: list[str]) -> None:
        self.process = process
        self.lines = lines
        """What it said until its doors were open."""
        (found,) = (match for line in lines if (match := URL.match(line)))
        self.http, self.grpc, self.metrics = found.groups()

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> Any:
        how = "POST" if body else "GET"
        answer = httpx.request(
            how, self.http + path, content=body, headers=headers, timeout=END_S
        ).raise_for_status()
        return answer.json()

    def is_ready(self, model: str) -> bool:
        answer = httpx.get(f"{self.http}/v2/models/{model}/ready", timeout=END_S)
        return answer.is_success


def line(root: Path, *options: str) -> list[str]:
    any_port = [f"--{door}-port=0" for door in ("http", "grpc", "metrics")]
    return [sys.executable, "-m", "services.inference.serve", str(root), *any_port, *options]


@contextlib.contextmanager
def running(root: Path, *options: str) -> Iterator[Running]:
    process = subprocess.Popen(
        line(root, *options), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            lines = []
            for said in process.stdout:
                lines.append(said.strip())
                if said.startswith("grpcurl"):
                    break
            yield Running(process, lines)
        finally:
            process.terminate()


def failed(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line(root, *options), capture_output=True, text=True, timeout=END_S)


def test_it_says_what_is_served_and_how_to_ask(tmp_path: Path) -> None:
    put(tmp_path, "double", factor=2)
    put(tmp_path, "typo", config="max_batch: 8")
    with running(tmp_path) as server:
        assert server.lines[0] == (
            "model 'double' version 1, onnxruntime_onnx: x FP32[-1,2] -> y FP32[-1,2]"
        )
        assert server.lines[1].startswith("model 'typo' is not served: ")
        assert "config.pbtxt, line 1" in server.lines[1]
        (example,) = (shlex.split(one) for one in server.lines if one.startswith("curl"))
        assert example[2] == f"{server.http}/v2/models/double/infer"
        answer = server.ask("/v2/models/double/infer", example[4].encode())
        assert answer["outputs"][0]["data"] == [0, 0]
        metrics = httpx.get(server.metrics, timeout=END_S).text
        assert 'nv_inference_count{model="double",version="1"} 1' in metrics


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_it_is_told(tmp_path: Path, number: signal.Signals) -> None:
    put(tmp_path, "m")
    with running(tmp_path) as server:
        server.process.send_signal(number)
        assert server.process.wait(END_S) == 0


def test_it_asks_for_its_tokens(tmp_path: Path) -> None:
    put(tmp_path, "m")
    with running(tmp_path, "--token=one", "--token=two", "--server-name=mine") as server:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            server.ask("/v2")
        assert server.ask("/v2", authorization="Bearer two")["name"] == "mine"


async def test_it_follows_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "first")
    with running(tmp_path, "--model-control-mode=poll", "--poll-s=0.1") as server:
        put(tmp_path, "second")
        await eventually(lambda: server.is_ready("second"), END_S)
        assert server.is_ready("first")


def test_where_nothing_can_be_served_it_says_why(tmp_path: Path) -> None:
    done = failed(tmp_path)
    assert done.returncode == 1
    assert "no model: neither <model>/<version>/model.onnx" in done.stderr
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"no graph")
    done = failed(file)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("leptonic serve: nothing can be served: model 'broken' version 1 is not")


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    put(tmp_path, "m")
    with running(tmp_path) as server:
        taken = server.http.rpartition(":")[2]
        done = failed(tmp_path, f"--http-port={taken}")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("leptonic serve: ")


def test_it_loads_nothing_of_the_platform() -> None:
    """They were a third of the start-up."""
    unwanted = "{'psycopg', 'nats', 'minio', 'ray', 'torch', 'onnx', 'pyarrow'}"
    code = f"import sys, services.inference.serve; print({unwanted} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
