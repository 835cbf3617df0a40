"""`python -m bench.part NAME DATA`: one part of `bench.scheduler`, its rows as JSON on a line."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

Row = dict[str, str]
ROOT = Path(__file__).resolve().parents[1]
KILL_POINTS = "services/scheduler/tests/test_crash.py::test_at_a_thousand_points"
POINTS = 1_000


def rows_of(name: str, *arguments: Any) -> list[Row]:
    """Of a module, which is loaded for its own part only: one forks, another has gRPC's threads."""
    module: Any = importlib.import_module(f"bench.{name}")
    return list(module.rows(*arguments))


def openb_rows(data: Path) -> list[Row]:
    """Per cent of GPU milli, beside FGD in the same run."""
    openb: Any = importlib.import_module("bench.openb")
    openb.DATA = data / "openb"
    found = openb.rows()
    rows = [
        row(
            f"openb {one['variant']}, {one['policy']}, %",
            one["allocated_percent"],
            one["allocated_percent"] - one["minus_fgd"],
            f"FGD; {one['times_best_fit']} x best fit, bound {one['bound_percent']}",
        )
        for one in found
    ]
    for policy in ("priced", "learned"):
        minus = [one["minus_fgd"] for one in found if one["policy"] == policy]
        rows.append(row(f"openb worst against FGD, {policy}", min(minus), 0, "5 variants"))
        mean = sum(minus) / len(minus)
        rows.append(row(f"openb mean against FGD, {policy}", mean, 0, "5 variants"))
    return rows


def philly_rows(data: Path) -> list[Row]:
    return rows_of("philly", data / "philly")


def edge_rows(_: Path) -> list[Row]:
    """Beside the LP's bound, over all instances; the floor is the same in arrival order."""
    found = rows_of("edge")
    ours = [float(one["priced_above_bound_percent"]) for one in found]
    greedy = [float(one["greedy_above_bound_percent"]) for one in found]
    times = [float(one["priced_us"]) for one in found]
    against = f"as they come; {len(found)} instances"
    return [
        row("edge: above the LP's bound, worst, %", max(ours), max(greedy), against),
        row("edge: above the LP's bound, mean, %", fmean(ours), fmean(greedy), against),
        row("edge: us a job, worst", max(times), 0, "-"),
    ]


def placement_rows(_: Path) -> list[Row]:
    return rows_of("placement")


def durable_rows(_: Path) -> list[Row]:
    return rows_of("durable")


def kill_points_rows(_: Path) -> list[Row]:
    """The test that asserts that nothing is lost, doubled or over-committed, at every point."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "long", KILL_POINTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{KILL_POINTS}: {done.stdout[-2000:]}")
    against = "0 lost, 0 doubled, 0 over-commits: asserted"
    return [row("kill points of the writer, all of them good", POINTS, 0, against)]


def row(what: str, ours: float, floor: float, against: str) -> Row:
    return {
        "what": what,
        "ours": f"{ours:.2f}",
        "floor": f"{floor:.2f}" if floor else "-",
        "ratio": f"{ours / floor:.4f}" if floor else "-",
        "against": against,
    }


PARTS: dict[str, tuple[Callable[[Path], list[Row]], int]] = {
    "openb": (openb_rows, 7200),
    "philly": (philly_rows, 7200),
    "edge": (edge_rows, 1200),
    "placement": (placement_rows, 1800),
    "durable": (durable_rows, 1800),
    "kill points": (kill_points_rows, 7200),
}
"""Name -> what measures it, and the most seconds that may take."""


def main(name: str, data: str) -> None:
    measure, _ = PARTS[name]
    print(json.dumps(measure(Path(data))))


if __name__ == "__main__":
    main(*sys.argv[1:])
