"""Spans over OTLP, and logs as JSON lines that carry the trace they belong to.

A place in a trace is passed around as its W3C `traceparent`: a string that fits a header, a column
and an event.
"""

import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import Link, Span, SpanKind, StatusCode

from libs.telemetry.export import QUEUE_MAX, Insistent
from libs.telemetry.logs import JsonLines, log_everything, log_to_stderr
from libs.telemetry.process import VERSION, identify, service

__all__ = [
    "VERSION",
    "ChosenIds",
    "JsonLines",
    "Link",
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
    provider = TracerProvider(resource=Resource.create(about), id_generator=ChosenIds())
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


class ChosenIds(RandomIdGenerator):
    """Random ids, but for a span whose place was told to its caller before it was recorded."""

    def __init__(self) -> None:
        self.here = threading.local()

    @contextmanager
    def choosing(self, place: trace.SpanContext) -> Iterator[None]:
        """What this thread starts in the block is there."""
        self.here.place = place
        try:
            yield
        finally:
            del self.here.place

    def generate_span_id(self) -> int:
        place = getattr(self.here, "place", None)
        return place.span_id if place else super().generate_span_id()

    def generate_trace_id(self) -> int:
        place = getattr(self.here, "place", None)
        return place.trace_id if place else super().generate_trace_id()


def record(
    name: str,
    *,
    place: str,
    parent: str,
    began_ns: int,
    ended_ns: int,
    attributes: Mapping[str, str | int | float | bool] | None = None,
    links: Sequence[trace.SpanContext] = (),
    failed: str = "",
) -> None:
    """A server's span of something that is over, at a place that was chosen before.

    `began_ns` and `ended_ns` are of `time.monotonic_ns`.
    """
    ids = getattr(trace.get_tracer_provider(), "id_generator", None)
    if not isinstance(ids, ChosenIds):
        return
    offset_ns = time.time_ns() - time.monotonic_ns()
    with ids.choosing(span_context_of(place)):
        one = trace.get_tracer("leptonic").start_span(
            name,
            context=context_of(parent),
            kind=SpanKind.SERVER,
            attributes=dict(attributes or {}),
            links=[Link(link) for link in links],
            start_time=began_ns + offset_ns,
        )
    if failed:
        mark_failed(one, failed)
    one.end(ended_ns + offset_ns)


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


def span_context_of(traceparent: str) -> trace.SpanContext:
    return trace.get_current_span(context_of(traceparent)).get_span_context()


def mark_failed(one: Span, reason: str) -> None:
    one.set_status(StatusCode.ERROR, reason)
