"""`leptonic.v1.Scheduler`, for both doors."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from libs import telemetry
from libs.contracts.events import JobCancelled
from libs.contracts.protos.scheduler_pb2 import (
    ApplyQueueRequest,
    CancelJobRequest,
    DeleteQueueRequest,
    DeleteQueueResponse,
    ExplainJobRequest,
    GetJobRequest,
    Job,
    JobExplanation,
    JobState,
    ListJobsRequest,
    ListJobsResponse,
    ListNodesRequest,
    ListNodesResponse,
    ListQueuesRequest,
    ListQueuesResponse,
    Queue,
    SubmitJobRequest,
    SubmitJobsRequest,
    SubmitJobsResponse,
)
from libs.contracts.protos.scheduler_pb2_grpc import SchedulerServicer
from libs.database import TRANSIENT
from libs.doors import Conflict, Invalid, NotFound, Unavailable
from services.scheduler import explain, jobs, queuefile, views
from services.scheduler.domain import Scheduler, on
from services.scheduler.explain import Asked, Why
from services.scheduler.handlers import Context
from services.scheduler.stimuli import JobSubmitted, QueueApplied, QueueDeleted, Stimulus
from services.scheduler.views import Seen, job_of, request_of, time_of

JOBS_MAX = 10_000
"""In one request."""
PART_MAX = 64
"""Jobs of one request that are handled without others between them."""
T = TypeVar("T")


class Doors(SchedulerServicer):
    def __init__(self, context: Context) -> None:
        self.context = context

    async def ask(
        self,
        answer: Callable[[Scheduler], T],
        wish: Callable[[Scheduler], Iterable[Stimulus]] = lambda _: (),
        size: int = 1,
    ) -> T:
        """What passes by itself is answered with UNAVAILABLE."""
        try:
            return await self.context.writer.ask(wish, answer, size=size)
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
            len(part),
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

    async def ExplainJob(self, request: ExplainJobRequest, _: Any) -> JobExplanation:
        """The writer waits for a copy only: what is tried, is tried in a thread."""
        key, now = (request.project, request.job), time.time()

        def answer(scheduler: Scheduler) -> Why | Asked:
            job = find(scheduler, *key)
            waits = job.state == jobs.WAITING
            return explain.asked(scheduler, key) if waits else explain.unbound(job)

        told = await self.ask(answer)
        if isinstance(told, Asked):
            told = await asyncio.to_thread(explain.why, told, now)
        return views.explanation_of(told)

    async def ListNodes(self, request: ListNodesRequest, _: Any) -> ListNodesResponse:
        def answer(scheduler: Scheduler) -> Seen:
            names = list(scheduler.nodes)
            return Seen(
                nodes=[views.node_of(scheduler, name, self.heard_at(name)) for name in names],
                states=[(scheduler.machines[name], scheduler.pool.free(name)) for name in names],
                typical=scheduler.typical.shapes(),
            )

        return await asyncio.to_thread(views.nodes_of, await self.ask(answer))

    async def ListQueues(self, request: ListQueuesRequest, _: Any) -> ListQueuesResponse:
        """Those that were applied, and those with a job that has not ended."""

        def answer(scheduler: Scheduler) -> ListQueuesResponse:
            names, now = views.queue_names(scheduler), time.time()
            queues = [views.queue_of(scheduler, name, now) for name in names]
            return ListQueuesResponse(queues=queues)

        return await self.ask(answer)

    async def ApplyQueue(self, request: ApplyQueueRequest, _: Any) -> Queue:
        spec = queuefile.parse(request.yaml)

        def wish(scheduler: Scheduler) -> list[Stimulus]:
            applied = QueueApplied(spec)
            return [applied] if scheduler.is_news(applied) else []

        return await self.ask(lambda one: views.queue_of(one, spec.queue, time.time()), wish)

    async def DeleteQueue(self, request: DeleteQueueRequest, _: Any) -> DeleteQueueResponse:
        def wish(scheduler: Scheduler) -> list[Stimulus]:
            if request.queue not in scheduler.specs:
                raise NotFound(f"no queue {request.queue!r} was applied", "queue")
            return [QueueDeleted(request.queue)]

        return await self.ask(lambda _: DeleteQueueResponse(), wish)

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
