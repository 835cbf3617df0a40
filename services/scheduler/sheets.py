"""A node in the ledger's own account (`ledger.py`)."""

from dataclasses import dataclass, field

from libs.contracts.events import JobRequested
from services.scheduler.stimuli import Heartbeat

WHOLE = 1000


@dataclass
class Sheet:
    """A node: as it last said, and what was given of it."""

    last: Heartbeat
    healthy: bool = False
    lost: bool = False
    cpu_milli: int = 0
    memory_mib: int = 0
    gpu_milli: dict[int, int] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.last.capacity.gpu_milli * self.last.capacity.gpus // WHOLE

    def check(self) -> None:
        has, name = self.last.capacity, self.last.node
        assert 0 <= self.cpu_milli <= has.cpu_milli, (name, self.cpu_milli, has)
        assert 0 <= self.memory_mib <= has.memory_mib, (name, self.memory_mib, has)
        for gpu, milli in self.gpu_milli.items():
            assert 0 <= milli <= WHOLE, (name, gpu, milli)
            assert not milli or gpu < self.gpus, (name, gpu, self.gpus)
        assert not self.lost or not (self.cpu_milli or any(self.gpu_milli.values())), name

    def suits(self, request: JobRequested) -> bool:
        if (
            gpus_of(request)
            and request.gpu_models
            and self.last.gpu_model not in request.gpu_models
        ):
            return False
        labelled = request.labels.items() <= self.last.labels.items()
        return self.healthy and request.kind in self.last.kinds and labelled

    def room(self, request: JobRequested, empty: bool = False) -> int:
        """How many of its workers fit: every GPU holds so many of their parts."""
        has, each = self.last.capacity, request.resources
        counts = [request.workers]
        if each.cpu_milli:
            taken = 0 if empty else self.cpu_milli
            counts.append((has.cpu_milli - taken) // each.cpu_milli)
        if each.memory_mib:
            taken = 0 if empty else self.memory_mib
            counts.append((has.memory_mib - taken) // each.memory_mib)
        if gpus_of(request):
            taken_of = {} if empty else self.gpu_milli
            parts = ((WHOLE - taken_of.get(i, 0)) // milli_of(request) for i in range(self.gpus))
            counts.append(sum(parts) // gpus_of(request))
        return min(counts)


def gpus_of(request: JobRequested) -> int:
    """Of one worker. 2000 milli of one GPU are two whole ones."""
    each = request.resources
    if not each.gpu_milli:
        return 0
    return each.gpu_milli // WHOLE if each.gpu_milli > WHOLE else each.gpus


def milli_of(request: JobRequested) -> int:
    return min(WHOLE, request.resources.gpu_milli)
