"""The table of a run, in docs/reliability.md between its two markers."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil

from tests.running import ROOT

FILE = ROOT / "docs" / "reliability.md"
HEAD = (
    "| fault | kind | acked | lost | doubled | wrong | torn | orphans "
    "| failed predictions | lands s | predicts s | back s | all landed s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


class Row(msgspec.Struct, kw_only=True):
    """One fault and what was found after it."""

    fault: str
    kind: str
    acked: int = 0
    """While it lasted and until all of it had landed."""
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    torn: int = 0
    orphans: int = 0
    failed: int = 0
    answered: int = 0
    lands_s: float = 0.0
    """From the fault's end to the first record that was published and landed after it."""
    predicts_s: float = 0.0
    back_s: float = 0.0
    """Until every victim said that it was ready."""
    caught_up_s: float = 0.0
    """From the last ack until everything that was acked had landed."""
    problems: list[str] = []

    @property
    def is_sound(self) -> bool:
        counts = (self.lost, self.doubled, self.wrong, self.torn, self.orphans)
        return not any(counts) and not self.problems

    def line(self) -> str:
        return (
            f"| {self.fault} | {self.kind} | {self.acked} | {self.lost} | {self.doubled} "
            f"| {self.wrong} | {self.torn} | {self.orphans} "
            f"| {self.failed} of {self.failed + self.answered} "
            f"| {self.lands_s:.1f} | {self.predicts_s:.1f} | {self.back_s:.1f} "
            f"| {self.caught_up_s:.1f} |"
        )


def section(rows: Sequence[Row], command: str, summary: str) -> str:
    return "\n".join(
        [machine(), "", f"`{command}`: {summary}", "", HEAD, *(r.line() for r in rows)]
    )


def machine() -> str:
    memory_gib = psutil.virtual_memory().total / (1 << 30)
    load, _, _ = os.getloadavg()
    return (
        f"Measured {datetime.now(UTC).date()} on {os.cpu_count()} cores, {memory_gib:.0f} GiB, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}; "
        f"load average at the end {load:.1f}."
    )


def write(kind: str, text: str, file: Path = FILE) -> None:
    """Replaces what stands between the kind's markers."""
    before, after = (f"<!-- chaos {kind} {edge} -->" for edge in ("begins", "ends"))
    old = file.read_text()
    head, rest = old.split(before)
    _, tail = rest.split(after)
    file.write_text(f"{head}{before}\n{text}\n{after}{tail}")
