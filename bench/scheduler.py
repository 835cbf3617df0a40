"""`python -m bench.scheduler`: every figure of the scheduler, beside its anchor and its target.

Without `--trace` all of them; `openb` or `philly` only those of that trace; a file in Philly's
columns is replayed on Philly's cluster. Each part (`bench/part.py`) is a process of its own with a
bound in time. A figure belongs to the sources and traces that it was measured with: while those are
as they were, it is shown again and not measured again, unless AGAIN=1. So a run that was broken off
goes on where it was, and a commit that changes none of them costs nothing.
"""

import argparse
import contextlib
import hashlib
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
from bench.part import PARTS, made_of
from bench.rows import DATA, ROOT
from services.scheduler.traces import BadTrace

RESULTS = Path(__file__).with_name("scheduler.json")
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


def git(root: Path, *words: str) -> str | None:
    """What it says; None where it is not there, or refuses."""
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def sources(root: Path, paths: Sequence[str], traces: Path) -> str:
    """A hash of what figures belong to: the paths as they are committed, and the traces' files;
    "" where the paths are not as they are committed, or git is not there."""
    committed = git(root, "ls-files", "--stage", "--", *paths)
    if committed is None or git(root, "status", "--porcelain", "--", *paths) != "":
        return ""
    parts = [committed.encode()]
    for file in sorted(traces.glob("*.csv")):
        parts += [file.name.encode(), hashlib.sha256(file.read_bytes()).digest()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def sources_of(name: str, data: Path) -> str:
    return sources(ROOT, made_of(name), data / name)


def measured(name: str, data: Path) -> list[Row]:
    """The rows of a part, or one that says how it failed."""
    limit_s = PARTS[name].limit_s
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
    return [with_target(row) if row["part"] in PARTS else row for row in known if "sources" in row]


def stands(rows: Sequence[Row], of: str) -> bool:
    """Whether it need not be measured again."""
    return bool(rows) and all(of and row["sources"] == of and good(row) for row in rows)


def good(row: Row) -> bool:
    return bool(row["ours"] != "failed")


def measured_now(name: str, data: Path) -> list[Row]:
    """Of no sources where those changed meanwhile."""
    print(f"{name}: at most {PARTS[name].limit_s} s", file=sys.stderr, flush=True)
    began, of = monotonic(), sources_of(name, data)
    commit = (git(ROOT, "rev-parse", "HEAD") or "").strip()
    found = [with_target(row) for row in measured(name, data)]
    about = {"part": name, "commit": commit, "part_s": round(monotonic() - began)}
    about["sources"] = of if sources_of(name, data) == of else ""
    return [{**row, **about} for row in found]


def run(names: Sequence[str], data: Path, again: bool) -> list[Row]:
    """The parts, one after the other; what is known is written down after each."""
    known = known_rows()
    for name in names:
        mine = [row for row in known if row["part"] == name]
        if again or not stands(mine, sources_of(name, data)):
            mine = measured_now(name, data)
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
    """Measured each time, for a file may change; anchors and targets are not of any file."""
    about = {"part": str(path), "sources": "", "anchor": "", "target": ""}
    found = [{**row, **about} for row in philly.of_file(path)]
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
    if missing or not all(map(good, found)):
        sys.exit(1)


if __name__ == "__main__":
    main()
