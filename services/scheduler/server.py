"""`leptonic.v1.Scheduler`, for both doors."""

import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec
from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from libs import telemetry
from libs.contracts.events import JobCancelled, JobRequested
from libs.contracts.events import Resources as Amounts
from libs.contracts.protos.scheduler_pb2 import (
    CancelJobRequest,
    GetJobRequest,
    Job,
    ListJobsRequest,
    ListJobsResponse,
    ListNodesRequest,
    ListNodesResponse,
    ListQueuesRequest,
    ListQueuesResponse,
    Node,
    Queue,
    Resources,
    SubmitJobRequest,
)
from libs.contracts.protos.scheduler_pb2_grpc import SchedulerServicer
from libs.database import TRANSIENT
from libs.doors import Conflict, Invalid, NotFound, Unavailable
from services.scheduler import jobs
from services.scheduler.domain import Scheduler, on
from services.scheduler.handlers import Context
from services.scheduler.nodes import total
from services.scheduler.stimuli import JobSubmitted

JSON_INTEGER_MAX = 1 << 53
"""`Struct` carries every number as a double; whole ones up to here are integers again."""


class Doors(SchedulerServicer):
    def __init__(self, context: Context) -> None:
        self.context = context

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Scheduler]:
        """One caller at a time; what passes by itself is answered with UNAVAILABLE."""
        try:
            async with self.context.writer.turn() as scheduler:
                yield scheduler
        except TRANSIENT as error:
            raise Unavailable(f"try again: {error}") from error

    async def SubmitJob(self, request: SubmitJobRequest, _: Any) -> Job:
        """A job that is known is answered as it is, whatever else the request says."""
        wanted = request_of(request)
        field, problem = jobs.problem_of(wanted)
        if field:
            raise Invalid(problem, field)
        async with self.turn() as scheduler:
            submitted = JobSubmitted(wanted, telemetry.current())
            if (wanted.project, wanted.job) not in scheduler.jobs:
                await self.context.writer.apply(scheduler, submitted)
            return job_of(scheduler, find(scheduler, wanted.project, wanted.job))

    async def CancelJob(self, request: CancelJobRequest, _: Any) -> Job:
        async with self.turn() as scheduler:
            job = find(scheduler, request.project, request.job)
            if job.state in jobs.TERMINAL:
                raise Conflict(f"{request.job!r} has already {job.state}", "job")
            reason = request.reason or "cancelled by request"
            cancelled = JobCancelled(project=request.project, job=request.job, reason=reason)
            await self.context.writer.apply(scheduler, cancelled)
            return job_of(scheduler, job)

    async def GetJob(self, request: GetJobRequest, _: Any) -> Job:
        async with self.turn() as scheduler:
            return job_of(scheduler, find(scheduler, request.project, request.job))

    async def ListJobs(self, request: ListJobsRequest, _: Any) -> ListJobsResponse:
        """In the order of submission."""
        async with self.turn() as scheduler:
            mine = [job for key, job in scheduler.jobs.items() if key[0] == request.project]
            return ListJobsResponse(jobs=[job_of(scheduler, job) for job in mine])

    async def ListNodes(self, request: ListNodesRequest, _: Any) -> ListNodesResponse:
        async with self.turn() as scheduler:
            return ListNodesResponse(nodes=[self.node_of(scheduler, n) for n in scheduler.nodes])

    async def ListQueues(self, request: ListQueuesRequest, _: Any) -> ListQueuesResponse:
        """Queues with a job that has not ended."""
        async with self.turn() as scheduler:
            active = [job for job in scheduler.jobs.values() if job.state not in jobs.TERMINAL]
            names = sorted({job.request.queue for job in active})
            return ListQueuesResponse(queues=[queue_of(name, active) for name in names])

    def node_of(self, scheduler: Scheduler, name: str) -> Node:
        node = scheduler.nodes[name]
        return Node(
            node=name,
            health=node.state,
            kinds=node.kinds,
            capacity=resources_of(node.capacity),
            allocated=resources_of(node.allocated),
            jobs=[job.request.job for job in scheduler.placed_on(node)],
            last_heartbeat_at=self.heard_at(name),
        )

    def heard_at(self, name: str) -> str:
        seen = self.context.liveness.seen.get(name)
        return "" if seen is None else time_of(time.time() - time.monotonic() + seen)


def find(scheduler: Scheduler, project: str, name: str) -> jobs.Job:
    job = scheduler.jobs.get((project, name))
    if job is None:
        raise NotFound(f"no job {name!r} in project {project!r}", "job")
    return job


def request_of(message: SubmitJobRequest) -> JobRequested:
    """What was left out is as in `JobRequested`: queue `default`, one worker, its resources."""
    given = message.resources
    amounts = Amounts(given.cpu_milli, given.memory_mib, given.gpu_milli)
    return JobRequested(
        project=message.project,
        job=message.job,
        kind=message.kind,
        queue=message.queue or "default",
        priority=message.priority,
        workers=message.workers or 1,
        resources=amounts if message.HasField("resources") else Amounts(),
        spec=integral(json_format.MessageToDict(message.spec)),
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


def job_of(scheduler: Scheduler, job: jobs.Job) -> Job:
    request = job.request
    result = Struct()
    result.update(msgspec.to_builtins(job.result))
    return Job(
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


def queue_of(name: str, active: list[jobs.Job]) -> Queue:
    mine = [job for job in active if job.request.queue == name]
    placed = [job for job in mine if job.placement is not None]
    return Queue(
        queue=name,
        waiting=len(mine) - len(placed),
        running=len(placed),
        allocated=resources_of(total(job.need for job in placed)),
    )


def resources_of(amounts: Amounts) -> Resources:
    return Resources(
        cpu_milli=amounts.cpu_milli,
        memory_mib=amounts.memory_mib,
        gpu_milli=amounts.gpu_milli * amounts.gpus,
    )


def time_of(unix_s: float) -> str:
    """RFC 3339, UTC."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat()
