"""`python -m bench.scheduler`: every figure of the scheduler, beside its anchor and its target.

Without `--trace` all of them; `openb` or `philly` only those of that trace; a file in Philly's
columns is replayed on Philly's cluster. Each part is a module of its own that can be run alone.
"""

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import edge, openb, philly
from services.scheduler.traces import BadTrace

DATA = philly.DATA.parent
RESULTS = Path(__file__).with_name("scheduler.json")
WITHOUT_DATA = ("placement", "durable")
Row = dict[str, str]

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
}
"""Beginning of a row's name -> what others reached, what is wanted."""


def openb_rows(data: Path) -> list[Row]:
    """Per cent of GPU milli, beside FGD in the same run."""
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


def edge_rows() -> list[Row]:
    """Beside the LP's bound, over all instances; the floor is the same in arrival order."""
    found = edge.rows()
    ours = [float(one["priced_above_bound_percent"]) for one in found]
    greedy = [float(one["greedy_above_bound_percent"]) for one in found]
    times = [float(one["priced_us"]) for one in found]
    against = f"as they come; {len(found)} instances"
    return [
        row("edge: above the LP's bound, worst, %", max(ours), max(greedy), against),
        row("edge: above the LP's bound, mean, %", fmean(ours), fmean(greedy), against),
        row("edge: us a job, worst", max(times), 0, "-"),
    ]


def row(what: str, ours: float, floor: float, against: str) -> Row:
    ratio = f"{ours / floor:.4f}" if floor else "-"
    shown = f"{floor:.2f}" if floor else "-"
    return {
        "what": what,
        "ours": f"{ours:.2f}",
        "floor": shown,
        "ratio": ratio,
        "against": against,
    }


def parts(trace: str, data: Path) -> list[Callable[[], list[Row]]]:
    """What is measured, one after the other."""

    def rows_of(name: str) -> Callable[[], list[Row]]:
        return lambda: list(importlib.import_module(f"bench.{name}").rows())

    of_traces: dict[str, Callable[[], list[Row]]] = {
        "openb": lambda: openb_rows(data),
        "philly": lambda: philly.rows(data / "philly"),
    }
    if not trace:
        return [*of_traces.values(), edge_rows, *(rows_of(name) for name in WITHOUT_DATA)]
    return [of_traces.get(trace, lambda: philly.of_file(Path(trace)))]


def with_target(found: Row) -> Row:
    name = next((name for name in TARGETS if found["what"].startswith(name)), "")
    anchor, target = TARGETS.get(name, ("", ""))
    return {**found, "anchor": anchor, "target": target}


def show(found: Row) -> None:
    columns = f"{found['what']:<44} {found['anchor']:>22} {found['target']:>22}"
    print(f"{columns} {found['ours']:>12} {found['floor']:>12} {found['ratio']:>8}", end="  ")
    print(found["against"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler")
    parser.add_argument("--trace", default="", help="openb, philly or a file; default: everything")
    parser.add_argument("--data", type=Path, default=DATA, help="holds openb/ and philly/")
    asked = parser.parse_args()
    head = dict.fromkeys(("what", "anchor", "target", "ours", "floor", "ratio", "against"))
    show({name: name for name in head})
    found: list[dict[str, Any]] = []
    for part in parts(asked.trace, asked.data):
        try:
            measured = [with_target(one) for one in part()]
        except BadTrace as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        for one in measured:
            show(one)
        found += measured
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
