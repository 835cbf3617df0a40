"""Spans over OTLP, and logs as JSON lines that carry the trace they belong to.

A place in a trace is passed around as its W3C `traceparent`: a string that fits a header, a column
and an event.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from libs.telemetry.export import QUEUE_MAX, Insistent
from libs.telemetry.logs import JsonLines, log_everything, log_to_stderr
from libs.telemetry.process import VERSION, identify, service

__all__ = [
    "VERSION",
    "JsonLines",
    "Link",
    "Span",
    "SpanKind",
    "current",
    "identify",
    "log_everything",
    "log_to_stderr",
    "service",
    "span",
    "start",
]

EXPORT_DELAY_MS = 200
EXPORT_TIMEOUT_S = 5
LINKS_MAX = 64
"""Links a span carries; a batch of more messages says how many were left out."""


@contextmanager
def start(name: str, endpoint: str, log_level: str = "INFO") -> Iterator[None]:
    """Sends this process's spans to `endpoint` (host:port, OTLP/gRPC) until the block ends.

    `name` is the service's, in its spans, its logs and its metrics.
    """
    log_to_stderr(name, log_level)
    identify(name)
    about = {"service.name": name, "service.version": VERSION}
    provider = TracerProvider(resource=Resource.create(about))
    if endpoint:
        exporter = Insistent(
            OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=EXPORT_TIMEOUT_S)
        )
        processor = BatchSpanProcessor(
            exporter, max_queue_size=QUEUE_MAX, schedule_delay_millis=EXPORT_DELAY_MS
        )
        provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        if endpoint:
            exporter.close()
        provider.shutdown()


@contextmanager
def span(
    name: str,
    *,
    kind: SpanKind = SpanKind.INTERNAL,
    parent: str | None = None,
    links: Iterable[str] = (),
    attributes: Mapping[str, str | int | float | bool] | None = None,
    start_time_ns: int | None = None,
) -> Iterator[Span]:
    """A span that is current inside the block; an exception marks it as failed.

    `parent` is a traceparent: None continues what is current, "" begins a new trace.
    """
    followed = [link for link in links if link]
    opened = trace.get_tracer("leptonic").start_as_current_span(
        name,
        context=None if parent is None else context_of(parent),
        kind=kind,
        links=[Link(span_context_of(link)) for link in followed[:LINKS_MAX]],
        attributes=dict(attributes or {}),
        start_time=start_time_ns,
    )
    with opened as current_span:
        if len(followed) > LINKS_MAX:
            current_span.set_attribute("leptonic.links_left_out", len(followed) - LINKS_MAX)
        yield current_span


def current() -> str:
    """The traceparent of the current span; "" outside any."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


def traceparent_of(one: Span) -> str:
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=trace.set_span_in_context(one))
    return carrier.get("traceparent", "")


def context_of(traceparent: str) -> Context:
    return propagate.extract({"traceparent": traceparent}, context=Context())


def span_context_of(traceparent: str) -> trace.SpanContext:
    return trace.get_current_span(context_of(traceparent)).get_span_context()


def mark_failed(one: Span, reason: str) -> None:
    one.set_status(StatusCode.ERROR, reason)
