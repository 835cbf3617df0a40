"""Calls to object storage, as Prometheus reads them at `/metrics`."""

from prometheus_client import Counter, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ANSWERED = Histogram(
    "leptonic_object_store_seconds",
    "Calls to object storage that were answered",
    ["operation"],
    buckets=SECONDS,
)
FAILURES = Counter(
    "leptonic_object_store_failures", "Calls to object storage that failed", ["operation"]
)
