"""`make chaos`: every fault of the schedule, on one stack under load; the table it makes.

KIND=embedded|compose, SEED=<number>, ONLY=<fault or victim>.
"""

import os
import sys
from pathlib import Path
from time import monotonic

import pytest

from tests.chaos import container_controls, process_controls, report, schedule
from tests.chaos.campaign import VERSION_EVERY, Campaign, begun
from tests.chaos.load import BATCH
from tests.chaos.report import Row
from tests.chaos.schedule import Fault

RECORDS = 20_000
KIND = os.environ.get("KIND") or "embedded"
SEED = int(os.environ.get("SEED") or 1)
ONLY = os.environ.get("ONLY") or ""
GROUNDS = {"embedded": process_controls.running, "compose": container_controls.running}


@pytest.mark.chaos
async def test_nothing_is_lost_doubled_or_wrong_whatever_breaks(tmp_path: Path) -> None:
    began_s = monotonic()
    faults = schedule.only(schedule.whole(SEED), ONLY)
    assert faults, f"ONLY={ONLY}: no such fault"
    say(f"\nKIND={KIND} SEED={SEED}: {len(faults)} faults", report.HEAD)
    async with GROUNDS[KIND](tmp_path / "data") as ground, begun(ground) as campaign:
        rows = await play(campaign, faults)
        whole = await campaign.whole()
    summary = f"{whole}; {monotonic() - began_s:.0f} s."
    say(summary)
    if not ONLY:
        command = f"make chaos KIND={KIND} SEED={SEED}"
        report.write(KIND, report.section(rows, command, summary))
    assert [row for row in rows if not row.is_sound] == []


async def play(campaign: Campaign, faults: list[Fault]) -> list[Row]:
    """Every fault with its share of the records; a line each as soon as it is over."""
    rows = []
    counts = schedule.slices(RECORDS - VERSION_EVERY, len(faults), BATCH)
    for fault, records in zip(faults, counts, strict=True):
        if fault.kind == schedule.FILL and not campaign.controls.can_fill:
            say(f"{fault.label}: not tried, the volume has no bound of its own")
            continue
        row = await campaign.play(fault, records)
        say(row.line(), *row.problems)
        rows.append(row)
    return rows


def say(*lines: str) -> None:
    """At once: a run takes minutes."""
    sys.stdout.write("\n".join([*lines, ""]))
    sys.stdout.flush()
