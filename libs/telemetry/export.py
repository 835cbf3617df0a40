"""Spans on their way: a batch that the collector did not take is sent again."""

import threading
from collections.abc import Sequence
from time import monotonic

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

QUEUE_MAX = 16_384
"""Spans that wait meanwhile, about 2 KiB each; more are dropped, and the SDK says so."""
INSIST_S = 120.0
"""For one batch: one that the collector refuses must not hold up the others for ever."""
RETRY_S = 0.2


class Insistent(SpanExporter):
    """Until it is taken, for at most `INSIST_S` or until `close`.

    The SDK's own exporter gives a batch up with its timeout: of a collector that stood still for
    15 s, spans were left whose parents had been thrown away.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self.exporter = exporter
        self.closing = threading.Event()
        self.away = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        deadline = monotonic() + INSIST_S
        while not (self.away and self.closing.is_set()):
            result = self.exporter.export(spans)
            self.away = result is not SpanExportResult.SUCCESS
            if not self.away or monotonic() > deadline:
                return result
            self.closing.wait(RETRY_S)
        return SpanExportResult.FAILURE

    def close(self) -> None:
        """From now on one failure is enough: a process has 10 s to end."""
        self.closing.set()

    def shutdown(self) -> None:
        self.exporter.shutdown()
