"""What the doors say and are told, as messages: jobs, nodes, queues, explanations."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from libs.contracts.autoscaling import REPLICA_QUEUE
from libs.contracts.events import JobRequested
from libs.contracts.events import Resources as Amounts
from libs.contracts.protos import scheduler_pb2 as proto
from libs.doors import Invalid
from services.scheduler import elastic, jobs, planner, quota, scores
from services.scheduler.advice import Advice
from services.scheduler.changes import Change
from services.scheduler.debts import FINE
from services.scheduler.deployments import Deployment
from services.scheduler.domain import Scheduler, on
from services.scheduler.explain import Why
from services.scheduler.shapes import GPU_MILLI, Free, Machine, Shape
from services.scheduler.stimuli import QueueSpec

JSON_INTEGER_MAX = 1 << 53
"""`Struct` carries every number as a double; whole ones up to here are integers again."""
TOPOLOGIES = ("node", "any")
DEFAULT = JobRequested(project="", job="", kind="")


def request_of(message: proto.SubmitJobRequest) -> JobRequested:
    """What was left out is as in `JobRequested`. Raises `Invalid`."""
    if message.topology and message.topology not in TOPOLOGIES:
        raise Invalid(f"one of {', '.join(TOPOLOGIES)}, got {message.topology[:80]!r}", "topology")
    given = message.resources
    amounts = Amounts(given.cpu_milli, given.memory_mib, given.gpu_milli, given.gpus or 1)
    return JobRequested(
        project=message.project,
        job=message.job,
        kind=message.kind,
        queue=message.queue or DEFAULT.queue,
        priority=message.priority,
        workers=message.workers or DEFAULT.workers,
        resources=amounts if message.HasField("resources") else DEFAULT.resources,
        attempts_max=message.attempts_max or DEFAULT.attempts_max,
        spec=integral(json_format.MessageToDict(message.spec)) if message.HasField("spec") else {},
        gpu_models=list(message.gpu_models),
        labels=dict(message.labels),
        topology="any" if message.topology == "any" else "node",
        duration_s=message.duration_s,
        preemptible=message.preemptible if message.HasField("preemptible") else True,
    )


def integral(value: Any) -> Any:
    """JSON out of a `Struct`, with 2.0 as the 2 it was sent as."""
    if isinstance(value, dict):
        return {name: integral(one) for name, one in value.items()}
    if isinstance(value, list):
        return [integral(one) for one in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= JSON_INTEGER_MAX:
        return int(value)
    return value


def job_of(scheduler: Scheduler, job: jobs.Job) -> proto.Job:
    request = job.request
    result = Struct()
    result.update(msgspec.to_builtins(job.result))
    return proto.Job(
        project=request.project,
        job=request.job,
        kind=request.kind,
        state=job.state,
        queue=request.queue,
        workers=request.workers,
        resources=resources_of(request.resources),
        attempt=job.attempt,
        node=on(job),
        reason=scheduler.why(job),
        result=result,
        submitted_at=time_of(job.submitted_at),
    )


# --- queues


def queue_of(scheduler: Scheduler, name: str, now: float) -> proto.Queue:
    spec, used = scheduler.specs.get(name), scheduler.quota.used.get(name, {})
    waiting = sum(len(line.places) for line in scheduler.lines.by_queue.get(name, {}).values())
    queue = proto.Queue(
        queue=name,
        waiting=waiting,
        running=len(scheduler.running.get(name, ())),
        allocated=proto.Resources(
            cpu_milli=used.get("cpu_milli", 0),
            memory_mib=used.get("memory_mib", 0),
            gpu_milli=used.get("gpu_milli", 0),
        ),
    )
    if name == REPLICA_QUEUE:
        queue.replicas.extend(replicas_of(scheduler, one) for one in scheduler.deployments.values())
    if spec is None:
        return queue
    queue.cohort, queue.weight, queue.order = spec.cohort, spec.weight, spec.order
    queue.placement = spec.placement
    queue.share = scheduler.quota.share(name, {})
    owed = owed_by(scheduler, spec, now)
    for resource in sorted(spec.nominal):
        queue.quotas.append(use_of(scheduler, spec, resource, owed.get(resource, 0)))
    return queue


def replicas_of(scheduler: Scheduler, deployment: Deployment) -> proto.Replicas:
    told = elastic.counts(scheduler, deployment)
    return proto.Replicas(project=deployment.project, model=deployment.model, **told)


def owed_by(scheduler: Scheduler, spec: QueueSpec, now: float) -> dict[str, int]:
    """By resource, in its unit, where it decides."""
    if spec.cohort not in scheduler.quota.leveled:
        return {}
    owed = scheduler.debts.owed_by(spec.queue, now, scheduler.lines)
    return {name: round(parts / FINE) for name, parts in owed.items()}


def use_of(scheduler: Scheduler, spec: QueueSpec, resource: str, owes: int) -> proto.QuotaUse:
    has = scheduler.quota.has(spec.queue, resource)
    return proto.QuotaUse(
        resource=resource,
        nominal=spec.nominal[resource],
        used=has,
        borrowed=max(0, has - spec.nominal[resource]),
        lent=lent(scheduler, spec, resource),
        left=max(0, scheduler.quota.room(spec.queue, resource)),
        owes=owes,
    )


def lent(scheduler: Scheduler, spec: QueueSpec, resource: str) -> int:
    """What is borrowed of a cohort is counted as lent by its queues in the order of their names."""
    held = scheduler.quota
    members = held.members(spec, resource) if spec.cohort else []
    borrowed = sum(max(0, held.has(m.queue, resource) - m.nominal[resource]) for m in members)
    for member in members:
        own = member.nominal[resource]
        unused = max(0, own - max(held.has(member.queue, resource), quota.kept(member, resource)))
        if member.queue == spec.queue:
            return min(unused, borrowed)
        borrowed -= min(unused, borrowed)
    return 0


def queue_names(scheduler: Scheduler) -> list[str]:
    """Those that were applied, those with a job that has not ended, and that of replicas."""
    running = (name for name, entries in scheduler.running.items() if entries)
    served = (REPLICA_QUEUE,) if scheduler.deployments else ()
    return sorted({*scheduler.specs, *scheduler.lines.by_queue, *running, *served})


# --- nodes


class Seen(msgspec.Struct, frozen=True):
    """What is read of the scheduler for `nodes_of`, which takes longer than the writer may wait."""

    nodes: list[proto.Node]
    states: list[tuple[Machine, Free]]
    typical: list[tuple[Shape, int]]


def node_of(scheduler: Scheduler, name: str, heard_at: str) -> proto.Node:
    node = scheduler.nodes[name]
    return proto.Node(
        node=name,
        health=node.state,
        kinds=node.kinds,
        capacity=resources_of(node.capacity),
        allocated=resources_of(node.allocated),
        jobs=[job.request.job for job in scheduler.placed_on(node)],
        last_heartbeat_at=heard_at,
        gpu_model=node.gpu_model,
        labels=node.labels,
        gpu_milli_free=scheduler.pool.free(name).gpus,
    )


def nodes_of(seen: Seen) -> proto.ListNodesResponse:
    """With what is computed: 2 us a node and typical shape, and the planner's program."""
    known, weight = scores.fragments(seen.typical), sum(count for _, count in seen.typical)
    for node, (machine, free) in zip(seen.nodes, seen.states, strict=True):
        if weight:
            node.gpu_milli_fragmented = known.fragment(machine, free) // weight
    bound = planner.plan((machine for machine, _ in seen.states), seen.typical).load_milli
    return proto.ListNodesResponse(nodes=seen.nodes, gpu_milli_bound=bound)


# --- explanations


def explanation_of(why: Why) -> proto.JobExplanation:
    return proto.JobExplanation(
        project=why.project,
        job=why.job,
        state=why.state,
        queue=why.queue,
        position=why.position,
        waiting=why.waiting,
        constraint=why.constraint,
        resource=why.resource,
        reason=why.reason,
        price=why.price,
        price_unit=why.price_unit,
        advices=advices_of(why.advices),
    )


def advices_of(advices: Sequence[Advice]) -> list[proto.Advice]:
    return [
        proto.Advice(says=one.says, changes=[change_of(change) for change in one.changes])
        for one in advices
    ]


def change_of(change: Change) -> proto.Change:
    return proto.Change(
        kind=change.kind,
        queue=change.queue,
        resource=change.resource,
        by=change.by,
        jobs=[proto.JobName(project=project, job=job) for project, job in change.jobs],
        node=change.node,
        priority=change.priority,
        machine=machine_of(change.machine) if change.machine else None,
    )


def machine_of(machine: Machine) -> proto.Machine:
    resources = proto.Resources(
        cpu_milli=machine.cpu_milli,
        memory_mib=machine.memory_mib,
        gpu_milli=GPU_MILLI,
        gpus=machine.gpus,
    )
    return proto.Machine(
        resources=resources,
        gpu_model=machine.gpu_model,
        kinds=machine.kinds,
        labels=dict(machine.labels),
    )


def resources_of(amounts: Amounts) -> proto.Resources:
    return proto.Resources(
        cpu_milli=amounts.cpu_milli,
        memory_mib=amounts.memory_mib,
        gpu_milli=amounts.gpu_milli * amounts.gpus,
    )


def time_of(unix_s: float) -> str:
    """RFC 3339, UTC."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat()
