"""The platform's own benchmarks, run where the platform is."""

import subprocess
import sys
from pathlib import Path
from typing import IO

from leptonic.errors import Error

TRACES = ("openb", "philly")
MODULES = {"doors": ("bench", "results.json"), "scheduler": ("bench.scheduler", "scheduler.json")}
"""What is measured -> the module, and where its figures are then."""


def measure(root: Path, what: str, trace: str, data: Path | None, output: IO[str] | None) -> Path:
    """The file that holds the figures."""
    if what == "doors" and (trace or data):
        raise Error("--trace and --data are for `leptonic bench scheduler`")
    module, results = MODULES[what]
    options = []
    if trace:
        options += ["--trace", trace if trace in TRACES else str(Path(trace).resolve())]
    if data is not None:
        options += ["--data", str(data.resolve())]
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, cwd=root, stdout=output, check=False)
    if done.returncode:
        raise Error(f"the benchmark ended with {done.returncode}")
    return root / "bench" / results
