"""Puts the loop on Ray: the actors of the warm pool, and the train function of Ray Train.

A gang of warm actors trains a small job in well under a second, where Ray Train needs 15 to 28 s
to set up. Both run `worker.fit`, so both give the same weights. The service imports this module to
name what runs elsewhere: torch (4 s, 300 MB) is imported only where it runs.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any

import ray
import ray.exceptions

from libs.contracts.artifacts import TrainResult
from services.trainer.domain import (
    Assignment,
    Lost,
    Meeting,
    Outcome,
    Progress,
    Setup,
    Unusable,
)


class Worker:
    """An actor of the pool: a `member.Member` behind Ray."""

    def __init__(self, setup: Setup) -> None:
        from services.trainer.member import Member

        self.member = Member(setup, ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def pid(self) -> int:
        return os.getpid()

    def meet(self, size: int) -> Meeting:
        return self.member.meet(size)

    def fit(
        self, assignment: Assignment, rank: int, meeting: Meeting | None, place: str
    ) -> Iterator[Progress]:
        yield from self.member.fit(assignment, rank, meeting, place)

    def finish(self, assignment: Assignment, outcome: Outcome, place: str) -> TrainResult:
        return self.member.finish(assignment, outcome, place)


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

    from services.trainer import gang, loop, member, worker

    setup, assignment, place, conductor = config["arguments"]
    size = ray.train.get_context().get_world_size()
    with contextlib.ExitStack() as stack:
        member.prepare(setup, stack)
        objects = member.open_store(setup.storage)
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
