"""Spans as they are stored and told, and what can be read off a set of them."""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec


class Link(msgspec.Struct, frozen=True):
    """Another place in another trace: where this came from."""

    trace_id: str
    span_id: str


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One OTLP span; ids are lower-case hex, times Unix ns."""

    trace_id: str
    span_id: str
    parent_id: str = ""
    service: str
    name: str
    kind: str = "internal"
    start_ns: int
    end_ns: int
    status: str = "unset"
    """`unset`, `ok` or `error`."""
    status_message: str = ""
    attributes: dict[str, Any] = {}
    events: list[dict[str, Any]] = []
    links: list[Link] = []

    @property
    def duration_ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a waterfall."""

    depth: int
    name: str
    service: str
    duration_ms: float
    start_ns: int
    status: str
    trace_id: str
    span_id: str


def tree(spans: Iterable[Span]) -> list[Row]:
    """Spans depth first, siblings by start; a span whose parent is not here is at depth 0."""
    ordered = sorted(spans, key=lambda span: (span.start_ns, span.span_id))
    by_place = {place(span) for span in ordered}
    children: dict[tuple[str, str], list[Span]] = {}
    for span in ordered:
        children.setdefault((span.trace_id, span.parent_id), []).append(span)
    roots = [s for s in ordered if (s.trace_id, s.parent_id) not in by_place]
    seen: set[tuple[str, str]] = set()
    # Spans that are each other's parents hang from no root.
    return [row for root in (*roots, *ordered) for row in below(root, children, seen)]


def below(
    root: Span, children: dict[tuple[str, str], list[Span]], seen: set[tuple[str, str]]
) -> Iterator[Row]:
    waiting = [(root, 0)]
    while waiting:
        span, depth = waiting.pop()
        if place(span) in seen:
            continue
        seen.add(place(span))
        yield Row(
            depth=depth,
            name=span.name,
            service=span.service,
            duration_ms=span.duration_ms,
            start_ns=span.start_ns,
            status=span.status,
            trace_id=span.trace_id,
            span_id=span.span_id,
        )
        waiting += [(child, depth + 1) for child in reversed(children.get(place(span), []))]


def orphans(spans: Iterable[Span]) -> list[Span]:
    """Spans that name a parent which is not among these."""
    every = list(spans)
    places = {place(span) for span in every}
    return [s for s in every if s.parent_id and (s.trace_id, s.parent_id) not in places]


def place(span: Span) -> tuple[str, str]:
    return span.trace_id, span.span_id
