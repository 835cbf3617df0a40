"""Logs as JSON lines: also what Python says by itself, warnings and errors that nobody caught."""

import json
import logging
import sys
import threading
from types import TracebackType

from opentelemetry import trace

log = logging.getLogger(__name__)


class JsonLines(logging.Formatter):
    """One JSON object a line, with the trace it belongs to."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}",
            "level": record.levelname,
            "service": self.service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        place = trace.get_current_span().get_span_context()
        if place.is_valid:
            line["trace_id"] = format(place.trace_id, "032x")
            line["span_id"] = format(place.span_id, "016x")
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(service: str, level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(service))
    logging.basicConfig(handlers=[handler], level=level, force=True)


def log_everything(service: str) -> None:
    """For a process that is a service, before anything else: what nobody logs is a line too."""
    log_to_stderr(service, "INFO")
    logging.captureWarnings(True)
    sys.excepthook = uncaught
    sys.unraisablehook = unraisable
    threading.excepthook = uncaught_in_thread


def uncaught(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    log.critical("ends: %s: %s", kind.__name__, error, exc_info=(kind, error, place))


def uncaught_in_thread(about: threading.ExceptHookArgs) -> None:
    name = about.thread.name if about.thread else "?"
    error = about.exc_value or about.exc_type()
    log.error("thread %s ends: %s", name, error, exc_info=error)


def unraisable(about: "sys.UnraisableHookArgs") -> None:
    said = about.err_msg or "ignored"
    log.error("%s: %r", said, about.object, exc_info=about.exc_value)
