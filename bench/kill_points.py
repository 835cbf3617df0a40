"""The writer, killed at a thousand of its awaits: the test that asserts that nothing is lost,
doubled or over-committed says how often it killed.
"""

import contextlib
import sys
from pathlib import Path

import pytest

from bench.rows import ROOT, Row, row

TEST = ROOT / "services/scheduler/tests/test_crash.py::test_at_a_thousand_points"


class Listener:
    """A plugin of pytest's: what tests record of themselves."""

    def __init__(self) -> None:
        self.heard: dict[str, object] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.heard |= dict(report.user_properties)


def kills(test: Path) -> int:
    listener = Listener()
    with contextlib.redirect_stdout(sys.stderr):
        ended = pytest.main(["-m", "long", str(test)], plugins=[listener])
    if ended:
        raise SystemExit(f"{test.name}: pytest ended with {ended!r}")
    told = listener.heard["kills"]
    assert isinstance(told, int)
    return told


def rows(_: Path) -> list[Row]:
    against = "0 lost, 0 doubled, 0 over-commits: asserted"
    return [row("kill points of the writer, all of them good", kills(TEST), 0, against, 0)]
