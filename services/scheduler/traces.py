"""Traces of jobs as CSV: Philly's columns, read strictly.

What a file has that it should not, or lacks, is a `BadTrace` that names file, line and column.
"""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from services.scheduler.shapes import GPUS_MAX, Machine

JOB_COLUMNS = ("timestamp", "duration", "num_gpus", "gpu_time", "cluster")
"""Of msr-fiddle/philly-traces as Sia's artifact has them; `cluster` is the virtual cluster."""
NODE_COLUMNS = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
"""Of openb."""
VC_COLUMNS = ("vc", "node num")
GPUS_A_JOB_MAX = 1 << 16
DURATION_S_MAX = 1 << 31

T = TypeVar("T")


class BadTrace(ValueError):
    """Something in a file that nobody can replay."""


class TraceJob(msgspec.Struct, frozen=True):
    name: str
    at_s: float
    """Since the midnight (UTC) before the file's first job."""
    duration_s: float
    gpus: int
    vc: str


class Row:
    """A line of a CSV file, whose cells are read by column."""

    def __init__(self, path: Path, line: int, cells: dict[str, str]) -> None:
        self.path, self.line, self.cells = path, line, cells

    def read(self, column: str, parse: Callable[[str], T], wanted: str) -> T:
        cell = self.cells[column]
        try:
            return parse(cell)
        except ValueError:
            where = f"{self.path}, line {self.line}, column {column!r}"
            raise BadTrace(f"{where}: {wanted}, got {cell[:80]!r}") from None

    def number(self, column: str, low: float, high: float) -> float:
        def parse(cell: str) -> float:
            number = float(cell)
            if not (math.isfinite(number) and low <= number <= high):
                raise ValueError
            return number

        return self.read(column, parse, f"a number from {low:g} to {high:g}")

    def integer(self, column: str, low: int, high: int) -> int:
        def parse(cell: str) -> int:
            number = float(cell)  # 8.0, too: what was computed is often written so
            if not (number.is_integer() and low <= number <= high):
                raise ValueError
            return int(number)

        return self.read(column, parse, f"an integer from {low} to {high}")

    def text(self, column: str) -> str:
        def parse(cell: str) -> str:
            if not cell.strip():
                raise ValueError
            return cell.strip()

        return self.read(column, parse, "a name")


def rows_of(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The lines of a CSV file that has these columns, whatever else it has."""
    try:
        file = path.open(newline="", encoding="utf-8-sig")
    except OSError as error:
        raise BadTrace(f"{path}: {error.strerror}") from error
    with file:
        reader: Any = csv.DictReader(file, strict=True, restval="")
        try:
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                wanted = ", ".join(columns)
                raise BadTrace(
                    f"{path}, line 1: no column {missing[0]!r}; expected {wanted}, found {found}"
                )
            for cells in reader:
                yield Row(path, reader.line_num, cells)
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadTrace(f"{path}, line {reader.reader.line_num}: {error}") from error


def instant(cell: str) -> datetime:
    """Philly's local time without a zone, or ISO 8601 with one."""
    read = datetime.fromisoformat(cell)
    return read if read.tzinfo else read.replace(tzinfo=UTC)


def jobs_of(path: Path) -> list[TraceJob]:
    """In the order of their arrival; of one instant, in the file's."""
    found: list[tuple[datetime, float, int, str]] = []
    for row in rows_of(path, JOB_COLUMNS):
        at = row.read("timestamp", instant, "a time such as 2017-10-01 00:00:45")
        duration_s = row.number("duration", 0, DURATION_S_MAX)
        found.append(
            (at, duration_s, row.integer("num_gpus", 1, GPUS_A_JOB_MAX), row.text("cluster"))
        )
    if not found:
        raise BadTrace(f"{path}: no jobs")
    midnight = min(at for at, *_ in found).replace(hour=0, minute=0, second=0, microsecond=0)
    jobs = [
        TraceJob(f"job-{number}", (at - midnight).total_seconds(), duration_s, gpus, vc)
        for number, (at, duration_s, gpus, vc) in enumerate(found, start=1)
    ]
    return sorted(jobs, key=lambda job: job.at_s)


def machines_of(path: Path) -> list[Machine]:
    """A cluster in openb's columns; `gpu` is how many."""
    machines = [
        Machine(
            node=row.text("sn"),
            cpu_milli=row.integer("cpu_milli", 0, 1 << 40),
            memory_mib=row.integer("memory_mib", 0, 1 << 40),
            gpus=row.integer("gpu", 0, GPUS_MAX),
            gpu_model=row.cells["model"].strip(),
        )
        for row in rows_of(path, NODE_COLUMNS)
    ]
    if not machines:
        raise BadTrace(f"{path}: no nodes")
    check_once(path, "node", (machine.node for machine in machines))
    return machines


def vc_nodes_of(path: Path) -> dict[str, int]:
    """How many nodes of 8 GPUs each virtual cluster had."""
    rows = rows_of(path, VC_COLUMNS)
    found = [(row.text("vc"), row.integer("node num", 1, 1 << 20)) for row in rows]
    check_once(path, "virtual cluster", (vc for vc, _ in found))
    return dict(found)


def check_once(path: Path, what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise BadTrace(f"{path}: {what} {twice[0]!r} twice")
