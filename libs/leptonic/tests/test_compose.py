"""What Compose says of its containers, read. The containers run in tests/test_loop.py."""

from pathlib import Path

import pytest
from leptonic import compose
from leptonic.errors import Error

CONTAINER = {
    "ID": "415d7f2349fe",
    "Service": "inference",
    "Name": "leptonic-inference-1",
    "State": "running",
    "Health": "healthy",
    "Publishers": [
        {"URL": "127.0.0.1", "TargetPort": 8000, "PublishedPort": 18000, "Protocol": "tcp"},
        {"URL": "127.0.0.1", "TargetPort": 8001, "PublishedPort": 8001, "Protocol": "tcp"},
        {"URL": "", "TargetPort": 8002, "PublishedPort": 0, "Protocol": "tcp"},
    ],
}
NATS = {"Publishers": [{"URL": "127.0.0.1", "TargetPort": 4222, "PublishedPort": 5222}]}


def test_published_ports_become_endpoints() -> None:
    found = compose.endpoints(compose.published([CONTAINER, NATS]), token="secret")
    assert found == {
        "nats": "nats://secret@127.0.0.1:5222",
        "inference_http": "http://127.0.0.1:18000",
        "inference_grpc": "127.0.0.1:8001",
    }


@pytest.mark.parametrize(
    ("state", "health", "ready"),
    [("running", "healthy", True), ("running", "starting", False), ("paused", "healthy", False)],
)
def test_a_container_is_ready_when_it_runs_and_says_so(
    state: str, health: str, ready: bool
) -> None:
    told = compose.process_of({**CONTAINER, "State": state, "Health": health})
    assert told["ready"] is ready


def test_without_docker_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Error, match="no docker"):
        compose.locate()
