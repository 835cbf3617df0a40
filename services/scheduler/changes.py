"""What could be changed so that a job is placed: as stimuli, and in words."""

from collections.abc import Iterator

import msgspec

from libs.contracts.events import JobCancelled, Resources
from services.scheduler.book import Book
from services.scheduler.jobs import Job, Key
from services.scheduler.shapes import GPU_MILLI, Machine
from services.scheduler.stimuli import (
    Heartbeat,
    JobSubmitted,
    QueueApplied,
    QueueSpec,
    Stimulus,
)

QUOTA, HEAL, PRIORITY, END, NODE = "quota", "heal", "priority", "end", "node"


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to do. Which fields are set follows from `kind`."""

    kind: str
    queue: str = ""
    resource: str = ""
    by: int = 0
    """quota: so much more of the resource is the queue's own."""
    jobs: tuple[Key, ...] = ()
    """end: these, in this order, whether they run or wait."""
    node: str = ""
    """heal: is Healthy again."""
    machine: Machine | None = None
    """node: one more, at least as large."""
    priority: int = 0
    """priority: asked for again with this one."""


def again(job: Job) -> str:
    """How a job is called that is asked for again."""
    return f"{job.request.job[:190]}.again"


def stimuli_of(book: Book, job: Job, change: Change) -> Iterator[Stimulus]:
    """How a change is told to the book. Jobs end by being cancelled."""
    match change.kind:
        case "quota":
            yield QueueApplied(raised(book.specs[change.queue], change.resource, change.by))
        case "end":
            for project, name in change.jobs:
                yield JobCancelled(project=project, job=name, reason="advised")
        case "heal":
            node = book.nodes[change.node]
            yield Heartbeat(
                node.node,
                node.incarnation,
                node.kinds,
                node.capacity,
                gpu_model=node.gpu_model,
                labels=node.labels,
            )
        case "priority":
            wanted = msgspec.structs.replace(job.request, job=again(job), priority=change.priority)
            yield JobCancelled(project=job.key[0], job=job.key[1], reason="advised")
            yield JobSubmitted(wanted, job.traceparent)
        case "node":
            assert change.machine is not None
            yield joins(change.machine)


def joins(machine: Machine) -> Heartbeat:
    return Heartbeat(
        machine.node,
        "1",
        list(machine.kinds),
        Resources(machine.cpu_milli, machine.memory_mib, GPU_MILLI, machine.gpus),
        gpu_model=machine.gpu_model,
        labels=dict(machine.labels),
    )


def raised(spec: QueueSpec, resource: str, by: int) -> QueueSpec:
    nominal = spec.nominal | {resource: spec.nominal[resource] + by}
    return msgspec.structs.replace(spec, nominal=nominal)


def spoken(book: Book, change: Change, evicted: set[Key]) -> str:
    """One change in words, with its numbers."""
    match change.kind:
        case "quota":
            has = book.specs[change.queue].nominal[change.resource]
            what = f"raise the nominal {change.resource} of queue {change.queue!r}"
            return f"{what} by {change.by}, from {has} to {has + change.by}"
        case "end":
            names = [named(book, key) for key in change.jobs]
            return f"end {', '.join(names)}"
        case "heal":
            node = book.nodes[change.node]
            return f"make node {change.node} Healthy again; it is {node.state}"
        case "priority":
            gone = [named(book, key) for key in sorted(evicted)]
            evicts = f", which evicts {', '.join(gone)}" if gone else ""
            return f"ask for it again with priority {change.priority}{evicts}"
    machine = change.machine
    assert machine is not None
    gpus = f", {machine.gpus} GPUs {machine.gpu_model}".rstrip() if machine.gpus else ""
    size = f"{machine.cpu_milli} cpu_milli, {machine.memory_mib} memory_mib{gpus}"
    labels = "".join(f", label {name}={value}" for name, value in machine.labels)
    return f"add a node for kind {', '.join(machine.kinds)!r} with at least {size}{labels}"


def named(book: Book, key: Key) -> str:
    """A job, what it holds and where."""
    job = book.jobs.get(key)
    if job is None or job.placement is None:
        return f"{'/'.join(key)} (waits)"
    need = job.need
    held = f"{job.gpu_milli} gpu_milli" if job.gpu_milli else f"{need.cpu_milli} cpu_milli"
    return f"{'/'.join(key)} ({held} on {', '.join(sorted(job.live.nodes))})"
