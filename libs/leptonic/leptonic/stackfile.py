"""Where a stack is: `<data-dir>/stack.json`, which the running stack keeps, or a file named by
`LEPTONIC_ENDPOINTS`, for a stack on other machines."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leptonic.errors import Error

DATA_DIR = ".leptonic"
FILE = "stack.json"
ENDPOINTS_VARIABLE = "LEPTONIC_ENDPOINTS"
KIND_VARIABLE = "LEPTONIC_STACK"
TOKEN_VARIABLE = "LEPTONIC_TOKEN"  # noqa: S105 - a name, no token
CLIENT_VARIABLES = (ENDPOINTS_VARIABLE, KIND_VARIABLE, TOKEN_VARIABLE)


def authorization() -> dict[str, str]:
    """The header for doors that ask for a token; none where there is no token to give."""
    token = os.environ.get(TOKEN_VARIABLE, "")
    return {"authorization": f"Bearer {token}"} if token else {}


@dataclasses.dataclass(frozen=True)
class Stack:
    """A stack as its file describes it."""

    source: str
    endpoints: Mapping[str, str]
    project: str = "default"
    pid: int = 0
    """Of the supervisor; 0 for a stack that is stopped, or on another machine."""
    started_at: Any = None
    processes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    roll: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The last rolling restart."""
    options: str = ""
    """What names it to `leptonic`; "" for the one that is found without."""

    @property
    def is_up(self) -> bool:
        """Whether the supervisor says that every process does its work."""
        return bool(self.processes) and all(one["ready"] for one in self.processes.values())

    def endpoint(self, name: str) -> str:
        try:
            return self.endpoints[name]
        except KeyError:
            known = ", ".join(sorted(self.endpoints))
            problem = f"{self.source} names no endpoint {name!r}, only {known}"
            raise Error(problem, code="NOT_RUNNING") from None


def locate(data_dir: str | Path | None, environment: Mapping[str, str] = os.environ) -> Stack:
    """The stack of this data folder; without one, what the environment names, then `.leptonic`."""
    named = environment.get(ENDPOINTS_VARIABLE, "")
    if data_dir is None and named:
        return read(Path(named))
    folder = Path(data_dir or DATA_DIR)
    if not runs_on(folder):
        problem = f"no stack runs on {folder}: start one with `leptonic up --data-dir {folder}`"
        raise Error(problem, code="NOT_RUNNING")
    return read(folder / FILE)


def runs_on(folder: Path) -> bool:
    """Whether the folder's stack runs on this machine now."""
    path = folder / FILE
    return path.exists() and is_alive(read(path).pid)


def read(path: Path) -> Stack:
    """`stack.json`, or a bare JSON object of endpoints."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Error(f"{path}: cannot be read as JSON: {error}", code="NOT_RUNNING") from error
    if not isinstance(document, dict):
        raise Error(f"{path}: a JSON object is wanted", code="NOT_RUNNING")
    if "endpoints" not in document:
        return Stack(source=str(path), endpoints=document)
    return Stack(
        source=str(path),
        endpoints=document["endpoints"],
        project=document.get("project", "default"),
        pid=document.get("pid") or 0,
        started_at=document.get("started_at"),
        processes=document.get("processes", {}),
        roll=document.get("roll") or {},
        options="" if path.parent == Path(DATA_DIR) else f"--data-dir {path.parent}",
    )


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs; a zombie does not."""
    if not pid:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")
