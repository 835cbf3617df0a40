"""A gang member's process: warm, one attempt at a time. Knows nothing of Ray."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from libs import telemetry
from libs.contracts.artifacts import TrainResult
from libs.objectstore import ObjectStore
from services.trainer import gang, loop, worker
from services.trainer.domain import (
    Assignment,
    Meeting,
    Outcome,
    Progress,
    Setup,
    Storage,
    TrainSpec,
)
from services.trainer.export import exported

WARM_UP_OPSET = 20


class Member:
    """What a worker of the pool does."""

    def __init__(self, setup: Setup, address: str) -> None:
        self.address = address
        self.open = contextlib.ExitStack()
        prepare(setup, self.open)
        self.objects = open_store(setup.storage)
        self.loaded: tuple[TrainSpec, worker.Loaded] | None = None
        self.store: Any = None
        warm_up()

    def meet(self, size: int) -> Meeting:
        """Rank 0 opens the gang's meeting point and says where it is."""
        self.store = gang.store_of(size, self.address)
        return Meeting(self.address, self.store.port)

    def fit(
        self, assignment: Assignment, rank: int, meeting: Meeting | None, place: str
    ) -> Iterator[Progress]:
        """`meeting`: None for a gang of one."""
        with worker.Blamed(), self.world(rank, assignment.workers, meeting) as world:
            loaded = self.load(assignment.spec, place)
            yield from worker.fit(assignment, loaded, self.objects, world, place)

    @contextlib.contextmanager
    def world(self, rank: int, size: int, meeting: Meeting | None) -> Iterator[loop.World]:
        if meeting is None:
            yield loop.Alone()
            return
        try:
            store = self.store if rank == 0 else meeting
            with gang.joined(rank, size, store, self.address) as world:
                yield world
        finally:
            self.store = None

    def load(self, spec: TrainSpec, place: str) -> worker.Loaded:
        """Kept until another spec comes: `finish` follows `fit`."""
        if self.loaded is None or self.loaded[0] != spec:
            self.loaded = None
            self.loaded = (spec, worker.load(self.objects, spec, place))
        return self.loaded[1]

    def finish(self, assignment: Assignment, outcome: Outcome, place: str) -> TrainResult:
        with worker.Blamed() as blamed:
            blamed.place = "after training"
            loaded = self.load(assignment.spec, place)
            return worker.finish(assignment, loaded, self.objects, outcome, place)


def prepare(setup: Setup, stack: contextlib.ExitStack) -> None:
    """Telemetry, and the users' recipes, for this process."""
    stack.enter_context(telemetry.start("trainer", setup.otlp_endpoint, setup.log_level))
    if setup.recipes_path and setup.recipes_path not in sys.path:
        sys.path.insert(0, setup.recipes_path)


def warm_up() -> None:
    """Pays for first imports and first calls before a job waits for them."""
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.zeros(2, 2)).sum().backward()
    optimizer.step()
    exported(module, torch.zeros(2, 2), WARM_UP_OPSET)


def open_store(storage: Storage) -> ObjectStore:
    return ObjectStore(
        storage.endpoint, storage.access_key, storage.secret_key, storage.bucket, storage.secure
    )
