"""`python -m bench.scheduler`: every figure of the scheduler, beside its anchor and its target.

Without `--trace` all of them; `openb` or `philly` only those of that trace; a file in Philly's
columns is replayed on Philly's cluster. Each part (`bench/part.py`) is a process of its own with a
bound in time. What was measured on this very commit is shown again and not measured again, unless
AGAIN=1; so a run that was broken off goes on where it was.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from bench import philly
from bench.part import PARTS, ROOT
from services.scheduler.traces import BadTrace

DATA = philly.DATA.parent
RESULTS = Path(__file__).with_name("scheduler.json")
SOURCES = ("services", "libs", "native", "stack", "bench/*.py")
Row = dict[str, Any]

TARGETS: dict[str, tuple[str, str]] = {
    "openb default, learned": ("FGD 95.39", ">= 95.7, then 96.0"),
    "openb worst against FGD, learned": ("FGD", ">= -0.1"),
    "openb mean against FGD, learned": ("FGD", ">= 0.5"),
    "Philly: mean wait, s": ("LAS-4 229, FIFO 6,393", "<= 200"),
    "Philly: waits over 36 h": ("-", "0"),
    "Philly: preemptions a job": ("-", "<= 0.5"),
    "Philly by VC: mean wait, s": ("the shared pool", "<= 1.1 x"),
    "Philly by VC: worse than alone": ("-", "0"),
    "placements/s, priced, 1,213 nodes": ("cached FGD 213,000", "100,000; p99 200 us"),
    "placements/s, priced, 10,000 nodes": ("cached FGD 79,000", "50,000; p99 500 us"),
    "placements/s, priced, 100,000 nodes": ("cached FGD 10,000", "10,000; p99 2,000 us"),
    "gang of 1,024 GPUs": ("-", "<= 50,000"),
    "no room for it": ("-", "<= 5,000"),
    "edge: above the LP's bound, worst": ("greedy +42-60 %", "<= 1 %"),
    "edge: us a job": ("-", "<= 20"),
    "durable jobs/s, SubmitJobs": ("Nomad 3,750", ">= 5,000"),
    "dead node to its work placed elsewhere": ("Nomad 20, Kubernetes 340", "<= 5, noticed <= 3"),
    "kill -9 to a standby's answer": ("-", "<= 2 with 100,000"),
    "start to answer after kill -9": ("-", "<= 2 with 100,000"),
    "kill points of the writer": ("-", "1,000"),
}
"""Beginning of a row's name -> what others reached, what is wanted."""


def commit() -> str:
    """What is measured; "" where that is no commit: sources were changed, or git is not there."""
    git = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        changed = [*git, "status", "--porcelain", "--", *SOURCES]
        if not subprocess.run(changed, capture_output=True, check=True).stdout:
            head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True)
            return head.stdout.decode().strip()
    return ""


def measured(name: str, data: Path) -> list[Row]:
    """The rows of a part, or one that says how it failed."""
    _, limit_s = PARTS[name]
    command = [sys.executable, "-m", "bench.part", name, str(data)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as part:
        try:
            said, _ = part.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return [failed(name, f"not through in {limit_s} s")]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)  # what it started, too
    if part.returncode:
        return [failed(name, f"ended with {part.returncode}")]
    return list(json.loads(said.splitlines()[-1]))


def failed(name: str, how: str) -> Row:
    return {"what": name, "ours": "failed", "floor": "-", "ratio": "-", "against": how}


def with_target(found: Row) -> Row:
    name = next((name for name in TARGETS if found["what"].startswith(name)), "")
    anchor, target = TARGETS.get(name, ("", ""))
    return {**found, "anchor": anchor, "target": target}


def show(found: Row) -> None:
    columns = f"{found['what']:<58} {found['anchor']:>24} {found['target']:>22}"
    print(f"{columns} {found['ours']:>12} {found['floor']:>12} {found['ratio']:>8}", end="  ")
    print(found["against"], flush=True)


def head() -> None:
    names = ("what", "anchor", "target", "ours", "floor", "ratio", "against")
    show({name: name for name in names})


def known_rows() -> list[Row]:
    known: list[Row] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return [row for row in known if "part" in row]


def run(names: Sequence[str], data: Path, again: bool) -> list[Row]:
    """The parts, one after the other; what is known is written down after each."""
    known = known_rows()
    now = commit()
    for name in names:
        mine = [row for row in known if row["part"] == name]
        good = mine and all(row["ours"] != "failed" for row in mine)
        if not now or again or not good or any(row["commit"] != now for row in mine):
            began = monotonic()
            print(f"{name}: at most {PARTS[name][1]} s", file=sys.stderr, flush=True)
            found = [with_target(row) for row in measured(name, data)]
            seconds = round(monotonic() - began)
            mine = [{**row, "part": name, "commit": now, "part_s": seconds} for row in found]
            known = [row for row in known if row["part"] != name] + mine
            RESULTS.write_text(json.dumps(known, indent=2) + "\n")
        for row in mine:
            show(row)
    return [row for row in known if row["part"] in names]


def lacking(found: Sequence[Row]) -> list[str]:
    """Targets of which nothing was measured."""
    named = [str(row["what"]) for row in found]
    return [name for name in TARGETS if not any(what.startswith(name) for what in named)]


def of_file(path: Path) -> None:
    """Measured each time, for a file may change."""
    found = [{**with_target(row), "part": str(path), "commit": ""} for row in philly.of_file(path)]
    for row in found:
        show(row)
    others = [row for row in known_rows() if row["part"] != str(path)]
    RESULTS.write_text(json.dumps(others + found, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler")
    parser.add_argument("--trace", default="", help="openb, philly or a file; default: everything")
    parser.add_argument("--data", type=Path, default=DATA, help="holds openb/ and philly/")
    asked = parser.parse_args()
    head()
    if asked.trace and asked.trace not in PARTS:
        try:
            of_file(Path(asked.trace))
        except BadTrace as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        return
    names = [asked.trace] if asked.trace else list(PARTS)
    found = run(names, asked.data.resolve(), again=os.environ.get("AGAIN") == "1")
    missing = [] if asked.trace else lacking(found)
    for name in missing:
        show(with_target({**failed(name, "no row of that name"), "ours": "lacks"}))
    if missing or any(row["ours"] == "failed" for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
