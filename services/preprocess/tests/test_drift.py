"""Drift is seen where there is one, and only there."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.contracts.pipeline import Field
from services.preprocess import drift
from services.preprocess.builder import build
from services.preprocess.drift import Counts, Measure, Reference, Window
from services.preprocess.statistics import BINS, ELEMENTS_MAX, chosen, describe_column, histogram
from services.preprocess.table import Column, read
from services.preprocess.tests.digits import part, pipeline

COUNTS = st.lists(st.integers(0, 1000), min_size=4, max_size=4).filter(any)


@given(COUNTS, COUNTS)
def test_psi_is_symmetric_and_zero_only_for_equal_shares(a: list[int], b: list[int]) -> None:
    assert drift.psi(a, b) == pytest.approx(drift.psi(b, a))
    assert drift.psi(a, a) == 0
    assert drift.psi(a, b) >= 0


def test_psi_by_hand() -> None:
    """Large counts, where the 1/2 added to each does not show: shares .5 .5 against .8 .2."""
    expected = 0.3 * np.log(0.8 / 0.5) + -0.3 * np.log(0.2 / 0.5)
    assert drift.psi([5 * 10**8, 5 * 10**8], [8 * 10**8, 2 * 10**8]) == pytest.approx(expected)


@given(COUNTS, COUNTS)
def test_ks_is_that_of_the_binned_samples(a: list[int], b: list[int]) -> None:
    one, other = (np.repeat(np.arange(4), counts) for counts in (a, b))
    gaps = [abs(np.mean(one <= x) - np.mean(other <= x)) for x in range(4)]
    assert drift.ks(a, b) == pytest.approx(max(gaps))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200))
def test_every_value_falls_into_one_bin_of_its_histogram(values: list[float]) -> None:
    found = histogram(np.array(values))
    edges, counts = found["edges"], found["counts"]
    assert len(counts) == len(edges) - 1 <= BINS
    assert sum(counts) == len(values)
    assert edges == sorted(edges)
    assert drift.count_numbers(np.array(values), edges) == [0, *counts, 0]


def test_bins_hold_about_as_much_each_and_a_frequent_value_has_its_own() -> None:
    assert histogram(np.arange(1000.0))["counts"] == [100] * BINS
    rare = histogram(np.array([0.0] * 95 + [1.0] * 5))
    assert rare == {"edges": [0.0, 1.0, 1.0], "counts": [95, 5]}


def test_values_outside_what_was_seen_are_counted_apart() -> None:
    constant = histogram(np.full(100, 3.0))
    assert drift.count_numbers(np.array([2.0, 3.0, 3.0, 4.0]), constant["edges"]) == [1, 2, 1]


def test_strings_drift_by_category() -> None:
    field = Field("string")
    train = Column(np.array(["a"] * 80 + ["b"] * 20, np.object_), np.ones(100, bool))
    statistics = {"x": describe_column(train, field)}
    assert statistics["x"]["categories"] == ["a", "b"]
    (reference,) = drift.references(statistics, {"x": field})
    new = Column(np.array(["b", "z", "z"], np.object_), np.ones(3, bool))
    assert drift.count({"x": new}, {"x": field}, [reference]) == {"x": [0, 1, 2]}


@pytest.mark.parametrize(("size", "count"), [(1, 1), (64, 64), (784, ELEMENTS_MAX)])
def test_elements_are_chosen_evenly(size: int, count: int) -> None:
    elements = chosen(size)
    assert (len(elements), elements[0], elements[-1]) == (count, 0, size - 1)


REFERENCE = [Reference("x", "x", "", True, [0, 50, 50, 0], [0.0, 1.0, 2.0])]
SAME: Counts = {"x": [0, 50, 50, 0]}
MOVED: Counts = {"x": [0, 0, 100, 0]}


def advance(
    window: Window, counts: Counts, rows: int = 100, learned: Counts | None = None
) -> tuple[Window, Measure | None]:
    return drift.advance(
        window, rows, counts, REFERENCE, learned or {}, threshold_psi=0.25, min_records=200
    )


def test_a_window_waits_for_enough_records_then_begins_anew() -> None:
    window, _ = advance(Window(), SAME)
    assert (window.rows, window.counts) == (100, SAME)
    window, moved = advance(window, SAME)
    assert moved is None
    assert (window.rows, window.counts, window.judged_rows) == (0, {}, 200)


def test_a_drift_is_told_once() -> None:
    window, moved = advance(*advance(Window(), MOVED)[:1], MOVED)
    assert moved is not None
    assert (moved.feature, window.fired) == ("x", True)
    assert advance(window, MOVED, rows=1000) == (window, None)


def test_more_of_what_was_just_learned_is_no_news() -> None:
    assert advance(Window(), MOVED, rows=200)[1] is not None
    assert advance(Window(), MOVED, rows=200, learned={"x": [0, 1, 199, 0]})[1] is None


def digits_window(start: int, stop: int, inverted: bool) -> Measure:
    """The decisive measure that moved most, of these digits against the first 1,200."""
    built = build("default", pipeline(), [part(0, 1200)], 0)
    manifest = built.manifest
    reference = drift.references(manifest.statistics, manifest.schema)
    table = read(part(start, stop, inverted=inverted)[1], manifest.schema)
    counts = drift.count(table.columns, manifest.schema, reference)
    judged = [m for m in drift.measure(reference, {}, counts) if m.decides]
    assert {m.feature for m in judged} == {"pixels.mean", "pixels.std", "ink"}
    return max(judged, key=lambda m: m.psi)


@pytest.mark.parametrize("start", [1200, 1300, 1400, 1497])
def test_more_digits_are_no_drift(start: int) -> None:
    assert digits_window(start, start + 300, inverted=False).psi < 0.25


def test_inverted_digits_are_a_drift() -> None:
    moved = digits_window(1200, 1400, inverted=True)
    assert moved.psi > 1
    assert moved.ks > 0.9


def test_after_a_retrain_more_inverted_digits_are_no_drift() -> None:
    parts = [part(0, 1200, position=1), part(1200, 1450, position=2, inverted=True)]
    built = build("default", pipeline(), parts, 1)
    manifest: Any = built.manifest
    reference = drift.references(manifest.statistics, manifest.schema)
    table = read(part(1450, 1750, inverted=True)[1], manifest.schema)
    counts = drift.count(table.columns, manifest.schema, reference)

    def most(learned: Counts) -> float:
        return max(m.psi for m in drift.measure(reference, learned, counts) if m.decides)

    assert most({}) > 0.25
    assert most(built.learned) < 0.25


def test_a_window_survives_being_stored() -> None:
    window, _ = advance(Window(), SAME, rows=200)
    assert msgspec.convert(msgspec.to_builtins(window), Window) == window
