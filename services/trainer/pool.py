"""Warm workers on every node of Ray: a small job does not wait until torch is imported."""

import asyncio
import logging
from collections.abc import Awaitable, Collection, Mapping
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from services.trainer.domain import Lost, Node, Setup, spread
from services.trainer.ray_job import Worker

log = logging.getLogger(__name__)
LOOK_S = 1.0


class Hired:
    """A live worker."""

    def __init__(self, actor: Any, pid: int, node: str) -> None:
        self.actor = actor
        self.pid = pid
        self.node = node


class Pool:
    """`size` workers are kept on every node, beside those that are taken."""

    def __init__(self, setup: Setup, size: int) -> None:
        self.setup = setup
        self.size = size
        self.nodes: list[Node] = []
        self.idle: list[Hired] = []
        self.coming: dict[asyncio.Task[Hired], str] = {}
        """Being started for the pool, and on which node."""
        self.worker: Any = ray.remote(Worker)

    async def hire(self, node: str) -> Hired:
        """A new process: about 5 s until torch is imported and warm."""
        where = NodeAffinitySchedulingStrategy(node, soft=False)
        options = self.worker.options(num_cpus=0, scheduling_strategy=where)
        try:
            actor = options.remote(self.setup)
            return Hired(actor, await self.while_there(node, actor.pid.remote()), node)
        except ray.exceptions.RayError as error:
            raise Lost(f"a worker did not start: {error}") from error

    async def while_there(self, node: str, answer: Any) -> Any:
        """The answer, or `Lost` once the node is gone: Ray may not say so."""
        waiting = asyncio.ensure_future(answer)
        try:
            while not waiting.done():
                if node not in {one.id for one in self.nodes}:
                    raise Lost(f"a worker did not start: its node {node} is gone")
                await asyncio.wait({waiting}, timeout=LOOK_S)
            return waiting.result()
        finally:
            waiting.cancel()

    async def take(self, count: int, busy: Mapping[str, int]) -> list[Hired]:
        """A gang, spread over the nodes. `busy`: workers at work, by node."""
        taken = [self.pick(node.id) for node in spread(count, self.nodes, busy)]
        return list(await asyncio.gather(*taken))

    def pick(self, node: str) -> Awaitable[Hired]:
        """An idle one, else one that is coming, else a new one. No other may have it then."""
        for member in reversed(self.idle):
            if member.node == node:
                self.idle.remove(member)
                return present(member)
        for task, where in self.coming.items():
            if where == node:
                del self.coming[task]
                return task
        return self.hire(node)

    def give_back(self, members: Collection[Hired]) -> None:
        """The first one taken is the next one taken: it has the data loaded."""
        self.idle.extend(reversed(list(members)))
        for node in {member.node for member in members}:
            here = [member for member in self.idle if member.node == node]
            for member in here[: -self.size]:
                self.idle.remove(member)
                ray.kill(member.actor)

    def dismiss(self, members: Collection[Hired]) -> None:
        """Kills them; the pool fills up again in the background."""
        for member in members:
            ray.kill(member.actor)
        if members:
            self.fill()

    def fill(self) -> None:
        for node in self.nodes:
            idle = sum(member.node == node.id for member in self.idle)
            coming = list(self.coming.values()).count(node.id)
            for _ in range(self.size - idle - coming):
                task = asyncio.create_task(self.hire(node.id))
                self.coming[task] = node.id
                task.add_done_callback(self.came)

    def came(self, task: asyncio.Task[Hired]) -> None:
        if self.coming.pop(task, None) is None or task.cancelled():
            return
        if error := task.exception():
            log.warning("pool: %s", error)
        else:
            self.give_back([task.result()])

    def moved(self, nodes: list[Node]) -> None:
        """These are the nodes now."""
        self.nodes = nodes
        alive = {node.id for node in nodes}
        self.idle = [member for member in self.idle if member.node in alive]
        self.fill()

    async def filled(self) -> None:
        await asyncio.gather(*self.coming, return_exceptions=True)

    async def settled(self) -> None:
        """No worker is being started any more."""
        for task in self.coming:
            task.cancel()
        await self.filled()


async def present(member: Hired) -> Hired:
    return member
