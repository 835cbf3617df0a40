"""Waterfalls, orphans, and stories that follow links."""

from pathlib import Path

import pytest

from stack.span_store import SpanStore
from stack.spans import Link, Span, orphans, tree


def span(
    place: str, parent: str = "", links: tuple[str, ...] = (), start: int = 0, **other: str
) -> Span:
    """`place` and `links` are `trace/span`."""
    trace_id, span_id = place.split("/")
    return Span(
        trace_id=trace_id,
        span_id=span_id,
        parent_id=parent,
        service=other.pop("service", "ingest"),
        name=span_id,
        start_ns=start,
        end_ns=start + 2_000_000,
        links=[Link(*link.split("/")) for link in links],
        attributes=dict(other),
    )


@pytest.fixture
def store(tmp_path: Path) -> SpanStore:
    return SpanStore(tmp_path / "traces.db")


def test_tree_is_depth_first_with_siblings_by_start() -> None:
    spans = [span("t/c", "a", start=3), span("t/b", "a", start=2), span("t/a", start=1)]
    spans.append(span("t/d", "b", start=4))
    rows = [(row.depth, row.name, row.duration_ms) for row in tree(spans)]
    assert rows == [(0, "a", 2.0), (1, "b", 2.0), (2, "d", 2.0), (1, "c", 2.0)]


def test_a_span_without_its_parent_is_an_orphan_and_a_root() -> None:
    spans = [span("t/a"), span("t/b", "a"), span("t/lost", "gone"), span("u/x", "a")]
    assert [one.span_id for one in orphans(spans)] == ["lost", "x"]
    assert [row.name for row in tree(spans) if row.depth == 0] == ["a", "lost", "x"]


def test_spans_that_are_each_others_parents_are_not_left_out() -> None:
    assert sorted(row.name for row in tree([span("t/a", "b"), span("t/b", "a")])) == ["a", "b"]


def test_a_deep_trace_is_no_problem() -> None:
    chain = [span("t/0"), *(span(f"t/{n}", str(n - 1), start=n) for n in range(1, 5000))]
    assert tree(chain)[-1].depth == 4999


def test_a_story_leads_from_a_prediction_to_the_ingest_of_its_records(store: SpanStore) -> None:
    store.add(
        [
            span("publish1/p"),
            span("publish2/p"),
            span("ingest/part", links=("publish1/p", "publish2/p")),
            span("version/build", links=("ingest/part",)),
            span("train/job", links=("version/build",)),
            span("predict/call", links=("train/job",)),
            span("another/call", links=("train/job",)),
            span("unrelated/x"),
        ]
    )
    story = {one.trace_id for one in store.story("predict")}
    assert story == {"predict", "train", "version", "ingest", "publish1", "publish2"}
    results = {one.trace_id for one in store.story("publish1")}
    assert results == {"publish1", "ingest", "version", "train", "predict", "another"}


def test_what_was_stored_is_told_unchanged(store: SpanStore) -> None:
    one = span("t/a", "b", links=("u/x",), request_id="r1")
    store.add([one, one])
    store.add([one])
    assert store.trace("t") == [one]


def test_traces_are_found_by_attribute(store: SpanStore) -> None:
    store.add([span("t/a", request_id="r1", start=1), span("t/b", service="inference", start=2)])
    store.add([span("u/a", request_id="r2", start=3)])
    (found,) = store.traces("request_id", "r1")
    assert (found["trace_id"], found["spans"], found["start_ns"]) == ("t", 2, 1)
    assert sorted(found["services"]) == ["inference", "ingest"]
    assert [one["trace_id"] for one in store.traces()] == ["u", "t"]
    assert store.traces("request_id", "nobody") == []


def test_spans_without_their_parent_are_found_until_it_comes(store: SpanStore) -> None:
    store.add([span("t/child", "late", start=5), span("u/old", "gone", start=1), span("v/root")])
    assert [one.span_id for one in store.orphans(0, 10)] == ["old", "child"]
    assert [one.span_id for one in store.orphans(2, 10)] == ["child"]
    store.add([span("u/late")])
    assert [one.span_id for one in store.orphans(2, 10)] == ["child"], "that is another trace"
    store.add([span("t/late")])
    assert store.orphans(2, 10) == []


def test_the_oldest_spans_go_first(tmp_path: Path) -> None:
    store = SpanStore(tmp_path / "traces.db", spans_max=2)
    store.add([span("t/a", links=("u/x",), key="v"), span("t/b"), span("t/c")])
    assert [one.span_id for one in store.trace("t")] == ["b", "c"]
    assert store.traces("key", "v") == []
    assert store.reachable("t", "trace_id", "linked_trace_id") == {"t"}
