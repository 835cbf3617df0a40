"""Clients that nobody here wrote, against `leptonic serve` on the fixture models.

`make conformance` prints how many of each pass and ends with 1 when one does not. The example
scripts of tritonclient are taken as they are from a checkout of the client repository, which
TRITON_EXAMPLES names; without it they are not run, and the last line says so. docs/inference.md
names the commits.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.peers.environments import Unavailable, installed
from stack import ports
from tests.conformance import fixtures

ROOT = Path(__file__).resolve().parents[2]
LEPTONIC = str(Path(sys.executable).with_name("leptonic"))
FOLDER_VARIABLE = "TRITON_EXAMPLES"
FRONT_VARIABLE = "LEPTONIC_INFERENCE_FRONT"
BELOW = Path("src/python/examples")
"""Where a checkout has them."""
READY_S = 60.0
POLL_S = 0.05
SCRIPT_S = 120.0
SUITE_S = 900.0
BATCH = 20
PASSED = re.compile(r"(\d+) passed of (\d+)")
FAILURE_LINES = 15
SERVER_NAME = "triton"
"""Two of the examples ask for it."""
GRPC = (
    "async_infer_client", "custom_args_client", "custom_repeat", "health_metadata", "infer_client",
    "keepalive_client", "model_control", "sequence_stream_infer_client",
    "sequence_sync_infer_client", "shm_client", "shm_string_client", "string_infer_client",
    "aio_infer_client", "aio_sequence_stream_infer_client",
)  # fmt: skip
HTTP = (
    "async_infer_client", "health_metadata", "infer_client", "model_control",
    "sequence_sync_infer_client", "shm_client", "shm_string_client", "string_infer_client",
    "aio_infer_client",
)  # fmt: skip
REUSE = "reuse_infer_objects_client"
EXAMPLES = (*(f"simple_grpc_{n}" for n in GRPC), *(f"simple_http_{n}" for n in HTTP), REUSE)
CONTROL = "model_control"
COUNTED = re.compile(r"get_model_repository_index\(\)(?:\.models)?\) != (\d+)")
"""How many models a control example expects to find."""


class Server(NamedTuple):
    http: str
    grpc: str


class Told(NamedTuple):
    """What came of one client: passed of all, and the last words of what failed."""

    client: str
    passed: int
    of: int
    failures: Sequence[str] = ()


@contextlib.contextmanager
def serving(root: Path, *options: str, front: str = "") -> Iterator[Server]:
    """`leptonic serve` on free ports, until the block ends. Raises `RuntimeError`."""
    environment = os.environ | ({FRONT_VARIABLE: front} if front else {})
    http, grpc, metrics = ports.free(3)
    line = [LEPTONIC, "serve", str(root), "--server-name", SERVER_NAME]
    line += ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            [*line, *options], stdout=words, stderr=words, cwd=ROOT, env=environment
        )
        try:
            wait_ready(process, http)
            yield Server(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")
        except RuntimeError as error:
            words.seek(0)
            raise RuntimeError(f"{error}:\n{words.read()}") from error
        finally:
            process.terminate()
            process.wait(READY_S)


def wait_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + READY_S
    url = f"http://127.0.0.1:{port}/v2/health/ready"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
    raise RuntimeError(f"the server was not ready within {READY_S:.0f} s")


def scripts_of(said: str) -> Path:
    folder = Path(said).expanduser()
    return folder / BELOW if (folder / BELOW).is_dir() else folder


def runs_of(name: str, server: Server) -> list[list[str]]:
    """The options of each run of an example."""
    if name == REUSE:
        return [["-i", "HTTP", "-u", server.http], ["-i", "gRPC", "-u", server.grpc]]
    url = ["-u", server.grpc if "_grpc_" in name else server.http]
    if "_sequence_" in name:
        return [url, [*url, "--dyna"]]
    return [url]


def run(python: Path, script: Path, options: Sequence[str]) -> str:
    """ "" when it passed, else what it said last."""
    try:
        done = subprocess.run(
            [python, script, *options], capture_output=True, text=True, timeout=SCRIPT_S
        )
    except subprocess.TimeoutExpired:
        return f"not over within {SCRIPT_S:.0f} s"
    if done.returncode == 0:
        return ""
    words = (done.stdout + done.stderr).strip().splitlines()
    return f"exit code {done.returncode}: " + " | ".join(words[-3:])


def examples(python: Path, folder: Path, root: Path) -> Told:
    """The public examples, each against a fresh enough server: those that control models need a
    repository of the size they count."""
    failures = [f"{name}: it is not in {folder}" for name in EXAMPLES if not path_of(folder, name)]
    there = [name for name in EXAMPLES if path_of(folder, name)]
    with serving(root) as server:
        for name in (one for one in there if CONTROL not in one):
            failures += tried(python, folder, name, server)
    for name in (one for one in there if CONTROL in one):
        failures += controlled(python, folder, name)
    failed = {failure.split(":")[0] for failure in failures}
    return Told("tritonclient examples", len(EXAMPLES) - len(failed), len(EXAMPLES), failures)


def path_of(folder: Path, name: str) -> Path | None:
    path = folder / f"{name}.py"
    return path if path.is_file() else None


def tried(python: Path, folder: Path, name: str, server: Server) -> list[str]:
    problems = [run(python, folder / f"{name}.py", one) for one in runs_of(name, server)]
    return [f"{name}: {problem}" for problem in problems if problem]


def controlled(python: Path, folder: Path, name: str) -> list[str]:
    found = COUNTED.search((folder / f"{name}.py").read_text())
    count = int(found[1]) if found else len(fixtures.MODELS)
    with tempfile.TemporaryDirectory(prefix="leptonic-conformance-") as root:
        fixtures.write(Path(root), fixtures.NAMES[:count])
        with serving(Path(root), "--model-control-mode", "explicit") as server:
            return tried(python, folder, name, server)


def checked(environment: str, script: str, *arguments: str) -> Told:
    """A script of ours around somebody's client, which counts by itself: `N passed of N`."""
    line = [str(python_of(environment)), str(Path(__file__).with_name(script)), *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=SUITE_S)
    except subprocess.TimeoutExpired:
        return Told(environment, 0, 1, [f"not over within {SUITE_S:.0f} s"])
    words = (done.stdout + done.stderr).strip().splitlines()
    counts = [found for one in words if (found := PASSED.fullmatch(one))]
    if not counts:
        return Told(environment, 0, 1, words[-FAILURE_LINES:])
    passed, of = (sum(int(one[n]) for one in counts) for n in (1, 2))
    if done.returncode and passed == of:
        return Told(environment, passed, of + 1, words[-FAILURE_LINES:])
    return Told(environment, passed, of, [] if passed == of else words[-FAILURE_LINES:])


def python_of(environment: str) -> Path:
    """Raises `Unavailable`."""
    return installed(environment) / "bin" / "python"


def mlserver_infer(server: Server, folder: Path) -> Told:
    """Its batch command: a file of requests in, a file of answers out."""
    given, taken = folder / "requests.jsonl", folder / "answers.jsonl"
    given.write_text("".join(json.dumps(sum_of(number)) + "\n" for number in range(BATCH)))
    command = [str(installed("mlserver") / "bin" / "mlserver"), "infer", "-u", server.http]
    command += ["-m", "simple", "-i", str(given), "-o", str(taken), "-w", "4", "-s", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SUITE_S)
    answers = taken.read_text().splitlines() if taken.exists() else []
    passed = sum(is_sum(json.loads(answer)) for answer in answers)
    problems = [] if passed == BATCH else (done.stdout + done.stderr).splitlines()[-FAILURE_LINES:]
    return Told("mlserver infer", passed, BATCH, problems)


def sum_of(number: int) -> dict[str, Any]:
    return {
        "id": str(number),
        "inputs": [
            {"name": name, "datatype": "INT32", "shape": [1, fixtures.ELEMENTS], "data": data}
            for name, data in (
                ("INPUT0", [number] * fixtures.ELEMENTS),
                ("INPUT1", list(range(fixtures.ELEMENTS))),
            )
        ],
    }


def is_sum(answer: dict[str, Any]) -> bool:
    outputs = {one["name"]: one["data"] for one in answer.get("outputs", ())}
    number = int(answer["id"])
    expected = [number + one for one in range(fixtures.ELEMENTS)]
    return bool(outputs.get("OUTPUT0") == expected)


def tell(one: Told) -> bool:
    """Whether all passed."""
    print(f"{one.client}: {one.passed} passed of {one.of}", flush=True)
    for failure in one.failures:
        print(f"  {failure}", flush=True)
    return one.passed == one.of


def clients(root: Path) -> Iterator[Told]:
    if said := os.environ.get(FOLDER_VARIABLE):
        yield examples(python_of("tritonclient"), scripts_of(said), root)
    with serving(root) as server, tempfile.TemporaryDirectory() as folder:
        http = f"http://{server.http}"
        yield checked("kserve", "kserve_client.py", http, server.grpc)
        yield checked("schemathesis", "schemathesis_check.py", http, "simple")
        yield mlserver_infer(server, Path(folder))


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="leptonic-conformance-") as folder:
        fixtures.write(Path(folder))
        try:
            told = [tell(one) for one in clients(Path(folder))]
        except Unavailable as error:
            print(f"a client cannot be installed: {error}")
            return 1
    print(verdict(told))
    return 0 if all(told) else 1


def verdict(passed: Sequence[bool]) -> str:
    """How many clients ran, and which did not."""
    said = f"{len(passed)} clients ran, {sum(passed)} passed everything"
    if os.environ.get(FOLDER_VARIABLE):
        return said
    return (
        f"{said}; not run: tritonclient examples ({FOLDER_VARIABLE} names no checkout of "
        "github.com/triton-inference-server/client)"
    )


if __name__ == "__main__":
    sys.exit(main())
