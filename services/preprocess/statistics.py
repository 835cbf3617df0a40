"""What the train split looks like, column by column: for people, and as the reference for drift."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from libs.contracts.pipeline import Field
from services.preprocess.table import Array, Column, Table

BINS = 10
ELEMENTS_MAX = 64
CATEGORIES_MAX = 10


def describe(table: Table, schema: Mapping[str, Field]) -> dict[str, Any]:
    """Column -> its statistics, as JSON builtins.

    Every column has `rows` and `nulls`; a number `min`, `max`, `mean`, `std` and a `histogram`; a
    string its most frequent `categories`; a tensor, over all its elements, the same numbers, and
    histograms of each of its `series`: the mean and the std of a record, and up to
    `ELEMENTS_MAX` evenly chosen elements.
    """
    return {name: describe_column(table.columns[name], schema[name]) for name in schema}


def describe_column(column: Column, field: Field) -> dict[str, Any]:
    rows = len(column.valid)
    said: dict[str, Any] = {"rows": rows, "nulls": rows - int(np.count_nonzero(column.valid))}
    values = column.values[column.valid]
    if not len(values):
        return said
    if field.type == "string":
        return said if field.shape else said | describe_strings(values)
    numbers = values.astype(np.float64)
    said |= {
        "min": float(numbers.min()),
        "max": float(numbers.max()),
        "mean": float(numbers.mean()),
        "std": float(numbers.std()),
    }
    found = series(column, field)
    if not field.shape:
        return said | {"histogram": histogram(found[""])}
    return said | {"series": {name: histogram(one) for name, one in found.items()}}


def describe_strings(values: Array) -> dict[str, Any]:
    """The most frequent first, `counts` one longer than `categories`: the last is all others."""
    names, counts = np.unique(values.astype(str), return_counts=True)
    order = np.lexsort((names, -counts))[:CATEGORIES_MAX]
    kept = [int(counts[i]) for i in order]
    return {
        "distinct": len(names),
        "categories": [str(names[i]) for i in order],
        "counts": [*kept, len(values) - sum(kept)],
    }


def series(column: Column, field: Field) -> dict[str, Array]:
    """Series -> float64, one value a record that is not null; a scalar's series is called ""."""
    numbers = column.values[column.valid].astype(np.float64)
    if not field.shape:
        return {"": numbers}
    size = math.prod(field.shape)
    flat = numbers.reshape(len(numbers), size)
    found = {"mean": flat.mean(axis=1), "std": flat.std(axis=1)}
    for element in chosen(size):
        found[str(element)] = flat[:, element]
    return found


def chosen(size: int) -> list[int]:
    """Up to `ELEMENTS_MAX` positions in C order, evenly spaced, first and last among them."""
    return sorted({int(i) for i in np.linspace(0, size - 1, min(size, ELEMENTS_MAX))})


def histogram(values: Array) -> dict[str, Any]:
    """At most `BINS` bins of about equal counts.

    Bin i is [edges[i], edges[i+1]), the last one closed. Every edge is a value that occurred; one
    that is frequent enough to be several quantiles gets a bin of its own, so that 95 % zeros and
    5 % ones are told apart.
    """
    ordered = np.sort(values)
    picked = ordered[np.arange(BINS) * len(ordered) // BINS]
    starts, times = np.unique(picked, return_counts=True)
    after = np.searchsorted(ordered, starts[times > 1], side="right")
    starts = np.union1d(starts, ordered[after[after < len(ordered)]])
    cells = np.searchsorted(starts, values, side="right") - 1
    counts = np.bincount(cells, minlength=len(starts))
    return {"edges": [*starts.tolist(), float(ordered[-1])], "counts": counts.tolist()}
