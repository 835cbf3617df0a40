"""JSON, NDJSON and CSV -> records of a layout, each bad one with its reason.

What fits is decoded in one go; only a message with something wrong in it is looked at record by
record.
"""

import contextlib
import csv
import io
import json
from typing import Any

import msgspec
import numpy as np

from services.ingest.domain import RECORD_BYTES_MAX, Problem, Refused, explain
from services.ingest.layout import Accepted, Layout

RAW: msgspec.json.Decoder[Any] = msgspec.json.Decoder(list[msgspec.Raw])
UNFIT = (msgspec.DecodeError, ValueError, RecursionError)
Decoded = tuple[Accepted, list[Refused]]


class Unreadable(ValueError):
    """The payload as a whole is not what it says it is."""


def from_json(layout: Layout, payload: bytes) -> Decoded:
    """One record or an array of them. Raises `Unreadable`."""
    if len(payload) <= RECORD_BYTES_MAX:
        try:
            decoded = layout.any.decode(payload)
        except UNFIT:
            return one_by_one(layout, split(payload))
        return accepted(decoded if isinstance(decoded, list) else [decoded])
    return one_by_one(layout, split(payload))


def from_ndjson(layout: Layout, payload: bytes) -> Decoded:
    """One record a line; empty lines are skipped."""
    return one_by_one(layout, [line for line in payload.splitlines() if line.strip()])


def accepted(rows: list[Any]) -> Decoded:
    return Accepted(rows, np.arange(len(rows), dtype=np.int32)), []


def split(payload: bytes) -> list[bytes]:
    """The records of a message, as they were written. Raises `Unreadable`.

    Python's own parser takes the second look: it also reads NaN and Infinity, which are not JSON
    but which many programs write, so that the reason can name the field they are in.
    """
    if payload.lstrip()[:1] != b"[":
        return [payload]
    with contextlib.suppress(*UNFIT):
        return [bytes(raw) for raw in RAW.decode(payload)]
    try:
        return [json.dumps(record).encode() for record in json.loads(payload)]
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {error}") from error


def one_by_one(layout: Layout, raws: list[bytes]) -> Decoded:
    rows, index, refused = [], [], []
    for position, raw in enumerate(raws):
        row, problem = decode_one(layout, raw)
        if problem:
            refused.append(Refused(position, problem, raw))
        else:
            rows.append(row)
            index.append(position)
    return Accepted(rows, np.array(index, np.int32)), refused


def decode_one(layout: Layout, raw: bytes) -> tuple[Any, Problem | None]:
    if len(raw) > RECORD_BYTES_MAX:
        return None, Problem("", f"{len(raw)} bytes, the limit is {RECORD_BYTES_MAX} a record")
    try:
        return layout.one.decode(raw), None
    except UNFIT as error:
        return None, why(layout, raw, error)


def why(layout: Layout, raw: bytes, refusal: Exception) -> Problem:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return Problem("", f"not JSON: {error}")
    return explain(value, layout.schema) or Problem("", str(refusal))


def from_csv(layout: Layout, payload: bytes) -> Decoded:
    """A header row, then one record a line; an empty cell is null. Raises `Unreadable`."""
    try:
        lines = [*csv.reader(io.StringIO(payload.decode("utf-8-sig"), newline=""), strict=True)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise Unreadable(f"not CSV: {error}") from error
    lines = [line for line in lines if line]
    rows, index, refused = [], [], []
    for position, cells in enumerate(lines[1:]):
        record, problem = record_of_cells(layout, lines[0], cells)
        if problem:
            refused.append(Refused(position, problem, ",".join(cells).encode()))
        else:
            rows.append(msgspec.convert(record, layout.record))
            index.append(position)
    return Accepted(rows, np.array(index, np.int32)), refused


def record_of_cells(
    layout: Layout, header: list[str], cells: list[str]
) -> tuple[dict[str, Any], Problem | None]:
    if len(cells) != len(header):
        return {}, Problem("", f"{len(cells)} cells, the header has {len(header)}")
    record = {
        name: value_of_cell(cell, layout.schema[name].type) if name in layout.schema else cell
        for name, cell in zip(header, cells, strict=True)
    }
    return record, explain(record, layout.schema)


def value_of_cell(cell: str, kind: str) -> Any:
    """The value a cell stands for; the cell itself where it stands for none of that type."""
    if cell == "":
        return None
    try:
        if kind in ("float32", "float64"):
            return float(cell)
        if kind in ("int32", "int64", "uint8"):
            return int(cell)
    except ValueError:
        return cell
    return {"true": True, "false": False}.get(cell, cell) if kind == "bool" else cell
