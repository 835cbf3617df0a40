"""A trace's place travels as a traceparent; logs carry it."""

import json
import logging
import subprocess
import sys
import tomllib
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from libs import telemetry

PARENT = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
ROOT = Path(__file__).resolve().parents[3]
OTHER = "00-" + "c" * 32 + "-" + "d" * 16 + "-01"


def read(span: telemetry.Span) -> ReadableSpan:
    assert isinstance(span, ReadableSpan)
    return span


def test_a_parent_is_continued() -> None:
    with telemetry.span("child", parent=PARENT) as span:
        assert telemetry.current().split("-")[1] == "a" * 32
    parent = read(span).parent
    assert parent is not None
    assert format(parent.span_id, "016x") == "b" * 16


def test_no_parent_given_continues_what_is_current_and_an_empty_one_begins_anew() -> None:
    with telemetry.span("outer", parent=PARENT):
        with telemetry.span("inner"):
            assert telemetry.current().split("-")[1] == "a" * 32
        with telemetry.span("apart", parent="") as apart:
            assert read(apart).parent is None
            assert telemetry.current().split("-")[1] != "a" * 32


def test_links_are_bounded_and_the_rest_is_counted() -> None:
    with telemetry.span("batch", links=[OTHER, ""] * 100) as span:
        pass
    assert len(read(span).links) == telemetry.LINKS_MAX
    attributes = read(span).attributes or {}
    assert attributes["leptonic.links_left_out"] == 100 - telemetry.LINKS_MAX


def test_a_place_can_be_kept_and_continued_later() -> None:
    with telemetry.span("first", parent="") as first:
        kept = telemetry.current()
    assert telemetry.traceparent_of(first) == kept
    with telemetry.span("later", parent=kept) as later:
        pass
    assert read(later).context.trace_id == read(first).context.trace_id


def test_outside_a_span_there_is_no_place() -> None:
    assert telemetry.current() == ""


def test_log_lines_are_json_with_the_trace() -> None:
    record = logging.LogRecord("n", logging.WARNING, "f", 1, "%s went", ("it",), None)
    with telemetry.span("work", parent=PARENT):
        line = json.loads(telemetry.JsonLines("ingest").format(record))
    assert (line["message"], line["level"], line["service"]) == ("it went", "WARNING", "ingest")
    assert line["trace_id"] == "a" * 32


def said(program: str) -> list[dict[str, str]]:
    """What a service that runs this program says, line by line."""
    start = "from libs import telemetry\ntelemetry.log_everything('test')\n"
    done = subprocess.run(
        [sys.executable, "-c", start + program], capture_output=True, text=True, check=False
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_an_error_that_ends_the_process_is_one_json_line() -> None:
    (line,) = said("{}['port']")
    assert (line["level"], line["message"]) == ("CRITICAL", "ends: KeyError: 'port'")
    assert "Traceback" in line["exception"]


def test_warnings_and_errors_of_threads_are_json_lines() -> None:
    (warned,) = said("import warnings; warnings.warn('old')")
    assert (warned["level"], warned["logger"]) == ("WARNING", "py.warnings")
    (ended,) = said("import threading; threading.Thread(target=lambda: 1 / 0, name='t').start()")
    assert ended["message"] == "thread t ends: division by zero"


def test_an_error_nobody_can_catch_is_a_json_line() -> None:
    (line,) = said("class A:\n  def __del__(self): raise OSError('late')\nA()")
    assert "late" in line["exception"]


def test_a_task_that_failed_unseen_is_a_json_line() -> None:
    program = """
import asyncio, uvloop
async def main():
    asyncio.create_task(fail())
    await asyncio.sleep(0)
async def fail():
    raise OSError("unseen")
uvloop.run(main())
"""
    (line,) = said(program)
    assert line["logger"] == "asyncio"
    assert "unseen" in line["exception"]


def test_the_release_is_the_one_that_is_packaged() -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert packaged == telemetry.VERSION


def test_a_traceparent_of_a_later_version_has_children_too() -> None:
    later = f"cc{PARENT[2:]}-what-the-future-brings"
    assert telemetry.is_sampled(later)
    place = telemetry.child_of(later)
    assert telemetry.span_context_of(place).trace_id == telemetry.span_context_of(later).trace_id
    assert telemetry.is_sampled(place)


def test_a_span_is_recorded_at_a_place_that_was_told_before() -> None:
    finished = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    provider.add_span_processor(SimpleSpanProcessor(finished))
    place = telemetry.child_of(PARENT)
    other = telemetry.span_context_of(OTHER)
    telemetry.record(
        "told", place=place, parent=PARENT, began_ns=5, ended_ns=9, links=[other], failed="why"
    )
    (span,) = finished.get_finished_spans()
    assert span.context is not None
    assert place.split("-")[1:3] == [
        f"{span.context.trace_id:032x}",
        f"{span.context.span_id:016x}",
    ]
    assert span.parent is not None
    assert PARENT.split("-")[2] == f"{span.parent.span_id:016x}"
    assert (span.end_time or 0) - (span.start_time or 0) == 4
    assert [link.context for link in span.links] == [other]
    assert span.status.description == "why"


def test_a_root_is_recorded_in_the_trace_that_was_told() -> None:
    with telemetry.span("other", parent="") as other:
        telemetry.record("told", place=PARENT, parent="", began_ns=1, ended_ns=2)
        assert telemetry.current().split("-")[1] != "a" * 32
    assert read(other).context is not None
    with telemetry.span("next", parent=""):
        assert telemetry.current().split("-")[1] != "a" * 32
