"""Spans over OTLP, and logs as JSON lines that carry the trace they belong to.

A place in a trace is passed around as its W3C `traceparent`: a string that fits a header, a column
and an event.
"""

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SynchronousMultiSpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from libs.telemetry.export import QUEUE_MAX, Insistent
from libs.telemetry.logs import JsonLines, log_everything, log_to_stderr
from libs.telemetry.process import VERSION, identify, service

__all__ = [
    "VERSION",
    "JsonLines",
    "Link",
    "Provider",
    "Span",
    "SpanKind",
    "child_of",
    "current",
    "identify",
    "is_sampled",
    "log_everything",
    "log_to_stderr",
    "record",
    "service",
    "span",
    "start",
    "wall_time",
]

EXPORT_DELAY_MS = 200
EXPORT_TIMEOUT_S = 5
SCOPE = InstrumentationScope("leptonic")
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
    provider = Provider(Resource.create(about))
    if endpoint:
        exporter = Insistent(exporter_to(endpoint))
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


class Provider(TracerProvider):
    """Of the SDK, and a way in for spans that are over already."""

    def __init__(self, resource: Resource) -> None:
        self.finished = SynchronousMultiSpanProcessor()  # type: ignore[no-untyped-call]
        super().__init__(resource=resource, active_span_processor=self.finished)


def exporter_to(endpoint: str) -> SpanExporter:
    # Importing it takes an eighth of the time in which a server without it is ready.
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=EXPORT_TIMEOUT_S)


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


def record(
    name: str,
    *,
    place: str,
    parent: str,
    began_ns: int,
    ended_ns: int,
    attributes: Mapping[str, str | int | float | bool] | None = None,
    links: Sequence[SpanContext] = (),
    failed: str = "",
) -> None:
    """A server's span of something that is over, at a place that was chosen before. None under a
    parent that says it is not sampled.

    `began_ns` and `ended_ns` are of `time.monotonic_ns`. To start and end a span for it would take
    125 us, this takes 8.
    """
    provider = trace.get_tracer_provider()
    above = span_context_of(parent) if parent else trace.INVALID_SPAN_CONTEXT
    if not isinstance(provider, Provider) or (above.is_valid and not above.trace_flags.sampled):
        return
    _, trace_id, span_id, flags = place.split("-")
    offset_ns = time.time_ns() - time.monotonic_ns()
    over = ReadableSpan(
        name,
        context=SpanContext(int(trace_id, 16), int(span_id, 16), False, TraceFlags(int(flags, 16))),
        parent=above if above.is_valid else None,
        resource=provider.resource,
        attributes=dict(attributes or {}),
        links=[Link(link) for link in links],
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, failed) if failed else Status(StatusCode.UNSET),
        start_time=began_ns + offset_ns,
        end_time=ended_ns + offset_ns,
        instrumentation_scope=SCOPE,
    )
    provider.finished.on_end(over)


def wall_time(at_ns: int) -> datetime:
    """Of a `time.monotonic_ns`."""
    return datetime.fromtimestamp((time.time_ns() - time.monotonic_ns() + at_ns) / 1e9, UTC)


def is_sampled(traceparent: str) -> bool:
    """Whether its caller traces."""
    return bool(traceparent) and span_context_of(traceparent).trace_flags.sampled


def child_of(traceparent: str) -> str:
    """A new place in the caller's trace."""
    _, trace_id, _, flags = traceparent.split("-")[:4]  # a later version of the format has more
    return f"00-{trace_id}-{secrets.token_hex(8)}-{flags}"


def current() -> str:
    """The traceparent of the current span; "" outside any."""
    return traceparent_of(trace.get_current_span())


def traceparent_of(one: Span) -> str:
    """By hand: the propagators take 8 us, and every question asks."""
    place = one.get_span_context()
    if not place.is_valid:
        return ""
    return f"00-{place.trace_id:032x}-{place.span_id:016x}-{place.trace_flags:02x}"


def context_of(traceparent: str) -> Context:
    return propagate.extract({"traceparent": traceparent}, context=Context())


def span_context_of(traceparent: str) -> SpanContext:
    return trace.get_current_span(context_of(traceparent)).get_span_context()


def mark_failed(one: Span, reason: str) -> None:
    one.set_status(StatusCode.ERROR, reason)
