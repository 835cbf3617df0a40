"""`python -m bench.part NAME DATA`: one part of `bench.scheduler`, its rows as JSON on a line."""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """A module beside this one; loaded for itself only: one forks, another has gRPC's threads."""

    limit_s: int
    made_of: tuple[str, ...]
    """Git's pathspecs of what its figures depend on, its own module and EVERY aside."""


EVERY = ("bench/rows.py", "constraints.txt")
NATIVE = ("native/build.py", "native/placement*")
POOL = (
    "services/scheduler/native_pool.py",
    "services/scheduler/planner.py",
    "services/scheduler/pool.py",
    "services/scheduler/scores.py",
    "services/scheduler/shapes.py",
    *NATIVE,
)
DECIDES = (
    ":(glob)services/scheduler/*.py",
    "libs/__init__.py",
    ":(glob)libs/contracts/*.py",
    "libs/contracts/protos",
    *NATIVE,
)
RUNS = (*DECIDES, ":(glob)libs/*/*.py", ":(glob)stack/*.py")
KILLS = (
    "conftest.py",
    "services/scheduler/tests/conftest.py",
    "services/scheduler/tests/crash.py",
    "services/scheduler/tests/test_crash.py",
    "services/scheduler/tests/test_service.py",
)
PARTS = {
    "openb": Part(7200, DECIDES),
    "philly": Part(7200, DECIDES),
    "edge": Part(1200, ("services/scheduler/edge.py",)),
    "placement": Part(1800, POOL),
    "durable": Part(1800, (*RUNS, "bench/echo.py", "bench/fleet.py")),
    "kill_points": Part(7200, (*RUNS, *KILLS)),
}


def made_of(name: str) -> tuple[str, ...]:
    return (f"bench/{name}.py", *EVERY, *PARTS[name].made_of)


def main(name: str, data: str) -> None:
    module: Any = importlib.import_module(f"bench.{name}")
    print(json.dumps(module.rows(Path(data))))


if __name__ == "__main__":
    main(*sys.argv[1:])
