"""Nodes, attempts and deployments in the ledger's own account (`ledger.py`)."""

from dataclasses import dataclass, field

from libs.contracts.autoscaling import (
    NODE_LABEL,
    REPLICA_ATTEMPTS_MAX,
    REPLICA_KIND,
    REPLICA_PRIORITY,
    REPLICA_QUEUE,
)
from libs.contracts.events import AttemptPlaced, JobRequested
from services.scheduler.stimuli import Deployed, Heartbeat, Scaled

WHOLE = 1000
Key = tuple[str, str]


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


@dataclass
class Attempt:
    key: Key
    token: int
    shares: dict[str, AttemptPlaced]
    models: dict[str, str]
    """GPU model of each node when it was placed."""
    placed_at: float = 0.0
    running_at: float = 0.0
    """0 until all its nodes have started it."""
    ages: bool = False
    """Its queue raised priorities by waiting when it was placed."""
    done: set[str] = field(default_factory=set)
    started: set[str] = field(default_factory=set)


@dataclass
class Service:
    """What a job got of earlier attempts."""

    asked_at: float
    waits_since: float
    gpu_s: float = 0.0
    held_s: float = 0.0
    """In placements, whether it ran or not."""


@dataclass
class Serving:
    """A deployment. Between `fewest` and `most` replicas are wanted: once room was lent only the
    scheduler knows how many of those that had no node it gave up with it.
    """

    told: Deployed
    fewest: int
    most: int
    needs: int
    """At most so many of them are needed, the others are spare."""
    lent: set[Key] = field(default_factory=set)
    """Jobs that got the room of one of its replicas and still run."""

    def deploy(self, told: Deployed) -> None:
        least, most = told.wanted.min_replicas, told.wanted.max_replicas
        self.told = told
        self.fewest = min(max(self.fewest, least), most)
        self.needs = self.most = min(max(self.most, least), most)

    def scale(self, told: Scaled) -> None:
        self.fewest = self.needs = told.replicas - told.spare
        self.most = told.replicas

    def replica(self, job: str, node: str = "") -> JobRequested:
        """For that node; "" for any."""
        return JobRequested(
            project=self.told.project,
            job=job,
            kind=REPLICA_KIND,
            queue=REPLICA_QUEUE,
            priority=REPLICA_PRIORITY,
            resources=self.told.resources,
            attempts_max=REPLICA_ATTEMPTS_MAX,
            spec={"model": self.told.model},
            labels={NODE_LABEL: node} if node else {},
            preemptible=False,
        )


def serving_of(told: Deployed) -> Serving:
    first = max(1, told.wanted.min_replicas)
    return Serving(told, first, first, first)
