"""Deployments and their replicas: as many jobs as was decided, each on a node of its own.

Replicas that nobody needs are lent: a job that lacks only their room gets it, and gives it back
when the deployment wants its replicas again.
"""

from collections.abc import Sequence

from libs.contracts.autoscaling import (
    NODE_LABEL,
    REPLICA_ATTEMPTS_MAX,
    REPLICA_KIND,
    REPLICA_PRIORITY,
    REPLICA_QUEUE,
    first_replica,
)
from libs.contracts.events import AttemptFailed, JobCancelled, JobRequested
from services.scheduler import preempt
from services.scheduler.book import Book, Cause, Claim
from services.scheduler.deployments import Deployment
from services.scheduler.jobs import CANCELLED, LIVE, RUNNING, TERMINAL, WAITING, Job, Key, ask_of
from services.scheduler.lines import Line
from services.scheduler.shapes import Spot
from services.scheduler.stimuli import Deployed, Heartbeat, Scaled, Stimulus, Tick


def deploy(book: Book, told: Deployed) -> None:
    """The first replica serves before anybody asks, also of a deployment that goes to zero."""
    deployment = book.deployments.get((told.project, told.model))
    if deployment is None:
        deployment = Deployment(
            project=told.project,
            model=told.model,
            generation=told.generation,
            wanted=told.wanted,
            resources=told.resources,
            traceparent=told.traceparent,
            replicas=max(1, told.wanted.min_replicas),
        )
        book.deployments[deployment.key] = deployment
    deployment.generation, deployment.traceparent = told.generation, told.traceparent
    deployment.wanted, deployment.resources = told.wanted, told.resources
    least, most = told.wanted.min_replicas, told.wanted.max_replicas
    deployment.replicas = min(max(deployment.replicas, least), most)
    deployment.spare = 0


def scale(book: Book, told: Scaled) -> None:
    deployment = book.deployments[told.project, told.model]
    if told.spare > deployment.spare:
        book.lines.open |= book.lines.of  # who waits may have room now
    deployment.replicas, deployment.spare = told.replicas, told.spare


def concerns(book: Book, stimulus: Stimulus) -> bool:
    """Whether it may change where replicas are or should be."""
    match stimulus:
        case Deployed() | Scaled() | Heartbeat() | Tick():
            return bool(book.deployments)
        case JobCancelled() | AttemptFailed():
            job = book.jobs.get((stimulus.project, stimulus.job))
            return job is not None and job.request.kind == REPLICA_KIND
    return False


def settle(book: Book) -> None:
    """As many replicas as was decided, where they can be."""
    for deployment in book.deployments.values():
        replicas = present(book, deployment)
        deployment.lent = [key for key in deployment.lent if is_live(book, key)]
        replicas.sort(key=dispensable)
        for job in replicas[deployment.replicas :]:
            end(book, job, f"{deployment.replicas} replicas are enough")
        for job in replicas[: deployment.replicas]:
            move(book, deployment, job, replicas)
        while len(present(book, deployment)) < deployment.replicas:
            if not add(book, deployment):
                break
        deployment.jobs = [job.request.job for job in present(book, deployment)]


def present(book: Book, deployment: Deployment) -> list[Job]:
    found = (book.jobs.get((deployment.project, name)) for name in deployment.jobs)
    return [job for job in found if job is not None and job.state not in TERMINAL]


def counts(book: Book, deployment: Deployment) -> dict[str, int]:
    """What is told of a deployment's replicas."""
    replicas = present(book, deployment)
    return {
        "wanted": deployment.replicas,
        "running": sum(job.state == RUNNING for job in replicas),
        "waiting": sum(job.state == WAITING for job in replicas),
        "spare": deployment.spare,
        "lent": sum(is_live(book, key) for key in deployment.lent),
    }


def is_live(book: Book, key: Key) -> bool:
    return key in book.jobs and book.jobs[key].state in LIVE


def dispensable(job: Job) -> tuple[bool, int]:
    """Last whom nobody misses: the newest, and before them who waits."""
    return job.state == WAITING, job.number


def move(book: Book, deployment: Deployment, job: Job, replicas: Sequence[Job]) -> None:
    """Ended, for it waits in vain and there is another place, or for any place where others are."""
    others = [one for one in replicas if one is not job and one.state not in TERMINAL]
    if job.placement is not None:
        return
    if not where(job) and (others or will_have_others(book, deployment)):
        end(book, job, "it goes where no other replica is")
        return
    if book.pool.find(job.ask.shape) is not None:
        return
    better = node_for(book, deployment, others)
    if better is None or not (
        has_room(book, deployment, better) or may_get_back(book, deployment, better)
    ):
        return
    if job.ask.shape == ask_of(request_of(deployment, "", better)).shape:
        name = job.request.queue, job.ask
        book.lines.open[name] = book.lines.of[name]  # what was lent there may be had now
    else:
        end(book, job, f"node {better} has room for it")


def will_have_others(book: Book, deployment: Deployment) -> bool:
    """In this very step."""
    return deployment.replicas > 1 and node_for(book, deployment, []) is not None


def where(job: Job) -> str:
    """Its node, or the one it waits for; "" for any."""
    return job.live.parts[0].node if job.placement else job.request.labels.get(NODE_LABEL, "")


def end(book: Book, job: Job, reason: str) -> None:
    book.move(job, CANCELLED, Cause(reason=reason))


def add(book: Book, deployment: Deployment) -> bool:
    """One more, on a node without any; False if there is none."""
    others = present(book, deployment)
    node = node_for(book, deployment, others)
    if node is None and others:
        return False
    job = book.jobs.get((deployment.project, first_replica(deployment.model)))
    known = job is not None and job.request.kind == REPLICA_KIND and job not in others
    if job is None or not known or job.state in TERMINAL:
        request = request_of(deployment, name_for(book, deployment), node)
        job = book.add(request, deployment.traceparent)
    deployment.jobs = [*deployment.jobs, job.request.job]
    return True


def name_for(book: Book, deployment: Deployment) -> str:
    """One that no job has, whoever asked for it, and no replica had."""
    first = first_replica(deployment.model)
    if (deployment.project, first) not in book.jobs and deployment.number == 1:
        return first
    deployment.number += 1
    while (deployment.project, f"{first}.{deployment.number}") in book.jobs:
        deployment.number += 1
    return f"{first}.{deployment.number}"


def request_of(deployment: Deployment, name: str, node: str | None) -> JobRequested:
    return JobRequested(
        project=deployment.project,
        job=name,
        kind=REPLICA_KIND,
        queue=REPLICA_QUEUE,
        priority=REPLICA_PRIORITY,
        resources=deployment.resources,
        attempts_max=REPLICA_ATTEMPTS_MAX,
        spec={"model": deployment.model},
        labels={NODE_LABEL: node} if node else {},
        preemptible=False,
    )


def node_for(book: Book, deployment: Deployment, others: Sequence[Job]) -> str | None:
    """Where none of the others is: with room for it, else with room that it lent."""
    taken = {where(job) for job in others}
    able = [
        name
        for name, node in book.nodes.items()
        if name not in taken
        and book.is_open(name)
        and REPLICA_KIND in node.kinds
        and node.labels.get(NODE_LABEL) == name
    ]

    def worth(name: str) -> tuple[bool, bool, int]:
        free = book.pool.free(name)
        if has_room(book, deployment, name):
            return False, True, -free.cpu_milli
        return True, not may_get_back(book, deployment, name), -free.cpu_milli

    return min(able, key=worth, default=None)


def has_room(book: Book, deployment: Deployment, node: str) -> bool:
    return book.pool.find(ask_of(request_of(deployment, "", node)).shape) is not None


# --- lending


def may_get_back(book: Book, deployment: Deployment, node: str) -> bool:
    """Whether a replica has room there once those whom the deployment lent room have given way."""
    lent = [job for job in lent_by(book, deployment) if node in job.live.nodes]
    releases = [one for job in lent for one in job.releases()]
    shape = ask_of(request_of(deployment, "", node)).shape
    return bool(lent) and book.pool.try_without(releases, shape, 1, True) is not None


def claimants(line: Line) -> list[Job]:
    """Who may ask for lent room: the first; of replicas each, for every deployment lent other."""
    if line.queue != REPLICA_QUEUE:
        return [line.head]
    return sorted(line.jobs(), key=lambda job: job.number)


def lent_by(book: Book, deployment: Deployment) -> list[Job]:
    """To whom, of those who may give way now, while fewer replicas are placed than are needed."""
    placed = sum(job.state in LIVE for job in present(book, deployment))
    if placed >= deployment.replicas - deployment.spare:
        return []
    lent = [book.jobs[key] for key in deployment.lent if is_live(book, key)]
    return [job for job in lent if job.request.preemptible and is_older(book, job)]


def make_room(book: Book, claim: Claim) -> list[Spot] | None:
    """Where it goes once the fewest replicas that are spare have ended; None if they do not do.

    A replica gets the room back that its deployment lent.
    """
    lenders = candidates(book, claim.job)
    if not lenders or preempt.spots_without(book, claim, lenders) is None:
        return None
    victims = preempt.fewest(book, claim, lenders)
    spots = preempt.spots_without(book, claim, victims)
    for victim in victims:
        give_way(book, victim, claim.job)
    return spots


def candidates(book: Book, job: Job) -> list[Job]:
    owner = deployment_of(book, job)
    if owner is not None:
        return lent_by(book, owner)
    found = []
    for deployment in book.deployments.values():
        if deployment.spare:
            replicas = present(book, deployment)
            most = max(0, len(replicas) - deployment.replicas + deployment.spare)
            newest = sorted(replicas, key=dispensable, reverse=True)[:most]
            found += [one for one in newest if one.state in LIVE and is_older(book, one)]
    return found


def is_older(book: Book, job: Job) -> bool:
    """Nobody gives way in the very step that placed it."""
    return job.live.token <= book.token_before


def deployment_of(book: Book, job: Job) -> Deployment | None:
    if job.request.kind != REPLICA_KIND:
        return None
    return book.deployments.get((job.request.project, str(job.request.spec.get("model"))))


def give_way(book: Book, victim: Job, to: Job) -> None:
    owner = deployment_of(book, victim)
    reason = f"gives its room to {'/'.join(to.key)}"
    if owner is None:
        lender = deployment_of(book, to)
        assert lender is not None, to.key
        lender.lent = [key for key in lender.lent if key != victim.key]
        book.evicted.add(victim.key)
        book.move(victim, WAITING, Cause(reason=reason, preempted=True))
        return
    needed = owner.replicas - owner.spare
    owner.replicas = len(present(book, owner)) - 1  # those that never had a node are given up too
    owner.spare = owner.replicas - needed
    owner.lent = [*(key for key in owner.lent if key != to.key), to.key]
    end(book, victim, reason)
    owner.jobs = [job.request.job for job in present(book, owner)]
