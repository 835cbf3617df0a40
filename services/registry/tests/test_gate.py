"""The gate: every bound, with its numbers and its reason."""

import math

import pytest

from libs.contracts.artifacts import Evaluation
from libs.contracts.pipeline import Gate
from services.registry.domain import gate


def evaluation(
    champion: int | None = None, before: dict[str, float] | None = None, **metrics: float
) -> Evaluation:
    return Evaluation(
        dataset_digest="d", metrics=metrics, champion=champion, champion_metrics=before or {}
    )


@pytest.mark.parametrize(
    ("one", "value", "passed", "sentence"),
    [
        (Gate("accuracy", min=0.95), 0.97, True, "accuracy 0.97 is at least 0.95"),
        (Gate("accuracy", min=0.95), 0.95, True, "accuracy 0.95 is at least 0.95"),
        (Gate("accuracy", min=0.95), 0.91, False, "accuracy 0.91 is not at least 0.95"),
        (Gate("loss", max=0.5), 0.5, True, "loss 0.5 is at most 0.5"),
        (Gate("loss", max=0.5), 0.7, False, "loss 0.7 is not at most 0.5"),
    ],
)
def test_bounds_include_their_edge(one: Gate, value: float, passed: bool, sentence: str) -> None:
    (check,) = gate([one], Evaluation(dataset_digest="d", metrics={one.metric: value}), None)
    assert (check.passed, check.sentence) == (passed, sentence)
    assert (check.metric, check.value, check.champion) == (one.metric, value, None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_was_not_measured_fails_and_is_named(value: float) -> None:
    for measured in (evaluation(loss=0.1), evaluation(loss=0.1, f1_macro=value)):
        (check,) = gate([Gate("f1_macro", min=0.5)], measured, None)
        assert not check.passed
        assert check.value is None
        assert "f1_macro was not measured" in check.sentence
        assert "loss" in check.sentence


def test_every_bound_of_a_gate_is_a_check() -> None:
    checks = gate(
        [Gate("accuracy", min=0.9, max=0.99, max_drop=0.1), Gate("loss", max=1.0)],
        evaluation(accuracy=0.95, loss=2.0),
        None,
    )
    assert [(c.rule, c.passed) for c in checks] == [
        ("min", True),
        ("max", True),
        ("max_drop", True),
        ("max", False),
    ]


def test_no_gates_no_checks() -> None:
    assert gate([], evaluation(accuracy=0.1), 3) == []


@pytest.mark.parametrize(
    ("metric", "before", "value", "passed"),
    [
        ("accuracy", 0.97, 0.96, True),
        ("accuracy", 0.97, 0.99, True),
        ("accuracy", 0.97, 0.90, False),
        ("loss", 0.10, 0.50, False),
        ("loss", 0.50, 0.10, True),
        ("mse", 1.0, 1.25, False),
        ("r2", 0.9, 0.5, False),
    ],
)
def test_a_drop_is_a_change_for_the_worse(
    metric: str, before: float, value: float, passed: bool
) -> None:
    measured = Evaluation(
        dataset_digest="d", metrics={metric: value}, champion=4, champion_metrics={metric: before}
    )
    (check,) = gate([Gate(metric, max_drop=0.02)], measured, 4)
    assert check.passed is passed
    assert check.champion == before
    assert f"version 4's {before:.6g}" in check.sentence


def test_without_a_champion_nothing_can_drop() -> None:
    (check,) = gate([Gate("accuracy", max_drop=0.0)], evaluation(accuracy=0.5), None)
    assert check.passed
    assert "no champion" in check.sentence


@pytest.mark.parametrize(
    ("compared", "said"), [(None, "no champion"), (1, "version 1")], ids=["none", "older"]
)
def test_a_comparison_with_another_champion_does_not_count(compared: int | None, said: str) -> None:
    measured = evaluation(compared, {"accuracy": 0.9}, accuracy=0.99)
    (check,) = gate([Gate("accuracy", max_drop=0.1)], measured, 2)
    assert not check.passed
    assert check.sentence == (
        f"accuracy was compared with {said}, but version 2 is champion now: evaluate again"
    )


def test_a_champion_without_the_metric_fails() -> None:
    measured = evaluation(2, {"loss": 0.1}, accuracy=0.99)
    (check,) = gate([Gate("accuracy", max_drop=0.1)], measured, 2)
    assert not check.passed
    assert "champion, version 2, was not measured" in check.sentence
