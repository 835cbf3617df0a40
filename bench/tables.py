"""Tables of measurements that are committed beside what measured them."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def keep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As CSV, printed too. The first row's keys are the columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path.read_text(), end="")
