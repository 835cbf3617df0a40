"""Records as the HTTP record door takes them: a file's bytes, or dicts as NDJSON."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from leptonic.errors import Error

NDJSON = "application/x-ndjson"
CSV = "text/csv"
FORMATS = {
    ".ndjson": NDJSON,
    ".jsonl": NDJSON,
    ".json": "application/json",
    ".csv": CSV,
    ".parquet": "application/vnd.apache.parquet",
    ".arrow": "application/vnd.apache.arrow.stream",
}
CHUNK_BYTES_MAX = 4 << 20
"""Lines are sent in chunks; the other formats hold together and go whole."""

Chunk = tuple[int, str, bytes]
"""(records before it, content type, payload)."""


def chunks_of(records: str | Path | Iterable[Mapping[str, Any]]) -> Iterator[Chunk]:
    """Raises `Error` for a file that is not there or of no known format."""
    if not isinstance(records, str | Path):
        lines = (json.dumps(dict(record), allow_nan=False).encode() for record in records)
        yield from in_chunks(NDJSON, lines)
        return
    path = Path(records)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(FORMATS)
        raise Error(f"{path}: {path.suffix!r} is no format of records: {known}", field="file")
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise Error(f"{path}: {error.strerror}", field="file") from error
    if kind == NDJSON:
        yield from in_chunks(kind, (line for line in payload.splitlines() if line.strip()))
    else:
        yield 0, kind, payload


def in_chunks(kind: str, lines: Iterable[bytes]) -> Iterator[Chunk]:
    taken: list[bytes] = []
    size = before = 0
    for line in lines:
        if taken and size + len(line) > CHUNK_BYTES_MAX:
            yield before, kind, b"\n".join(taken) + b"\n"
            before, taken, size = before + len(taken), [], 0
        taken.append(line)
        size += len(line) + 1
    if taken:
        yield before, kind, b"\n".join(taken) + b"\n"
