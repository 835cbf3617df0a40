"""Commands: what they print for people and for programs, and their exit codes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from leptonic.cli import main

pytestmark = pytest.mark.usefixtures("endpoints_file")
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def answer(*arguments: str) -> Any:
    """Its JSON; nothing else may be on stdout."""
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("datasets",), ("digits", "1200")),
        (("datasets", "digits"), ("records", "pixels", "0.5000")),
        (("jobs",), ("train-a", "succeeded", "needs 2 cpu")),
        (("jobs", "train-a"), ("epoch", "loss", "0.5000")),
        (("jobs", "train-a", "--watch"), ("epoch", "loss", "0.5000")),
        (("models",), ("digits", "champion=2")),
        (("models", "digits"), ("serving", "accuracy=0.9700")),
        (("models", "models:/digits@champion"), ("lineage", "seed", "gate", "accuracy")),
        (("endpoints",), ("80 %", "20 %", "canary", "48")),
        (("jobs", "why", "train-b"), ("2 of 3", "needs 1 x 1000", "0.5 placed", "end p/j-1")),
        (("nodes",), ("local", "Healthy", "2 cpu, 4096 MiB", "A100: 1 0.3 free", "1.7 of what")),
        (("queues",), ("default", "queues (3)", "team", "25%", "5000", "2000", "wanted", "digits")),
        (("queues",), ("owes", "-1500")),
        (("queues", "--delete", "team"), ("default",)),
        (("events", "--dead"), ("label: missing",)),
        (("trace", "r-1"), ("inference", "ModelInfer", "2.0 ms")),
        (("predict", "digits", '{"pixels": [[1, 2]]}'), ("label", "version 2")),
        (("feedback", "digits", "r-1", "7"), ("label 7", "r-1")),
    ],
)
def test_people_read_tables(
    arguments: tuple[str, ...], words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    for word in words:
        assert word in result.stdout


def test_programs_read_json() -> None:
    assert answer("datasets")[0]["rows"] == 1200
    assert answer("datasets", "digits")["versions"][0]["number"] == 1
    assert [job["state"] for job in answer("jobs")] == ["succeeded", "waiting"]
    assert answer("jobs", "train-a")["run"]["epochs"][1]["epoch"] == 2
    assert answer("models", "models:/digits/2")["metrics"] == {"accuracy": 0.97}
    assert answer("endpoints")[0]["serving"]["targets"][0]["correct"] == 48
    assert answer("nodes")[0]["capacity"]["cpu_milli"] == 2000
    assert answer("queues")[0]["waiting"] == 1
    assert answer("queues")[1]["quotas"][1]["borrowed"] == 2000
    assert answer("queues")[1]["quotas"][1]["owes"] == -1500
    assert answer("queues")[2]["replicas"][0]["wanted"] == 4
    assert answer("jobs", "why", "train-b")["advices"][0]["changes"][0]["kind"] == "end"
    assert answer("events") == []
    assert answer("events", "--dead", "--after", "0")[0]["reason"] == "label: missing"
    assert answer("trace", "models:/digits/2")["trace_id"] == TRACE_ID
    assert answer("predict", "digits", '[{"pixels": [1, 2]}]')["outputs"]["label"] == [1]


def test_status_is_a_failure_while_a_door_is_not_ready(endpoints_file: Path) -> None:
    assert answer("status")["ready"] is True
    doors = json.loads(endpoints_file.read_text())
    endpoints_file.write_text(json.dumps({**doors, "trainer": "http://127.0.0.1:9"}))
    result = run("status", "--json")
    assert (result.exit_code, json.loads(result.stdout)["doors"]["trainer"]) == (1, False)
    assert "not ready: trainer" in result.stderr


def test_apply_says_the_revision_or_the_field_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("pipeline: digits\n")
    assert "revision 4" in run("apply", str(file)).stdout
    file.write_text("cohort: all\nqueue: team\n")
    assert "queues (1)" in run("apply", str(file)).stdout
    file.write_text("train: {recipy: mlp}\n")
    result = run("apply", str(file))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("leptonic: registry: $.train: ")
    assert result.stderr.count("\n") == 1


def test_publish_fails_when_a_record_was_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.ndjson"
    file.write_text("good\nbad\n")
    result = run("publish", "digits", str(file), "--json")
    assert (result.exit_code, json.loads(result.stdout)["refused"]) == (1, 1)
    assert "1 records were refused, 1 accepted" in result.stderr
    file.write_text("good\n")
    assert answer("publish", "digits", str(file))["accepted"] == 1


def test_rows_come_as_text_from_a_file_or_from_stdin(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"pixels": [1, 2]}]')
    assert run("predict", "digits", f"@{tmp_path}/rows.json").exit_code == 0
    assert run("predict", "digits", "-", stdin='{"pixels": [[1, 2]]}').exit_code == 0
    assert run("predict", "digits", "{pixels}").exit_code == 2
    assert run("predict", "digits", "@none.json").exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("jobs", "--nope"),
        ("jobs", "train-a", "train-b"),
        ("apply",),
        ("events", "--limit", "0"),
        ("up", "--ports", "some"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


@pytest.mark.parametrize("command", ["down", "jobs", "status", "events"])
def test_without_a_stack_one_line_says_what_to_do(command: str, tmp_path: Path) -> None:
    result = run(command, "--data-dir", str(tmp_path / "none"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "start one with `leptonic up --data-dir" in result.stderr
    assert result.stderr.count("\n") == 1


def test_doctor_checks_this_machine(tmp_path: Path) -> None:
    result = run("doctor", "--json", "--data-dir", str(tmp_path))
    checks = {one["name"]: one for one in json.loads(result.stdout)}
    assert checks["python"]["ok"]
    assert checks["package stack"]["ok"]
    assert checks["server nats-server"]["ok"]
    assert result.exit_code == (0 if all(one["ok"] for one in checks.values()) else 1)
