"""What the batchers counted, as Prometheus reads it: under our names and under Triton's."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import grpc
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    UnknownMetricFamily,
)

from services.inference.endpoints import Endpoints
from services.inference.front import LATENCY_BOUNDS_NS, Counts
from services.inference.served import Served

NANOSECONDS = 1e9
US_NS = 1000
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LABELS = ("model", "version")
CODES = {code.value[0]: code.name for code in grpc.StatusCode}
SECONDS = [str(bound / NANOSECONDS) for bound in LATENCY_BOUNDS_NS]
Labels = tuple[str, str]
Rows = Sequence[tuple[Labels, Counts]]

NV: dict[str, tuple[str, Callable[[Counts], int]]] = {
    "nv_inference_request_success": ("Requests answered", lambda c: c.success_count),
    "nv_inference_request_failure": ("Requests not answered", lambda c: failed(c)[0]),
    "nv_inference_count": ("Rows of requests answered", lambda c: c.inference_count),
    "nv_inference_exec_count": ("Batches run", lambda c: runs(c)),
    "nv_inference_request_duration_us": ("Joined to answered", lambda c: c.success_ns // US_NS),
    "nv_inference_queue_duration_us": ("Wait for a batch", lambda c: c.queue_ns // US_NS),
    "nv_inference_compute_input_duration_us": (
        "Gathering batches",
        lambda c: c.compute_input_ns // US_NS,
    ),
    "nv_inference_compute_infer_duration_us": (
        "Running batches",
        lambda c: c.compute_infer_ns // US_NS,
    ),
    "nv_inference_compute_output_duration_us": (
        "Answering batches",
        lambda c: c.compute_output_ns // US_NS,
    ),
    "nv_inference_pending_request_count": ("Requests in the queue", lambda c: c.waiting),
}
"""Triton's metrics, with the microseconds of its unit."""


class Statistics:
    """A Prometheus collector: nothing is counted twice, and nothing for each request."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints

    def describe(self) -> list[Metric]:
        """None: two replicas in one process may both be there."""
        return []

    def collect(self) -> Iterator[Metric]:
        rows = [((one.name, one.version), one.counts()) for one in self.served()]
        yield counter("requests", "Requests answered or failed", rows, answered)
        yield errors(rows)
        yield latencies("latency", "Joined to answered", rows, lambda c: (c.latency, c.success_ns))
        yield latencies("queue", "Wait for a batch", rows, lambda c: (c.queue, c.queue_ns))
        yield batch_rows(rows)
        yield self.traffic()
        for name, (text, value) in NV.items():
            metric = UnknownMetricFamily(name, text, labels=LABELS)
            for labels, counts in rows:
                metric.add_metric(labels, value(counts))
            yield metric

    def served(self) -> list[Served]:
        return [one for e in list(self.endpoints.by_key.values()) for one in e.served.values()]

    def traffic(self) -> Metric:
        text = "Share of a model's requests a version gets"
        metric = GaugeMetricFamily("leptonic_inference_traffic_percent", text, labels=LABELS)
        for endpoint in list(self.endpoints.by_key.values()):
            for version in endpoint.served:
                metric.add_metric((endpoint.name, version), endpoint.route.get(version, 0))
        return metric


def failed(counts: Counts) -> tuple[int, int]:
    """(requests, ns)."""
    requests, spent_ns = (
        zip(*counts.failures.values(), strict=True) if counts.failures else ((), ())
    )
    return sum(requests), sum(spent_ns)


def answered(counts: Counts) -> int:
    return counts.success_count + failed(counts)[0]


def runs(counts: Counts) -> int:
    return sum(runs for runs, *_ in counts.batches.values())


def counter(name: str, text: str, rows: Rows, value: Callable[[Counts], int]) -> Metric:
    metric = CounterMetricFamily(f"leptonic_inference_{name}", text, labels=LABELS)
    for labels, counts in rows:
        metric.add_metric(labels, value(counts))
    return metric


def errors(rows: Rows) -> Metric:
    text = "Requests not answered, by status"
    metric = CounterMetricFamily("leptonic_inference_errors", text, labels=(*LABELS, "code"))
    for labels, counts in rows:
        for code, (requests, _) in counts.failures.items():
            metric.add_metric((*labels, CODES[code]), requests)
    return metric


def latencies(
    name: str, text: str, rows: Rows, value: Callable[[Counts], tuple[list[int], int]]
) -> Metric:
    metric = HistogramMetricFamily(f"leptonic_inference_{name}_seconds", text, labels=LABELS)
    for labels, counts in rows:
        buckets, total_ns = value(counts)
        sums = zip((*SECONDS, "+Inf"), accumulate(buckets), strict=True)
        metric.add_metric(labels, list(sums), total_ns / NANOSECONDS)
    return metric


def batch_rows(rows: Rows) -> Metric:
    metric = HistogramMetricFamily(
        "leptonic_inference_batch_rows", "Rows of a run batch", labels=LABELS
    )
    for labels, counts in rows:
        sizes = {size: found[0] for size, found in counts.batches.items()}
        below = [(str(float(b)), sum(n for size, n in sizes.items() if size <= b)) for b in ROWS]
        total = sum(size * found for size, found in sizes.items())
        metric.add_metric(labels, [*below, ("+Inf", sum(sizes.values()))], total)
    return metric
