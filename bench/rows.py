"""What the parts of `bench.scheduler` find: rows of one shape."""

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
"""Holds openb/ and philly/, which are not part of the repository."""
Row = dict[str, str]


def row(what: str, ours: float, floor: float, against: str, digits: int = 2) -> Row:
    """With so many digits behind the point; a floor of 0 is none."""
    return {
        "what": what,
        "ours": f"{ours:,.{digits}f}",
        "floor": f"{floor:,.{digits}f}" if floor else "-",
        "ratio": f"{ours / floor:.3f}" if floor else "-",
        "against": against,
    }


def show(found: Iterable[Row]) -> None:
    for one in found:
        figures = f"{one['ours']:>12} {one['floor']:>12} {one['ratio']:>8}"
        print(f"{one['what']:<58} {figures}  {one['against']}", flush=True)
