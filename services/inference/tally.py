"""The sums behind `front.Counts`. Whoever calls holds the batcher's lock."""

import time
from bisect import bisect_left
from collections.abc import Sequence

from services.inference.front import LATENCY_BOUNDS_NS, Counts

MS = 1_000_000
"""In ns."""


class Tally:
    def __init__(self) -> None:
        self.requests = 0
        self.rows = 0
        self.success_ns = self.queue_ns = 0
        self.input_ns = self.infer_ns = self.output_ns = 0
        self.failures: dict[int, tuple[int, int]] = {}
        self.batches: dict[int, tuple[int, int, int, int]] = {}
        self.latency = [0] * (len(LATENCY_BOUNDS_NS) + 1)
        self.queue = [0] * (len(LATENCY_BOUNDS_NS) + 1)
        self.last_ms = 0

    def answered(
        self, arrived_ns: Sequence[int], rows: int, taken_ns: int, spent_ns: tuple[int, int, int]
    ) -> int:
        """A batch, now (given back); `spent_ns`: gathering, inferring, and what came after."""
        requests, ended_ns = len(arrived_ns), time.monotonic_ns()
        self.requests += requests
        self.rows += rows
        self.success_ns += requests * ended_ns - sum(arrived_ns)
        self.queue_ns += requests * taken_ns - sum(arrived_ns)
        for at_ns in arrived_ns:
            self.latency[bisect_left(LATENCY_BOUNDS_NS, ended_ns - at_ns)] += 1
            self.queue[bisect_left(LATENCY_BOUNDS_NS, taken_ns - at_ns)] += 1
        input_ns, infer_ns, output_ns = spent_ns
        self.input_ns += requests * input_ns
        self.infer_ns += requests * infer_ns
        self.output_ns += requests * output_ns
        runs, ins, infers, outs = self.batches.get(rows, (0, 0, 0, 0))
        self.batches[rows] = (runs + 1, ins + input_ns, infers + infer_ns, outs + output_ns)
        self.last_ms = time.time_ns() // MS
        return ended_ns

    def failed(self, code: int, requests: int, ns: int) -> None:
        known, known_ns = self.failures.get(code, (0, 0))
        self.failures[code] = (known + requests, known_ns + ns)

    def counts(self, waiting: int) -> Counts:
        return Counts(
            success_count=self.requests,
            success_ns=self.success_ns,
            failures=dict(self.failures),
            queue_ns=self.queue_ns,
            compute_input_ns=self.input_ns,
            compute_infer_ns=self.infer_ns,
            compute_output_ns=self.output_ns,
            inference_count=self.rows,
            batches=dict(self.batches),
            latency=list(self.latency),
            queue=list(self.queue),
            waiting=waiting,
            last_inference_ms=self.last_ms,
        )
