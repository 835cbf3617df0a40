"""What counts as passed: a tool that fails without a number, or tries nothing, has not passed."""

from pathlib import Path

import pytest

from tests.conformance import run, schemathesis_check


@pytest.mark.parametrize(
    ("code", "said", "counted"),
    [
        (0, "Test cases: 5 generated", (5, 5)),
        (1, "Test cases: 5 generated, 2 found", (3, 5)),
        (1, "Test cases: 5 generated", (5, 6)),
        (0, "Test cases: 0 generated", (0, 1)),
        (1, "no document", (0, 1)),
    ],
)
def test_a_run_that_ends_with_an_error_has_not_passed(
    code: int, said: str, counted: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "schemathesis"
    tool.write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(schemathesis_check, "TOOL", tool)
    assert schemathesis_check.checked("http://127.0.0.1", "") == counted


def test_the_last_line_names_the_clients_that_did_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(run.FOLDER_VARIABLE, "client")
    assert run.verdict([True, False]) == "2 clients ran, 1 passed everything"
    monkeypatch.delenv(run.FOLDER_VARIABLE)
    assert "not run: tritonclient examples" in run.verdict([True])
