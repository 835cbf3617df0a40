"""Starts Ray and runs attempts on its pool of warm workers.

Ray does not count resources here (pool actors take none): the scheduler has placed the gang.
Import this with a `session` open: Ray reads its environment then, and takes 1 s.
"""

import asyncio
import contextlib
import logging
import signal
import threading
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from libs import telemetry
from libs.contracts.artifacts import TrainResult
from libs.contracts.events import Resources
from services.trainer import cluster
from services.trainer.domain import (
    LOOPBACK,
    Assignment,
    Lost,
    Node,
    Outcome,
    Progress,
    Setup,
    Unusable,
    engine_of,
    is_own_code,
)
from services.trainer.pool import Hired, Pool
from services.trainer.ray_job import Conductor

log = logging.getLogger(__name__)
RESTARTS_MAX = 3
"""Times a gang is set up again inside one attempt after a worker died."""
VERDICT_S = 5.0
"""How long the other workers have to say why they failed, once one did."""
WATCH_S = 2.0
WATCH_TIMEOUT_S = 15.0


class Engine:
    """A Ray, of one node or several, and its pool. Use `started`."""

    def __init__(self, setup: Setup, size: int, folder: str) -> None:
        self.setup = setup
        self.folder = folder
        self.pool = Pool(setup, size)
        self.runs: set[Run] = set()

    async def watch(self) -> None:
        """Raises `Lost` once Ray itself is gone: calls would wait for it without end."""
        while True:
            await self.look()
            await asyncio.sleep(WATCH_S)

    async def look(self) -> None:
        """Learns which nodes there are. Raises `Lost` where the head's is not among them."""
        try:
            async with asyncio.timeout(WATCH_TIMEOUT_S):
                told = await asyncio.to_thread(ray.nodes)
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise Lost(f"Ray does not answer: {error!r}") from error
        nodes = sorted(nodes_of(told), key=lambda node: (not node.is_head, node.id))
        if not nodes or not nodes[0].is_head:
            raise Lost("Ray's node is dead")
        if nodes != self.pool.nodes:
            log.info("Ray's nodes: %s", len(nodes))
            self.pool.moved(nodes)
        self.end_broken({node.id for node in nodes})

    def end_broken(self, alive: set[str]) -> None:
        """A gang whose member's machine is gone ends now: its others might wait for minutes."""
        for run in self.runs:
            if any(member.node not in alive for member in run.members):
                for member in run.members:
                    ray.kill(member.actor)

    async def take(self, count: int) -> list[Hired]:
        busy = Counter(member.node for run in self.runs for member in run.members)
        return await self.pool.take(count, busy)

    def joined(self) -> Resources:
        others = [node.offers for node in self.pool.nodes if not node.is_head]
        return Resources(
            sum(one.cpu_milli for one in others), sum(one.memory_mib for one in others)
        )

    @contextlib.asynccontextmanager
    async def run(self, assignment: Assignment) -> AsyncIterator["Run"]:
        """The workers of one attempt, for as long as the block lasts."""
        run = Run(self, assignment)
        self.runs.add(run)
        whole = False
        try:
            yield run
            whole = True
        except Unusable:
            whole = assignment.workers == 1  # the others of a gang may still wait for it
            raise
        finally:
            own_code = is_own_code(assignment.spec.train.recipe)
            run.release(reusable=whole and not own_code)
            self.runs.remove(run)


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
            self.engine.pool.give_back(members)
        else:
            self.engine.pool.dismiss(members)
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
                await self.engine.look()

    async def on_pool(self) -> AsyncGenerator[Progress]:
        size = self.assignment.workers
        self.members = await self.engine.take(size)
        first = self.members[0].actor
        with translated():
            meeting = await first.meet.remote(size) if size > 1 else None
        place = telemetry.current()
        streams = [
            member.actor.fit.options(num_returns="streaming").remote(
                self.assignment, rank, meeting, place
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
        """Its conductor stays with the head, where Ray Train's folder is."""
        conductor: Any = ray.remote(Conductor)
        where = NodeAffinitySchedulingStrategy(self.engine.pool.nodes[0].id, soft=False)
        options = conductor.options(num_cpus=0, max_concurrency=4, scheduling_strategy=where)
        self.conductor = options.remote(self.engine.setup)
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
    verdicts = [asyncio.create_task(verdict(one)) for one in results]
    done, late = await asyncio.wait(verdicts, timeout=VERDICT_S)
    for task in late:
        task.cancel()
    for error in [task.exception() for task in done]:
        if isinstance(error, Unusable):
            raise error


async def verdict(result: Any) -> None:
    with translated():
        await result


def nodes_of(told: list[dict[str, Any]]) -> Iterator[Node]:
    """What `ray.nodes()` says of those that live."""
    for one in told:
        has = one["Resources"]
        if one["Alive"] and cluster.MILLI in has:
            offers = Resources(int(has[cluster.MILLI]), int(has["memory"]) >> 20)
            yield Node(one["NodeID"], "node:__internal_head__" in has, offers)


@contextlib.asynccontextmanager
async def started(
    setup: Setup, size: int, node: cluster.Node, folder: str
) -> AsyncIterator[Engine]:
    """Ray with a warm pool, until the block ends. `folder`: of an open `session`.

    With an address this is the head of a cluster, which others may join."""
    async with contextlib.AsyncExitStack() as stack:
        if node.address:
            await stack.enter_async_context(cluster.running(node, folder))
        # Ray's servers die with the thread that started them: this one stays.
        thread = stack.enter_context(ThreadPoolExecutor(1, "ray"))
        begin = join_ray if node.address else start_ray
        await asyncio.get_running_loop().run_in_executor(thread, begin, node, folder)
        take_back_sigterm()
        engine = Engine(setup, size, folder)
        try:
            await engine.look()
            await engine.pool.filled()
            yield engine
        finally:
            await engine.pool.settled()
            ray.shutdown()


def take_back_sigterm() -> None:
    """Ray puts a handler of its own before Python's: it prints a stack and aborts 3 s later."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def hear_ray() -> None:
    said_by_ray = logging.getLogger("ray")
    said_by_ray.handlers.clear()  # it would print plain lines beside the service's JSON
    said_by_ray.propagate = True


def join_ray(node: cluster.Node, folder: str) -> None:
    """The one that `cluster.running` has started here."""
    hear_ray()
    ray.init(
        address=f"{node.address}:{node.port}",
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
        _node_ip_address=node.address,
    )


def start_ray(node: cluster.Node, folder: str) -> None:
    """On loopback, for this process alone."""
    hear_ray()
    ray.init(
        num_cpus=cluster.cpus_of(node.offers),
        resources=cluster.resources_of(node.offers),
        include_dashboard=False,
        object_store_memory=cluster.OBJECT_STORE_BYTES,
        _memory=node.offers.memory_mib << 20,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
        _node_ip_address=LOOPBACK,
    )
