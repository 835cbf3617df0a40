"""Whether newly landed records still look like those a version was trained on. Pure.

Two measures over the same cells (the reference's quantile bins, one cell below them, one above):

    PSI = sum_i (w_i - r_i) * ln(w_i / r_i)      Siddiqi, Credit Risk Scorecards, 2006
    KS  = max_i |W_i - R_i|                      two-sample Kolmogorov-Smirnov (Smirnov, 1948)

r, w are the shares of reference and window, R, W their running sums. A cell that is empty on one
side would make PSI infinite: 1/2 is added to every count first (Krichevsky and Trofimov, 1981),
which vanishes as counts grow, unlike a fixed epsilon. KS is exact at the bin edges; between them
the true statistic can be larger by at most the fullest cell. If nothing moved, PSI is about
(cells - 1) * (1/reference + 1/window): 0.05 for 200 against 1,000 records, so 0.25 means something.

Features decide: scalars, strings, and of a tensor the mean and the std of a record. Single
elements are measured and shown but do not decide: with 64 of them one moves by chance or by
ordering (the digits of one writer follow those of another) when nothing relevant has.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from libs.contracts.pipeline import Field
from services.preprocess.statistics import series as series_of
from services.preprocess.table import Array, Column

SMOOTHING = 0.5
Counts = dict[str, list[int]]
"""Feature -> how many records fell into each of its cells."""


class Reference(msgspec.Struct, frozen=True):
    """One series of the training data, cut into cells."""

    feature: str
    """`age`, `pixels.mean`, `pixels.std`, `pixels[12]`."""
    column: str
    series: str
    decides: bool
    counts: list[int]
    edges: list[float] = []
    categories: list[str] = []


class Measure(msgspec.Struct, frozen=True):
    feature: str
    psi: float
    ks: float
    decides: bool


class Window(msgspec.Struct, frozen=True):
    """Records since the reference, as counts. It is judged, and begins anew, at `min_records`."""

    rows: int = 0
    counts: Counts = {}
    fired: bool = False
    """Once a reference: what follows is known already."""
    judged_rows: int = 0
    judged: list[Measure] = []


def references(statistics: Mapping[str, Any], schema: Mapping[str, Field]) -> list[Reference]:
    """The feature series of a manifest's statistics."""
    found: list[Reference] = []
    for name, field in schema.items():
        said = statistics[name]
        if field.role != "feature":
            continue
        if "categories" in said:
            found.append(Reference(name, name, "", True, said["counts"], [], said["categories"]))
        if "histogram" in said:
            found.append(numeric(name, name, "", True, said["histogram"]))
        for one, histogram in said.get("series", {}).items():
            whole = one in ("mean", "std")
            feature = f"{name}.{one}" if whole else f"{name}[{one}]"
            found.append(numeric(feature, name, one, whole, histogram))
    return found


def numeric(
    feature: str, column: str, series: str, decides: bool, histogram: dict[str, Any]
) -> Reference:
    counts = [0, *histogram["counts"], 0]
    return Reference(feature, column, series, decides, counts, histogram["edges"])


def count(
    columns: Mapping[str, Column], schema: Mapping[str, Field], reference: Sequence[Reference]
) -> Counts:
    """How the records fall into the reference's cells; nulls fall into none."""
    found: dict[str, dict[str, Array]] = {}
    counts = {}
    for one in reference:
        column = columns[one.column]
        if one.categories:
            values = column.values[column.valid]
            counts[one.feature] = count_categories(values, one.categories)
            continue
        if one.column not in found:
            found[one.column] = series_of(column, schema[one.column])
        counts[one.feature] = count_numbers(found[one.column][one.series], one.edges)
    return counts


def count_categories(values: Array, categories: list[str]) -> list[int]:
    cells = {category: cell for cell, category in enumerate(categories)}
    counts = [0] * (len(categories) + 1)
    for value in values:
        counts[cells.get(value, len(categories))] += 1
    return counts


def count_numbers(values: Array, edges: list[float]) -> list[int]:
    """Below the first edge, in each bin, above the last edge."""
    cells = np.searchsorted(edges[:-1], values, side="right")
    cells[values > edges[-1]] = len(edges)
    counted: list[int] = np.bincount(cells, minlength=len(edges) + 1).tolist()
    return counted


def psi(reference: Sequence[int], window: Sequence[int]) -> float:
    """0 for equal shares; 0.1 a slight, 0.25 a major shift. Cells are aligned."""
    r, w = smoothed(reference), smoothed(window)
    return float(np.sum((w - r) * np.log(w / r)))


def smoothed(counts: Sequence[int]) -> Array:
    raised = np.asarray(counts, np.float64) + SMOOTHING
    return np.asarray(raised / raised.sum())


def ks(reference: Sequence[int], window: Sequence[int]) -> float:
    """0..1; 0 when either side is empty."""
    if not sum(reference) or not sum(window):
        return 0.0
    r, w = (np.cumsum(counts) / sum(counts) for counts in (reference, window))
    return float(np.max(np.abs(w - r)))


def measure(reference: Sequence[Reference], learned: Counts, window: Counts) -> list[Measure]:
    """Against the nearer of two things the model has learned.

    `learned` are the records that were new to the reference version. After a retrain for drift
    the training data is old and new records mixed; more of the new ones is no news.
    """
    measures = []
    for one in reference:
        if one.feature not in window or not sum(window[one.feature]):
            continue
        known = [one.counts]
        if sum(learned.get(one.feature, ())):
            known.append(learned[one.feature])
        counts = window[one.feature]
        value, distance = min((psi(k, counts), ks(k, counts)) for k in known)
        measures.append(Measure(one.feature, value, distance, one.decides))
    return measures


def add(left: Counts, right: Counts) -> Counts:
    features = {**left, **right}
    return {
        feature: [
            a + b
            for a, b in zip(
                left.get(feature, [0] * len(features[feature])),
                right.get(feature, [0] * len(features[feature])),
                strict=True,
            )
        ]
        for feature in features
    }


def advance(
    window: Window,
    rows: int,
    counts: Counts,
    reference: Sequence[Reference],
    learned: Counts,
    *,
    threshold_psi: float,
    min_records: int,
) -> tuple[Window, Measure | None]:
    """The window with these records in it, and what moved most when that is a drift."""
    if window.fired:
        return window, None
    total, sums = window.rows + rows, add(window.counts, counts)
    if total < min_records:
        return msgspec.structs.replace(window, rows=total, counts=sums), None
    judged = measure(reference, learned, sums)
    decisive = [one for one in judged if one.decides]
    most = max(decisive, key=lambda one: one.psi, default=None)
    fired = most is not None and most.psi >= threshold_psi
    return Window(fired=fired, judged_rows=total, judged=judged), most if fired else None


def shown(
    window: Window, reference: Sequence[Reference], learned: Counts
) -> tuple[int, list[Measure]]:
    """(rows, measures) of the last window that was judged, or of the one that is filling."""
    if window.judged:
        return window.judged_rows, window.judged
    return window.rows, measure(reference, learned, window.counts)
