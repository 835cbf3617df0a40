"""`make demo` as its user sees it: the whole loop, and interruptions that leave nothing behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.running import STACKS, compose_project

pytestmark = pytest.mark.slow
LEPTONIC = str(Path(sys.executable).parent / "leptonic")
DEMO_S = 400
STAGES = {
    "stack ready", "pipeline applied", "published", "dataset version", "placed by the scheduler",
    "trained and evaluated", "registered", "gate passed", "deployed", "held-out digits",
    "drifted digits before", "drift detected", "canary promoted", "drifted digits after", "traced",
}  # fmt: skip


def left_behind(name: str) -> list[str]:
    """Processes that name it."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if name in line and process.pid != psutil.Process().pid:
            found.append(line)
    return found


def containers_left(project: str) -> str:
    line = ["docker", "ps", "--all", "--quiet", "--filter"]
    label = f"label=com.docker.compose.project={project}"
    return subprocess.run([*line, label], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("kind", STACKS)
def test_the_loop_runs_from_nothing_to_a_promoted_canary(kind: str, tmp_path: Path) -> None:
    data_dir = str(tmp_path / "data")
    line = [LEPTONIC, "demo", "--json", "--stack", kind, "--data-dir", data_dir]
    if kind == "compose":
        with compose_project() as project:
            check_demo(line)
            assert containers_left(project) == ""
    else:
        check_demo(line)
        assert left_behind(data_dir) == []


def check_demo(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, timeout=DEMO_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout)
    assert {stage["stage"] for stage in measured["stages"]} == STAGES
    accuracy = measured["accuracy"]
    assert accuracy["held-out digits"] >= 0.9
    assert accuracy["drifted digits after"] >= 0.9 > accuracy["drifted digits before"]
    parts = {"ingest", "preprocess", "trainer", "scheduler", "registry", "inference"}
    assert parts <= set(measured["services"])


@pytest.mark.resilience
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_stops_everything(tmp_path: Path, number: signal.Signals) -> None:
    data_dir = tmp_path / "data"
    line = [LEPTONIC, "demo", "--data-dir", str(data_dir)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        for said in demo.stdout:
            if "published" in said:
                break
        demo.send_signal(number)
        _, problem = demo.communicate(timeout=60)
    assert demo.returncode == 1
    assert "interrupted; what was started is stopped" in problem
    assert left_behind(str(data_dir)) == []
