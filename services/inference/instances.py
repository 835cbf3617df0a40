"""Several workers of one model: its `instance_group` asks for them, and so it computes on several
cores.
"""

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

from services.inference.isolated import Isolated
from services.inference.tensors import Arrays


class Instances:
    """One model to the doors: whichever worker is idle takes the next batch."""

    def __init__(self, workers: Sequence[Isolated]) -> None:
        first = workers[0]
        self.workers = workers
        self.digest = first.digest
        self.signature = first.signature
        self.batched = first.batched
        self.decoupled = first.decoupled
        self.parallel: int | None = len(workers)
        self.platform = first.platform
        self.labels = first.labels
        self.idle: SimpleQueue[Isolated] = SimpleQueue()
        for worker in workers:
            self.idle.put(worker)

    @property
    def on_crash(self) -> Callable[[str], None] | None:
        return self.workers[0].on_crash

    @on_crash.setter
    def on_crash(self, told: Callable[[str], None] | None) -> None:
        for worker in self.workers:
            worker.on_crash = told

    def run(self, inputs: Arrays) -> Arrays:
        worker = self.idle.get()
        try:
            return worker.run(inputs)
        finally:
            self.idle.put(worker)

    def stream(self, inputs: Arrays) -> Iterator[Arrays]:
        """A worker has several streams at once: in turn, then."""
        worker = self.idle.get()
        self.idle.put(worker)
        yield from worker.stream(inputs)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
