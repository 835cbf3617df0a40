"""`leptonic.v1.Scheduler`, for both doors."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

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
    JobState,
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
    SubmitJobsRequest,
    SubmitJobsResponse,
)
from libs.contracts.protos.scheduler_pb2_grpc import SchedulerServicer
from libs.database import TRANSIENT
from libs.doors import Conflict, Invalid, NotFound, Unavailable
from services.scheduler import jobs
from services.scheduler.domain import Scheduler, on
from services.scheduler.handlers import Context
from services.scheduler.nodes import total
from services.scheduler.stimuli import JobSubmitted, Stimulus

JOBS_MAX = 10_000
"""In one request."""
PART_MAX = 64
"""Jobs of one request that are handled without others between them."""
T = TypeVar("T")
JSON_INTEGER_MAX = 1 << 53
"""`Struct` carries every number as a double; whole ones up to here are integers again."""


class Doors(SchedulerServicer):
    def __init__(self, context: Context) -> None:
        self.context = context

    async def ask(
        self,
        answer: Callable[[Scheduler], T],
        wish: Callable[[Scheduler], Iterable[Stimulus]] = lambda _: (),
    ) -> T:
        """What passes by itself is answered with UNAVAILABLE."""
        try:
            return await self.context.writer.ask(wish, answer)
        except TRANSIENT as error:
            raise Unavailable(f"try again: {error}") from error

    async def SubmitJob(self, request: SubmitJobRequest, _: Any) -> Job:
        """A job that is known is answered as it is, whatever else the request says."""
        submitted = submitted_of(request, telemetry.current())
        name = submitted.request.job
        return await self.ask(
            lambda scheduler: job_of(scheduler, find(scheduler, request.project, name)),
            lambda scheduler: unknown(scheduler, [submitted]),
        )

    async def SubmitJobs(self, request: SubmitJobsRequest, _: Any) -> SubmitJobsResponse:
        """All of them are good, or none is taken; what is known stays as it is."""
        if len(request.jobs) > JOBS_MAX:
            raise Invalid(f"at most {JOBS_MAX} in one request, got {len(request.jobs)}", "jobs")
        place, wanted = telemetry.current(), []
        for one in request.jobs:
            one.project = one.project or request.project
            wanted.append(submitted_of(one, place))
        parts = [wanted[at : at + PART_MAX] for at in range(0, len(wanted), PART_MAX)]
        states = await asyncio.gather(*(self.submit(part) for part in parts))
        return SubmitJobsResponse(jobs=[one for part in states for one in part])

    async def submit(self, part: list[JobSubmitted]) -> list[JobState]:
        return await self.ask(
            lambda scheduler: [state_of(scheduler, one) for one in part],
            lambda scheduler: unknown(scheduler, part),
        )

    async def CancelJob(self, request: CancelJobRequest, _: Any) -> Job:
        def wish(scheduler: Scheduler) -> list[Stimulus]:
            job = find(scheduler, request.project, request.job)
            if job.state in jobs.TERMINAL:
                raise Conflict(f"{request.job!r} has already {job.state}", "job")
            reason = request.reason or "cancelled by request"
            return [JobCancelled(project=request.project, job=request.job, reason=reason)]

        return await self.ask(lambda scheduler: found(scheduler, request), wish)

    async def GetJob(self, request: GetJobRequest, _: Any) -> Job:
        return await self.ask(lambda scheduler: found(scheduler, request))

    async def ListJobs(self, request: ListJobsRequest, _: Any) -> ListJobsResponse:
        """In the order of submission."""

        def answer(scheduler: Scheduler) -> ListJobsResponse:
            mine = [job for key, job in scheduler.jobs.items() if key[0] == request.project]
            return ListJobsResponse(jobs=[job_of(scheduler, job) for job in mine])

        return await self.ask(answer)

    async def ListNodes(self, request: ListNodesRequest, _: Any) -> ListNodesResponse:
        def answer(scheduler: Scheduler) -> ListNodesResponse:
            return ListNodesResponse(nodes=[self.node_of(scheduler, n) for n in scheduler.nodes])

        return await self.ask(answer)

    async def ListQueues(self, request: ListQueuesRequest, _: Any) -> ListQueuesResponse:
        """Queues with a job that has not ended."""

        def answer(scheduler: Scheduler) -> ListQueuesResponse:
            active = [job for job in scheduler.jobs.values() if job.state not in jobs.TERMINAL]
            names = sorted({job.request.queue for job in active})
            return ListQueuesResponse(queues=[queue_of(name, active) for name in names])

        return await self.ask(answer)

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


def found(scheduler: Scheduler, request: GetJobRequest | CancelJobRequest) -> Job:
    return job_of(scheduler, find(scheduler, request.project, request.job))


def submitted_of(message: SubmitJobRequest, place: str) -> JobSubmitted:
    """Raises `Invalid`."""
    wanted = request_of(message)
    field, problem = jobs.problem_of(wanted)
    if field:
        raise Invalid(problem, field)
    return JobSubmitted(wanted, place)


def unknown(scheduler: Scheduler, submitted: Iterable[JobSubmitted]) -> Iterator[JobSubmitted]:
    """Those of no job there is, looked at one after the other."""
    for one in submitted:
        if (one.request.project, one.request.job) not in scheduler.jobs:
            yield one


def state_of(scheduler: Scheduler, submitted: JobSubmitted) -> JobState:
    """Without why it waits: that looks at every node."""
    job = find(scheduler, submitted.request.project, submitted.request.job)
    return JobState(project=job.key[0], job=job.key[1], state=job.state, node=on(job))


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
        spec=integral(json_format.MessageToDict(message.spec)) if message.HasField("spec") else {},
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
