"""Puts the loop on Ray: the actors of the warm pool, and the train function of Ray Train.

A gang of warm actors trains a small job in well under a second, where Ray Train needs 15 to 28 s
to set up. Both run `worker.fit`, so both give the same weights.
"""

import contextlib
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import ray
import ray.exceptions
import torch

from libs import telemetry
from libs.contracts.artifacts import TrainResult
from services.trainer import gang, loop, worker
from services.trainer.domain import Assignment, Lost, Outcome, Progress, TrainSpec, Unusable
from services.trainer.export import exported

WARM_UP_OPSET = 20


class Setup(msgspec.Struct, frozen=True):
    """What every worker process needs to know."""

    storage: worker.Storage
    otlp_endpoint: str = ""
    log_level: str = "INFO"
    recipes_path: str = ""
    """Folder with users' recipe modules; empty: only what is importable anyway."""


class Worker:
    """A warm process: one gang member at a time."""

    def __init__(self, setup: Setup) -> None:
        self.open = contextlib.ExitStack()
        prepare(setup, self.open)
        self.objects = setup.storage.open()
        self.loaded: tuple[TrainSpec, worker.Loaded] | None = None
        self.store: Any = None
        warm_up()

    def pid(self) -> int:
        return os.getpid()

    def meet(self, size: int) -> int:
        """Rank 0 opens the gang's meeting point and says on which port."""
        self.store = gang.store_of(size)
        return int(self.store.port)

    def fit(self, assignment: Assignment, rank: int, port: int, place: str) -> Iterator[Progress]:
        with worker.Blamed(), self.world(rank, assignment.workers, port) as world:
            loaded = self.load(assignment.spec, place)
            yield from worker.fit(assignment, loaded, self.objects, world, place)

    @contextlib.contextmanager
    def world(self, rank: int, size: int, port: int) -> Iterator[loop.World]:
        if size == 1:
            yield loop.Alone()
            return
        try:
            with gang.joined(rank, size, self.store if rank == 0 else port) as world:
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


class Conductor:
    """Runs one Ray Train job and passes its progress on."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.news: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        self.refused = ""
        self.failure: Exception | None = None

    def report(self, progress: Progress) -> None:
        self.news.put(progress)

    def refuse(self, reason: str) -> None:
        self.refused = self.refused or reason

    def fit(self, assignment: Assignment, place: str, folder: str) -> Iterator[Progress]:
        me = ray.get_runtime_context().current_actor
        runner = threading.Thread(target=self.run, args=(assignment, place, folder, me))
        runner.start()
        while (progress := self.news.get()) is not None:
            yield progress
        runner.join()
        if self.refused:
            raise Unusable(self.refused)
        if self.failure is not None:
            raise Lost(f"Ray Train: {self.failure}") from self.failure

    def run(self, assignment: Assignment, place: str, folder: str, me: Any) -> None:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        train = assignment.spec.train
        trainer = TorchTrainer(
            train_on_ray,
            train_loop_config={"arguments": (self.setup, assignment, place, me)},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=assignment.workers,
                resources_per_worker={"CPU": train.cpu_milli / 1000},
            ),
            run_config=ray.train.RunConfig(
                name=f"{assignment.job}-{assignment.token}", storage_path=folder
            ),
        )
        try:
            trainer.fit()
        except (ray.train.TrainingFailedError, ray.exceptions.RayError) as error:
            self.failure = error
        finally:
            self.news.put(None)


def train_on_ray(config: dict[str, Any]) -> None:
    """One worker of Ray Train, which has set up the process group already."""
    import ray.train

    setup, assignment, place, conductor = config["arguments"]
    size = ray.train.get_context().get_world_size()
    with contextlib.ExitStack() as stack:
        prepare(setup, stack)
        objects = setup.storage.open()
        try:
            stack.enter_context(worker.Blamed())
            world: loop.World = gang.Gloo() if size > 1 else loop.Alone()
            loaded = worker.load(objects, assignment.spec, place)
            for progress in worker.fit(assignment, loaded, objects, world, place):
                if world.rank == 0:
                    ray.get(conductor.report.remote(progress))
        except Unusable as error:
            ray.get(conductor.refuse.remote(str(error)))
            raise
