"""tritonclient, as nobody here wrote it, against `leptonic serve` on the fixture models: what the
public examples do, over both fronts. `make conformance` runs the examples themselves.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conformance import fixtures
from tests.conformance.run import PASSED, Server, serving
from tests.serving import FRONTS

pytestmark = pytest.mark.parametrize("front", FRONTS)
SCRIPT = Path(__file__).with_name("triton_client.py")
CHECKS_S = 120


def check(server: Server, *more: str) -> int:
    """How many checks passed; all of them did."""
    line = [sys.executable, str(SCRIPT), server.http, server.grpc, *more]
    done = subprocess.run(line, capture_output=True, text=True, timeout=CHECKS_S)
    words = done.stdout + done.stderr
    assert done.returncode == 0, words
    found = PASSED.search(words)
    assert found is not None, words
    return int(found[1])


def test_a_client_finds_all_that_triton_has(tmp_path: Path, front: str) -> None:
    fixtures.write(tmp_path)
    with serving(tmp_path, front=front) as server:
        assert check(server) == 21


def test_a_client_loads_and_unloads(tmp_path: Path, front: str) -> None:
    fixtures.write(tmp_path, ["simple", "simple_int8"])
    with serving(tmp_path, "--model-control-mode", "explicit", front=front) as server:
        assert check(server, "control") == 2
