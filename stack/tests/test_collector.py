"""Spans in over OTLP, out over HTTP; the sender is the SDK our services use."""

import asyncio
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Link, SpanKind, format_trace_id

from libs.telemetry.export import Insistent
from stack import collector, ports
from stack.ports import LOOPBACK
from stack.testing import eventually


async def get(port: int, path: str) -> Any:
    def read() -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return json.load(answer)

    return await asyncio.to_thread(read)


def send_two_linked_traces(port: int) -> tuple[str, str]:
    """Ids of (trace of two spans, trace that links to its first span)."""
    provider = TracerProvider(resource=Resource.create({"service.name": "ingest"}))
    exporter = OTLPSpanExporter(endpoint=f"127.0.0.1:{port}", insecure=True)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("test")
    with (
        tracer.start_as_current_span("land", attributes={"rows": 3}) as source,
        pytest.raises(ValueError, match="bad"),
        tracer.start_as_current_span("write"),
    ):
        raise ValueError("bad")
    link = Link(source.get_span_context())
    with tracer.start_as_current_span("build", kind=SpanKind.CONSUMER, links=[link]) as result:
        pass
    provider.shutdown()
    ids = (one.get_span_context().trace_id for one in (source, result))
    first, second = (format_trace_id(one) for one in ids)
    return first, second


async def test_spans_sent_by_the_sdk_are_told_as_one_story(tmp_path: Path) -> None:
    async with collector.serving(tmp_path / "traces.db", LOOPBACK, 0, 0) as (otlp, http):
        first, second = await asyncio.to_thread(send_two_linked_traces, otlp)
        trace = await get(http, f"/v1/traces/{first}")
        assert [(row["depth"], row["name"]) for row in trace["tree"]] == [(0, "land"), (1, "write")]
        land, write = trace["spans"]
        assert land["attributes"] == {"rows": 3}
        assert (write["status"], write["status_message"]) == ("error", "ValueError: bad")
        assert write["events"][0]["attributes"]["exception.message"] == "bad"
        story = await get(http, f"/v1/story/{second}")
        assert story["traces"] == [first, second]
        assert story["orphans"] == []
        assert await get(http, "/v1/orphans?since_ns=1") == {"spans": []}
        (build,) = (one for one in story["spans"] if one["name"] == "build")
        assert build["kind"] == "consumer"
        assert build["links"] == [{"trace_id": first, "span_id": land["span_id"]}]
        found = await get(http, "/v1/traces?attribute=rows&value=3")
        assert [one["trace_id"] for one in found["traces"]] == [first]
        services = await get(http, "/v1/services")
        assert [(one["name"], one["spans"]) for one in services["services"]] == [("ingest", 3)]
        assert await get(http, "/health/ready") == {"ready": True}


async def test_stored_spans_are_there_after_a_restart(tmp_path: Path) -> None:
    async with collector.serving(tmp_path / "traces.db", LOOPBACK, 0, 0) as (otlp, _):
        first, _ = await asyncio.to_thread(send_two_linked_traces, otlp)
    async with collector.serving(tmp_path / "traces.db", LOOPBACK, 0, 0) as (_, http):
        assert len((await get(http, f"/v1/traces/{first}"))["spans"]) == 2


async def test_spans_wait_for_a_collector_that_is_away(tmp_path: Path) -> None:
    (port,) = ports.free(1)
    exporter = Insistent(OTLPSpanExporter(endpoint=f"127.0.0.1:{port}", insecure=True, timeout=1))
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def send() -> None:
        provider.get_tracer("test").start_span("early").end()

    sending = asyncio.create_task(asyncio.to_thread(send))
    await eventually(lambda: exporter.away)
    async with collector.serving(tmp_path / "traces.db", LOOPBACK, port, 0) as (_, http):
        await sending
        assert len((await get(http, "/v1/traces"))["traces"]) == 1
    exporter.close()
    await asyncio.to_thread(send)
    assert exporter.away, "and ends without one"
    provider.shutdown()


async def test_a_span_with_a_short_id_is_refused_and_the_rest_kept(tmp_path: Path) -> None:
    good = trace_pb2.Span(trace_id=b"t" * 16, span_id=b"s" * 8, name="good")
    bad = trace_pb2.Span(trace_id=b"short", span_id=b"s" * 8, name="bad")
    scope = trace_pb2.ScopeSpans(spans=[bad, good])
    request = trace_service_pb2.ExportTraceServiceRequest(
        resource_spans=[trace_pb2.ResourceSpans(scope_spans=[scope])]
    )
    async with (
        collector.serving(tmp_path / "traces.db", LOOPBACK, 0, 0) as (otlp, http),
        grpc.aio.insecure_channel(f"127.0.0.1:{otlp}") as channel,
    ):
        answer = await trace_service_pb2_grpc.TraceServiceStub(channel).Export(request)  # type: ignore[no-untyped-call]
        assert answer.partial_success.rejected_spans == 1
        assert "16 bytes" in answer.partial_success.error_message
        assert len((await get(http, f"/v1/traces/{(b't' * 16).hex()}"))["spans"]) == 1


@pytest.mark.parametrize(
    ("path", "status", "field"),
    [
        ("/v1/traces/none", 404, "trace_id"),
        ("/v1/traces?limit=many", 400, "limit"),
        ("/v1/orphans?since_ns=0", 400, "since_ns"),
    ],
)
async def test_a_wrong_question_is_refused(
    tmp_path: Path, path: str, status: int, field: str
) -> None:
    async with collector.serving(tmp_path / "traces.db", LOOPBACK, 0, 0) as (_, http):
        with pytest.raises(urllib.error.HTTPError) as refused:
            await get(http, path)
        with refused.value as answer:
            assert (answer.code, json.load(answer)["field"]) == (status, field)
