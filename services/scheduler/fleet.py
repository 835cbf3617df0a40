"""Nodes that come, change, fall silent and come back, and what becomes of what they ran.

A node moves only along the table at the end of this file.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from services.scheduler.book import Cause, Impossible
from services.scheduler.chooser import Chooser
from services.scheduler.jobs import Job
from services.scheduler.nodes import DEGRADED, HEALTHY, INITIALIZING, UNHEALTHY, Node
from services.scheduler.stimuli import Heartbeat, Running

if TYPE_CHECKING:
    from _collections_abc import dict_items, dict_keys, dict_values


class ByName(dict[str, Node]):
    """Nodes in the order of their names, into which they are put when somebody looks through them.

    Not by each that comes: 10,000 in any order, each with a sort and a new dictionary, took 11 s.
    """

    is_sorted = True

    def __setitem__(self, name: str, node: Node) -> None:
        if name not in self:
            self.is_sorted = self.is_sorted and (not self or next(super().__reversed__()) < name)
        super().__setitem__(name, node)

    def sort(self) -> None:
        if not self.is_sorted:
            known = sorted(super().items())
            self.clear()
            self.update(known)
            self.is_sorted = True

    def __iter__(self) -> Iterator[str]:
        self.sort()
        return super().__iter__()

    def keys(self) -> "dict_keys[str, Node]":
        self.sort()
        return super().keys()

    def values(self) -> "dict_values[str, Node]":
        self.sort()
        return super().values()

    def items(self) -> "dict_items[str, Node]":
        self.sort()
        return super().items()


class Fleet(Chooser):
    """What a heartbeat or its absence does."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = ByName()

    def changed(self, node: Node) -> None:
        self.changes += 1
        self.machines[node.node] = node.machine
        self.freed.add(node.node)

    def is_alive(self, name: str) -> bool:
        return name in self.nodes and self.nodes[name].state != UNHEALTHY

    def tells_something(self, heartbeat: Heartbeat) -> bool:
        node = self.nodes.get(heartbeat.node)
        if node is None:
            return True
        known = (node.incarnation, node.kinds, node.capacity, node.gpu_model, node.labels)
        kinds = sorted(heartbeat.kinds)
        told = (heartbeat.incarnation, kinds, heartbeat.capacity)
        if known != (*told, heartbeat.gpu_model, heartbeat.labels):
            return True
        return (node.state, node.stopping) != (heartbeat.health, self.orphans(heartbeat))

    def welcome(self, heartbeat: Heartbeat) -> Node:
        node = Node(
            node=heartbeat.node,
            incarnation=heartbeat.incarnation,
            kinds=sorted(heartbeat.kinds),
            capacity=heartbeat.capacity,
            gpu_model=heartbeat.gpu_model,
            labels=heartbeat.labels,
        )
        self.nodes[node.node] = node
        self.pool.join(node.machine)
        self.models[node.gpu_model] += 1
        self.changed(node)
        return node

    def fit(self, node: Node, heartbeat: Heartbeat) -> None:
        """Becomes what the heartbeat says. What no longer fits there is given up."""
        before = self.machines[node.node]
        node.kinds = sorted(heartbeat.kinds)
        node.capacity, node.labels = heartbeat.capacity, heartbeat.labels
        self.models[node.gpu_model] -= 1
        node.gpu_model = heartbeat.gpu_model
        self.models[node.gpu_model] += 1
        if node.machine == before:
            return
        self.shed(node)
        self.pool.change(node.machine)
        self.changed(node)

    def turn(self, node: Node, to: str, reason: str) -> None:
        if node.state == to:
            return
        change = NODE_MOVES.get((node.state, to))
        if change is None:
            raise Impossible(f"node {node.node}: {node.state} -> {to}")
        change(self, node, reason)
        node.state = to
        self.pool.open(node.node, to == HEALTHY)
        self.changed(node)

    def stay(self, node: Node, reason: str) -> None:
        """What runs there goes on; only a Healthy node takes more."""

    def lose(self, node: Node, reason: str) -> None:
        for job in self.placed_on(node):
            self.try_again(job, Cause(reason=reason))

    def take_back_missing(self, node: Node, heartbeat: Heartbeat) -> None:
        """What an earlier incarnation ran and the new one does not."""
        tokens = {running.token for running in heartbeat.running}
        for job in self.placed_on(node):
            if job.live.token not in tokens and node.node not in job.live.done:
                reason = f"node {node.node} restarted without attempt {job.attempt}"
                self.try_again(job, Cause(reason=reason))

    def shed(self, node: Node) -> None:
        """A node that shrank gives up what is on GPUs it lost, then its newest attempts."""
        machine = node.machine
        reason = f"node {node.node} shrank below what attempt %d holds"
        for job in reversed(self.placed_on(node)):
            part = job.live.part_on(node.node)
            if part and any(i >= machine.gpus for gpus in part.gpus for i in gpus):
                self.try_again(job, Cause(reason=reason % job.attempt))
        for job in reversed(self.placed_on(node)):
            taken = node.allocated
            if taken.cpu_milli <= machine.cpu_milli and taken.memory_mib <= machine.memory_mib:
                break
            self.try_again(job, Cause(reason=reason % job.attempt))

    def placed_on(self, node: Node) -> list[Job]:
        """Oldest first."""
        return [self.jobs[key] for key in self.on_node.get(node.node, ())]

    def orphans(self, heartbeat: Heartbeat) -> list[Running]:
        """What it runs under a token that no job holds there (any more)."""
        return sorted({one for one in heartbeat.running if not self.holds(heartbeat.node, one)})

    def holds(self, node: str, running: Running) -> bool:
        job = self.jobs.get((running.project, running.job))
        if job is None or job.placement is None:
            return False
        same = (job.live.attempt, job.live.token) == (running.attempt, running.token)
        return same and job.live.part_on(node) is not None

    def stop_orphans(self, node: Node, orphans: list[Running]) -> None:
        """Says so once for each, until the node lists it no more."""
        for one in orphans:
            if one not in node.stopping:
                reason = f"token {one.token} is not the one in force"
                self.say_stop(one.project, one.job, one.attempt, one.token, node.node, reason)
        node.stopping = orphans


NodeMove = Callable[[Fleet, Node, str], None]
NODE_MOVES: dict[tuple[str, str], NodeMove] = {
    (INITIALIZING, HEALTHY): Fleet.stay,
    (INITIALIZING, DEGRADED): Fleet.stay,
    (INITIALIZING, UNHEALTHY): Fleet.lose,
    (HEALTHY, INITIALIZING): Fleet.stay,
    (HEALTHY, DEGRADED): Fleet.stay,
    (HEALTHY, UNHEALTHY): Fleet.lose,
    (DEGRADED, INITIALIZING): Fleet.stay,
    (DEGRADED, HEALTHY): Fleet.stay,
    (DEGRADED, UNHEALTHY): Fleet.lose,
    (UNHEALTHY, INITIALIZING): Fleet.stay,
    (UNHEALTHY, HEALTHY): Fleet.stay,
    (UNHEALTHY, DEGRADED): Fleet.stay,
}
