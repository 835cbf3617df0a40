"""Starts Ray, keeps a pool of warm workers, and runs attempts on it.

Ray does not count resources here (pool actors take none): the scheduler has placed the gang.
Import this with a `session` open: Ray reads its environment then, and takes 1 s.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from libs import telemetry
from libs.contracts.artifacts import TrainResult
from services.trainer.domain import (
    LOOPBACK,
    Assignment,
    Lost,
    Outcome,
    Progress,
    Setup,
    Unusable,
    engine_of,
    is_own_code,
)
from services.trainer.ray_job import Conductor, Worker

log = logging.getLogger(__name__)
RESTARTS_MAX = 3
"""Times a gang is set up again inside one attempt after a worker died."""
VERDICT_S = 5.0
"""How long the other workers have to say why they failed, once one did."""
WATCH_S = 2.0
WATCH_TIMEOUT_S = 15.0
OBJECT_STORE_BYTES = 80 << 20
"""Only progress and results go through it; workers read data from object storage."""


class Hired:
    """A live worker of the pool."""

    def __init__(self, actor: Any, pid: int) -> None:
        self.actor = actor
        self.pid = pid


class Engine:
    """One local Ray and its pool. Use `started`."""

    def __init__(self, setup: Setup, size: int, folder: str) -> None:
        self.setup = setup
        self.size = size
        self.folder = folder
        self.idle: list[Hired] = []
        self.coming = 0
        self.refills: set[asyncio.Task[None]] = set()
        self.worker: Any = ray.remote(Worker)

    async def hire(self) -> Hired:
        """A new process: about 5 s until torch is imported and warm."""
        actor = self.worker.options(num_cpus=0).remote(self.setup)
        try:
            return Hired(actor, await actor.pid.remote())
        except ray.exceptions.RayError as error:
            raise Lost(f"a worker did not start: {error}") from error

    async def take(self, count: int) -> list[Hired]:
        taken = [self.idle.pop() for _ in range(min(count, len(self.idle)))]
        return taken + await asyncio.gather(*(self.hire() for _ in range(count - len(taken))))

    def give_back(self, members: list[Hired]) -> None:
        """The first one taken is the next one taken: it has the data loaded."""
        self.idle.extend(reversed(members))
        while len(self.idle) > self.size:
            ray.kill(self.idle.pop(0).actor)

    def dismiss(self, members: list[Hired]) -> None:
        """Kills them; the pool fills up again in the background."""
        for member in members:
            ray.kill(member.actor)
        if members:
            task = asyncio.create_task(self.refill())
            self.refills.add(task)
            task.add_done_callback(self.refills.discard)

    async def watch(self) -> None:
        """Raises `Lost` once Ray itself is gone: calls would wait for it without end."""
        while True:
            try:
                nodes = await asyncio.wait_for(asyncio.to_thread(ray.nodes), WATCH_TIMEOUT_S)
            except (TimeoutError, ray.exceptions.RayError) as error:
                raise Lost(f"Ray does not answer: {error!r}") from error
            if not any(node["Alive"] for node in nodes):
                raise Lost("Ray's node is dead")
            await asyncio.sleep(WATCH_S)

    async def settled(self) -> None:
        """No worker is being started any more."""
        for task in self.refills:
            task.cancel()
        await asyncio.gather(*self.refills, return_exceptions=True)

    async def refill(self) -> None:
        missing = max(0, self.size - len(self.idle) - self.coming)
        self.coming += missing
        try:
            self.give_back(await asyncio.gather(*(self.hire() for _ in range(missing))))
        except Lost as error:
            log.warning("pool: %s", error)
        finally:
            self.coming -= missing

    @contextlib.asynccontextmanager
    async def run(self, assignment: Assignment) -> AsyncIterator["Run"]:
        """The workers of one attempt, for as long as the block lasts."""
        run = Run(self, assignment)
        completed = False
        try:
            yield run
            completed = True
        finally:
            own_code = is_own_code(assignment.spec.train.recipe)
            run.release(reusable=completed and not own_code)


class Run:
    """One attempt on its workers."""

    def __init__(self, engine: Engine, assignment: Assignment) -> None:
        self.engine = engine
        self.assignment = assignment
        self.members: list[Hired] = []
        self.conductor: Any = None

    def release(self, reusable: bool) -> None:
        members, self.members = self.members, []
        if reusable:
            self.engine.give_back(members)
        else:
            self.engine.dismiss(members)
        if self.conductor is not None:
            ray.kill(self.conductor)
            self.conductor = None

    async def fit(self) -> AsyncGenerator[Progress]:
        """Trains to the last epoch; a gang that loses a worker resumes from its checkpoint.

        Raises `Unusable` for what the user must change, `Lost` for what kept going away.
        """
        once = self.on_pool if engine_of(self.assignment.spec) == "pool" else self.on_ray_train
        for restarts in range(RESTARTS_MAX + 1):
            try:
                async with contextlib.aclosing(once()) as news:
                    async for progress in news:
                        yield progress
                return
            except Lost as error:
                self.release(reusable=False)
                if restarts == RESTARTS_MAX:
                    raise
                log.warning("%s: set up again: %s", self.assignment.job, error)

    async def on_pool(self) -> AsyncGenerator[Progress]:
        size = self.assignment.workers
        self.members = await self.engine.take(size)
        first = self.members[0].actor
        with translated():
            port = await first.meet.remote(size) if size > 1 else 0
        place = telemetry.current()
        streams = [
            member.actor.fit.options(num_returns="streaming").remote(
                self.assignment, rank, port, place
            )
            for rank, member in enumerate(self.members)
        ]
        try:
            with translated():
                async for reference in streams[0]:
                    yield await reference
                for stream in streams[1:]:
                    await stream.completed()
        except Lost as error:
            await blame([stream.completed() for stream in streams])
            raise error

    async def on_ray_train(self) -> AsyncGenerator[Progress]:
        conductor: Any = ray.remote(Conductor)
        self.conductor = conductor.options(num_cpus=0, max_concurrency=4).remote(self.engine.setup)
        fit = self.conductor.fit.options(num_returns="streaming")
        folder = str(Path(self.engine.folder) / "train")
        with translated():
            async for reference in fit.remote(self.assignment, telemetry.current(), folder):
                yield await reference

    async def finish(self, outcome: Outcome) -> TrainResult:
        """Export and evaluation. Raises `Unusable` or `Lost`."""
        if not self.members:
            self.members = await self.engine.take(1)
        finish = self.members[0].actor.finish
        with translated():
            result: TrainResult = await finish.remote(self.assignment, outcome, telemetry.current())
        return result


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Ray's errors as ours."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Unusable) else Lost(str(cause))) from error
    except ray.exceptions.RayError as error:
        raise Lost(str(error)) from error


async def blame(results: list[Any]) -> None:
    """Raises `Unusable` where that is why one of the gang failed; the others only lost a peer."""
    await asyncio.wait([asyncio.ensure_future(verdict(one)) for one in results], timeout=VERDICT_S)


async def verdict(result: Any) -> None:
    with translated():
        await result


@contextlib.asynccontextmanager
async def started(setup: Setup, size: int, cpus: int, folder: str) -> AsyncIterator[Engine]:
    """Ray with a warm pool, until the block ends. `folder`: of an open `session`."""
    with ThreadPoolExecutor(1, "ray") as thread:
        # Ray's servers die with the thread that started them: this one stays.
        await asyncio.get_running_loop().run_in_executor(thread, start_ray, folder, cpus)
        take_back_sigterm()
        engine = Engine(setup, size, folder)
        try:
            await engine.refill()
            yield engine
        finally:
            await engine.settled()
            ray.shutdown()


def take_back_sigterm() -> None:
    """Ray puts a handler of its own before Python's: it prints a stack and aborts 3 s later."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def start_ray(folder: str, cpus: int) -> None:
    said_by_ray = logging.getLogger("ray")
    said_by_ray.handlers.clear()  # it would print plain lines beside the service's JSON
    said_by_ray.propagate = True
    ray.init(
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
        _node_ip_address=LOOPBACK,
    )
