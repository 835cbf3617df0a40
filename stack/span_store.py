"""Spans in SQLite. One thread at a time; what `add` returned from survives a kill."""

import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stack.spans import Link, Span

SPANS_MAX = 1_000_000
"""The oldest go first."""
TRACES_MAX = 1_000
"""Traces in one story, each way; traces in one listing."""
VALUE_CHARS_MAX = 200
"""Longer attribute values are kept but cannot be searched for."""

SCHEMA = """
pragma journal_mode = wal;
pragma synchronous = normal;
pragma foreign_keys = on;
create table if not exists span (
    position integer primary key autoincrement,
    trace_id text not null,
    span_id text not null,
    parent_id text not null,
    service text not null,
    name text not null,
    kind text not null,
    start_ns integer not null,
    end_ns integer not null,
    status text not null,
    status_message text not null,
    attributes text not null,
    events text not null,
    unique (trace_id, span_id)
);
create index if not exists span_by_service on span (service);
create table if not exists link (
    position integer not null references span on delete cascade,
    trace_id text not null,
    linked_trace_id text not null,
    linked_span_id text not null
);
create index if not exists link_by_position on link (position);
create index if not exists link_by_trace on link (trace_id, linked_trace_id);
create index if not exists link_by_linked on link (linked_trace_id, trace_id);
create table if not exists attribute (
    position integer not null references span on delete cascade,
    key text not null,
    value text not null
);
create index if not exists attribute_by_position on attribute (position);
create index if not exists attribute_by_value on attribute (key, value);
"""
COLUMNS = (
    "trace_id, span_id, parent_id, service, name, kind, start_ns, end_ns, status, "
    "status_message, attributes, events"
)
SUMMARY = """
select trace_id, count(*) as spans, min(start_ns) as start_ns, max(end_ns) as end_ns,
    sum(status = 'error') as errors, group_concat(distinct service) as services
from span where trace_id in ({chosen}) group by trace_id order by start_ns desc
"""
LATEST = "select trace_id from span group by trace_id order by max(position) desc limit ?"
WITH_ATTRIBUTE = """
select trace_id from span join attribute using (position) where key = ? and value = ?
group by trace_id order by max(position) desc limit ?
"""
ORPHANS = """
select * from span where start_ns >= ? and parent_id <> '' and not exists (
    select 1 from span as parent
    where parent.trace_id = span.trace_id and parent.span_id = span.parent_id
) order by position desc limit ?
"""


class SpanStore:
    """Opens or makes the file."""

    def __init__(self, path: Path, spans_max: int = SPANS_MAX) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.spans_max = spans_max
        self.connection = sqlite3.connect(path)
        self.connection.row_factory = sqlite3.Row
        self.connection.executescript(SCHEMA)

    def close(self) -> None:
        self.connection.close()

    def add(self, spans: Iterable[Span]) -> None:
        """A span that is already there stays as it is."""
        with self.connection:
            for span in spans:
                self.insert(span)
            self.connection.execute(
                "delete from span where position <= (select max(position) from span) - ?",
                (self.spans_max,),
            )

    def insert(self, span: Span) -> None:
        fields = msgspec.structs.asdict(span)
        fields["attributes"] = msgspec.json.encode(span.attributes).decode()
        fields["events"] = msgspec.json.encode(span.events).decode()
        names = [f":{name.strip()}" for name in COLUMNS.split(",")]
        del fields["links"]
        cursor = self.connection.execute(
            f"insert or ignore into span ({COLUMNS}) values ({', '.join(names)})",  # noqa: S608 - constants
            fields,
        )
        if cursor.rowcount == 0:
            return
        position = cursor.lastrowid
        self.connection.executemany(
            "insert into link values (?, ?, ?, ?)",
            [(position, span.trace_id, link.trace_id, link.span_id) for link in span.links],
        )
        searchable = ((key, text_of(value)) for key, value in span.attributes.items())
        self.connection.executemany(
            "insert into attribute values (?, ?, ?)",
            [(position, k, v) for k, v in searchable if len(v) <= VALUE_CHARS_MAX],
        )

    def trace(self, trace_id: str) -> list[Span]:
        """By start; [] for a trace that is not here."""
        return self.spans([trace_id])

    def spans(self, trace_ids: Sequence[str]) -> list[Span]:
        chosen = msgspec.json.encode(trace_ids).decode()
        own = "where trace_id in (select value from json_each(?))"
        links: dict[int, list[Link]] = {}
        for row in self.connection.execute(f"select * from link {own}", (chosen,)):  # noqa: S608 - constants
            links.setdefault(row["position"], []).append(
                Link(row["linked_trace_id"], row["linked_span_id"])
            )
        query = f"select * from span {own} order by start_ns, position"  # noqa: S608 - constants
        rows = self.connection.execute(query, (chosen,))
        return [span_of(row, links.get(row["position"], [])) for row in rows]

    def traces(self, attribute: str = "", value: str = "", limit: int = 50) -> list[dict[str, Any]]:
        """The latest traces, or those with a span that has the attribute; a summary each."""
        limit = min(limit, TRACES_MAX)
        which = WITH_ATTRIBUTE if attribute else LATEST
        parameters = (attribute, value, limit) if attribute else (limit,)
        rows = self.connection.execute(SUMMARY.format(chosen=which), parameters)
        return [{**dict(row), "services": row["services"].split(",")} for row in rows]

    def story(self, trace_id: str) -> list[Span]:
        """The trace, all it came from and all that came of it.

        Links point to where something came from. The two ways are followed apart: what else came
        of the same source is another story.
        """
        sources = self.reachable(trace_id, "trace_id", "linked_trace_id")
        results = self.reachable(trace_id, "linked_trace_id", "trace_id")
        return self.spans(sorted(sources | results))

    def reachable(self, trace_id: str, start: str, end: str) -> set[str]:
        """At most `TRACES_MAX` traces, the nearest first."""
        found = {trace_id}
        edge = [trace_id]
        step = f"select distinct {end} from link where {start} = ? order by 1"  # noqa: S608 - column names of ours
        while edge:
            nearby = [row[0] for one in edge for row in self.connection.execute(step, (one,))]
            edge = [one for one in dict.fromkeys(nearby) if one not in found]
            edge = edge[: TRACES_MAX - len(found)]
            found.update(edge)
        return found

    def orphans(self, since_ns: int, limit: int) -> list[Span]:
        """The latest spans from then on whose parent is not here: lost, or still open."""
        rows = self.connection.execute(ORPHANS, (since_ns, min(limit, TRACES_MAX)))
        return [span_of(row, []) for row in rows]

    def services(self) -> list[dict[str, Any]]:
        rows = self.connection.execute(
            "select service as name, count(*) as spans, sum(status = 'error') as errors, "
            "max(end_ns) as last_ns from span group by service order by service"
        )
        return [dict(row) for row in rows]


def text_of(value: Any) -> str:
    """An attribute as it is searched for: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def span_of(row: sqlite3.Row, links: list[Link]) -> Span:
    fields = {name: row[name] for name in row.keys() if name != "position"}  # noqa: SIM118 - a Row iterates over values
    fields["attributes"] = msgspec.json.decode(row["attributes"])
    fields["events"] = msgspec.json.decode(row["events"])
    return Span(**fields, links=links)
