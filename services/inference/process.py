"""The process of a worker: how it begins, and what its exit code says."""

import os
import signal
import subprocess
import sys
from pathlib import Path

PYTHON = sys.executable
ROOT = Path(__file__).resolve().parents[2]
OURS = "LEPTONIC_"
"""Settings of the service, passwords among them, are none of the model's business."""


def started(descriptor: int) -> subprocess.Popen[str]:
    """In a session of its own: a signal to the service's group is not for its workers."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith(OURS)}
    paths = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    command = [PYTHON, "-m", "services.inference.worker", str(descriptor), str(os.getpid())]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=[descriptor],
        start_new_session=True,
        env=environment,
        text=True,
        errors="replace",
    )


def cause_of(code: int) -> str:
    if code < 0:
        return f"died of signal {-code} ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"
