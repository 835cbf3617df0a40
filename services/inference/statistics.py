"""What is counted about a served version: for Prometheus, and in the protocol's own words."""

import time

import msgspec
from prometheus_client import Counter, Gauge, Histogram

from services.inference.batcher import Result

NANOSECONDS = 1e9
SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LABELS = ("model", "version")

REQUESTS = Counter("leptonic_inference_requests", "Requests answered or failed", LABELS)
ERRORS = Counter("leptonic_inference_errors", "Requests not answered, by status", (*LABELS, "code"))
LATENCY = Histogram("leptonic_inference_latency_seconds", "Door to answer", LABELS, buckets=SECONDS)
QUEUE = Histogram("leptonic_inference_queue_seconds", "Wait for a batch", LABELS, buckets=SECONDS)
BATCH = Histogram("leptonic_inference_batch_rows", "Rows of a run batch", LABELS, buckets=ROWS)
TRAFFIC = Gauge(
    "leptonic_inference_traffic_percent", "Share of a model's requests a version gets", LABELS
)
LOG_DROPPED = Counter(
    "leptonic_inference_request_log_dropped", "Requests not logged because the log was full"
)


class Duration(msgspec.Struct):
    """How often, and how long altogether."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += int(seconds * NANOSECONDS)


class Statistics:
    """Of one version, since it was loaded."""

    def __init__(self, model: str, version: str) -> None:
        self.labels = (model, version)
        self.requests = REQUESTS.labels(model, version)
        self.latency = LATENCY.labels(model, version)
        self.queued = QUEUE.labels(model, version)
        self.batch_rows = BATCH.labels(model, version)
        self.traffic = TRAFFIC.labels(model, version)
        self.last_inference_ms = 0
        self.inference_count = 0
        """Rows."""
        self.success = Duration()
        self.fail = Duration()
        self.queue = Duration()
        self.compute_infer = Duration()
        self.batches: dict[int, Duration] = {}
        """Rows -> runs of that many."""

    @property
    def execution_count(self) -> int:
        return sum(batch.count for batch in self.batches.values())

    def ran(self, rows: int, seconds: float) -> None:
        self.batches.setdefault(rows, Duration()).add(seconds)
        self.batch_rows.observe(rows)

    def answered(self, rows: int, result: Result, seconds: float) -> None:
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.inference_count += rows
        self.success.add(seconds)
        self.queue.add(result.queue_s)
        self.compute_infer.add(result.run_s)
        self.requests.inc()
        self.latency.observe(seconds)
        self.queued.observe(result.queue_s)

    def refused(self, code: str, seconds: float) -> None:
        self.fail.add(seconds)
        self.requests.inc()
        ERRORS.labels(*self.labels, code).inc()
