"""Every peer in an environment of its own under .peers, pinned; one that is there is kept."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers"
UV = ROOT / ".uv" / "bin" / "uv"
ONNXRUNTIME = "onnxruntime==1.31.1"
PINS: dict[str, tuple[str, ...]] = {
    "pytriton": ("nvidia-pytriton==0.7.0", ONNXRUNTIME),
    "kserve": ("kserve==0.21.0", ONNXRUNTIME),
    "mlserver": ("mlserver==1.7.1", ONNXRUNTIME),
    "litserve": ("litserve==0.2.19", ONNXRUNTIME),
    "bentoml": ("bentoml==1.4.39", ONNXRUNTIME),
    "ray": ("ray[serve]==2.60.0", ONNXRUNTIME),
    "tritonclient": ("tritonclient[grpc,http]==2.73.0",),
    "schemathesis": ("schemathesis==4.32.5",),
    "aio": ("grpcio==1.85.1", "protobuf==7.36.2", "uvloop==0.23.0", ONNXRUNTIME),
}
INSTALL_S_MAX = 900


class Unavailable(RuntimeError):
    """A peer that cannot be installed or started here, and why."""


def installed(name: str) -> Path:
    """The environment's folder. Raises `Unavailable`."""
    folder, pins = PEERS / name, "\n".join(PINS[name])
    marker = folder / ".pins"
    if marker.exists() and marker.read_text() == pins:
        return folder
    print(f"installing {', '.join(PINS[name])}")
    if not folder.exists():
        ran([str(UV), "venv", "-q", "-p", sys.executable, str(folder)])
    ran([str(UV), "pip", "install", "-q", "-p", str(folder), *PINS[name]])
    marker.write_text(pins)
    return folder


def ran(command: list[str]) -> str:
    """What it printed. Raises `Unavailable` with the last line of its complaint."""
    environment = os.environ | {"UV_LINK_MODE": "hardlink"} | links()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_S_MAX, env=environment
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        complaint = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
        raise Unavailable(f"{Path(command[0]).name}: {complaint[-1].strip()}")
    return done.stdout


def links() -> dict[str, str]:
    """uv ignores pip's configuration; where pip is told of more wheels, so is uv."""
    asked = ["python3", "-m", "pip", "config", "get", "global.find-links"]
    found = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {"UV_FIND_LINKS": found} if found else {}


def site_packages(environment: Path) -> Path:
    return next(environment.glob("lib/python3*/site-packages"))
