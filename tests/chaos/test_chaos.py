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
SHORT = [
    Fault(schedule.PAUSE, ("ingest",), 8.0),
    Fault(schedule.DISCONNECT, ("postgres",), 6.0),
]
GROUNDS = {"embedded": process_controls.running, "compose": container_controls.running}


@pytest.mark.resilience
async def test_a_pause_and_a_cut_cable_change_nothing(tmp_path: Path) -> None:
    """What `make test` has of it: longer than a broker waits for an ack, and than a query."""
    rows, _ = await broken("embedded", tmp_path, SHORT, records=VERSION_EVERY + 1000)
    assert [row for row in rows if not row.is_sound] == []


@pytest.mark.chaos
async def test_nothing_is_lost_doubled_or_wrong_whatever_breaks(tmp_path: Path) -> None:
    began_s = monotonic()
    faults = schedule.only(schedule.whole(SEED), ONLY)
    assert faults, f"ONLY={ONLY}: no such fault"
    say(f"\nKIND={KIND} SEED={SEED}: {len(faults)} faults", report.HEAD)
    rows, whole = await broken(KIND, tmp_path, faults, RECORDS)
    summary = f"{whole}; {monotonic() - began_s:.0f} s."
    say(summary)
    if not ONLY:
        command = f"make chaos KIND={KIND} SEED={SEED}"
        report.write(KIND, report.section(rows, command, summary))
    assert [row for row in rows if not row.is_sound] == []


async def broken(
    kind: str, folder: Path, faults: list[Fault], records: int
) -> tuple[list[Row], str]:
    """What was found after each fault, and what there was at the end."""
    async with GROUNDS[kind](folder / "data") as ground, begun(ground) as campaign:
        rows = await play(campaign, faults, records)
        return rows, await campaign.whole()


async def play(campaign: Campaign, faults: list[Fault], records: int) -> list[Row]:
    """Every fault with its share of the records; a line each as soon as it is over."""
    rows = []
    counts = schedule.slices(records - VERSION_EVERY, len(faults), BATCH)
    for fault, count in zip(faults, counts, strict=True):
        if fault.kind == schedule.FILL and not campaign.controls.can_fill:
            say(f"{fault.label}: not tried, the volume has no bound of its own")
            continue
        row = await campaign.play(fault, count)
        say(row.line(), *row.problems)
        rows.append(row)
    return rows


def say(*lines: str) -> None:
    """At once: a run takes minutes."""
    sys.stdout.write("\n".join([*lines, ""]))
    sys.stdout.flush()
