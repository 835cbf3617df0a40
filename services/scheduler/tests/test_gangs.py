"""A gang over several nodes starts whole or not at all, whatever is lost, doubled or reordered.

Every interleaving of small worlds is tried: the real scheduler's states are walked breadth first,
with all messages to and from agents in flight at once. A message may come at any time, twice, or
never; a node may die and come back; the scheduler is restarted from its snapshot at every step.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    JobRequested,
    Resources,
)
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.stimuli import Heartbeat, JobSubmitted, Running, Stimulus, Tick

NODES = ("a", "b", "c")
GPU = Resources(1, 1, 1000)


class Agent(NamedTuple):
    """What one node runs, newest token of a job only, and whether it is up."""

    up: bool
    incarnation: int
    runs: frozenset[Running]


class Order(NamedTuple):
    node: str
    starts: bool
    """Or else stops."""
    running: Running


class Answer(NamedTuple):
    """That it has started."""

    node: str
    running: Running


class Step(NamedTuple):
    """All there is: the scheduler, the agents, what is on its way, what may still go wrong."""

    scheduler: bytes
    agents: tuple[Agent, ...]
    orders: frozenset[Order]
    answers: frozenset[Answer]
    crashes: int
    losses: int


def restored(step: Step) -> Scheduler:
    """Every step starts from a snapshot, so a restart at any point is part of every walk."""
    return restore(msgspec.json.decode(step.scheduler, type=State))


def told(step: Step, stimulus: Stimulus) -> Step:
    scheduler = restored(step)
    if not scheduler.is_news(stimulus):
        return step
    said = scheduler.handle(stimulus, 1.0)
    scheduler.validate()
    check(scheduler)
    scheduler.sequence = 0
    orders = orders_of(said)
    frozen = msgspec.json.encode(scheduler.snapshot())
    return step._replace(scheduler=frozen, orders=step.orders | orders)


def orders_of(said: list[Event]) -> frozenset[Order]:
    return frozenset(
        Order(one.node, isinstance(one, AttemptPlaced), running_of(one))
        for one in said
        if isinstance(one, AttemptPlaced | AttemptStopped)
    )


def running_of(one: AttemptPlaced | AttemptStopped) -> Running:
    return Running(one.project, one.job, one.attempt, one.token)


def started(answer: Answer) -> AttemptStarted:
    return AttemptStarted(node=answer.node, **msgspec.structs.asdict(answer.running))


def check(scheduler: Scheduler) -> None:
    """Whole or not at all: a live gang holds all its workers, under one token, on living nodes."""
    for job in scheduler.jobs.values():
        if job.placement is not None:
            assert sum(len(part.gpus) for part in job.live.parts) == job.ask.workers
            assert (job.state == "running") == (len(job.live.started) == len(job.live.parts))
            assert all(scheduler.nodes[node].state != "Unhealthy" for node in job.live.nodes)


def after(step: Step) -> Iterator[Step]:
    yield from delivered(step)
    for answer in step.answers:
        yield told(step._replace(answers=step.answers - {answer}), started(answer))
        if step.losses:
            yield step._replace(answers=step.answers - {answer}, losses=step.losses - 1)
            again = told(step, started(answer))
            yield again._replace(losses=step.losses - 1)
    for at, agent in enumerate(step.agents):
        if agent.up:
            yield told(step, beat(NODES[at], agent))
            if step.crashes:
                down = Agent(False, agent.incarnation, frozenset())
                yield put(step, at, down)._replace(crashes=step.crashes - 1)
        else:
            yield told(step, Tick([NODES[at]]))
            yield put(step, at, Agent(True, agent.incarnation + 1, frozenset()))


def delivered(step: Step) -> Iterator[Step]:
    """An order reaches its agent, once or twice; or never."""
    for order in step.orders:
        gone = step._replace(orders=step.orders - {order})
        at = NODES.index(order.node)
        agent = step.agents[at]
        if step.losses:
            yield gone._replace(losses=step.losses - 1)
        if not agent.up:
            continue
        yield obeyed(gone, at, order)
        if step.losses:
            yield obeyed(step, at, order)._replace(losses=step.losses - 1)


def obeyed(step: Step, at: int, order: Order) -> Step:
    agent, running = step.agents[at], order.running
    mine = {one for one in agent.runs if one.job == running.job}
    if not order.starts:
        return put(step, at, agent._replace(runs=agent.runs - {running}))
    if any(one.token > running.token for one in mine):
        return step
    now = put(step, at, agent._replace(runs=(agent.runs - mine) | {running}))
    return now._replace(answers=step.answers | {Answer(order.node, running)})


def put(step: Step, at: int, agent: Agent) -> Step:
    return step._replace(agents=(*step.agents[:at], agent, *step.agents[at + 1 :]))


def beat(node: str, agent: Agent) -> Heartbeat:
    runs = sorted(agent.runs)
    return Heartbeat(node, agent.incarnation, ["train"], Resources(9, 9, 1000, 2), runs)


def begin(gangs: int, nodes: int, crashes: int, losses: int) -> Step:
    scheduler = Scheduler()
    for node in NODES[:nodes]:
        scheduler.handle(beat(node, Agent(True, 1, frozenset())), 1.0)
    said: list[Event] = []
    for number in range(gangs):
        request = JobRequested(
            project="p",
            job=f"gang-{number}",
            kind="train",
            workers=3,
            resources=GPU,
            topology="any",
            attempts_max=2,
        )
        said += scheduler.handle(JobSubmitted(request), 1.0)
    scheduler.sequence = 0
    agents = tuple(Agent(True, 1, frozenset()) for _ in range(nodes))
    frozen = msgspec.json.encode(scheduler.snapshot())
    return Step(frozen, agents, orders_of(said), frozenset(), crashes, losses)


@pytest.mark.parametrize(
    ("gangs", "nodes", "crashes", "losses", "least"),
    [(1, 2, 1, 0, 6000), (2, 3, 0, 0, 90), (2, 3, 0, 1, 800)],
)
def test_every_interleaving_leaves_gangs_whole(
    gangs: int, nodes: int, crashes: int, losses: int, least: int
) -> None:
    first = begin(gangs, nodes, crashes, losses)
    seen, todo = {first}, deque([first])
    while todo:
        for step in after(todo.popleft()):
            if step not in seen:
                seen.add(step)
                todo.append(step)
    assert len(seen) > least
    assert any(runs_one(step) for step in seen), "it never ran"
    for step in seen:
        settles(step)


def runs_one(step: Step) -> bool:
    return any(job.state == "running" for job in restored(step).jobs.values())


def settles(step: Step) -> None:
    """Once nothing is lost any more, agents run what is in force, and nothing else."""
    scheduler = restored(step)
    in_force = {
        (part.node, job.live.token)
        for job in scheduler.jobs.values()
        if job.placement is not None
        for part in job.live.parts
    }
    for at, agent in enumerate(step.agents):
        for running in agent.runs:
            if (NODES[at], running.token) not in in_force:
                said = scheduler.handle(beat(NODES[at], agent), 2.0)
                known = scheduler.nodes[NODES[at]].stopping
                stops = [one.token for one in said if isinstance(one, AttemptStopped)]
                assert running.token in stops or running in known, (step, running)


def gang_of(scheduler: Scheduler, nodes: int = 2) -> list[AttemptPlaced]:
    for node in NODES[:nodes]:
        scheduler.handle(beat(node, Agent(True, 1, frozenset())), 1.0)
    request = JobRequested(
        project="p", job="g", kind="train", workers=3, resources=GPU, topology="any"
    )
    said = scheduler.handle(JobSubmitted(request), 1.0)
    return [one for one in said if isinstance(one, AttemptPlaced)]


def about(placed: AttemptPlaced) -> dict[str, Any]:
    fields = msgspec.structs.asdict(placed)
    return {name: fields[name] for name in ("project", "job", "attempt", "token", "node")}


def test_a_gang_runs_once_all_have_started_and_ends_once_all_are_through() -> None:
    scheduler = Scheduler()
    first, second = gang_of(scheduler)
    assert (first.rank, second.rank, second.gpus) == (0, 2, [[0]])
    assert first.token == second.token
    assert [share.node for share in first.gang] == ["a", "b"]
    job = scheduler.jobs["p", "g"]
    scheduler.handle(AttemptStarted(**about(second)), 2.0)
    assert job.state == "placed"
    scheduler.handle(AttemptStarted(**about(first)), 3.0)
    assert job.state == "running"
    scheduler.handle(AttemptSucceeded(**about(first), result={"rank": 0}), 4.0)
    assert job.state == "running"
    scheduler.handle(AttemptSucceeded(**about(second), result={"rank": 1}), 5.0)
    assert (job.state, job.result) == ("succeeded", {"rank": 0})


def test_one_share_that_fails_takes_the_whole_gang_back() -> None:
    scheduler = Scheduler()
    first, second = gang_of(scheduler)
    scheduler.handle(Tick(), 2.0)
    failed = AttemptFailed(**about(second), reason="out of memory", retryable=True)
    said = scheduler.handle(failed, 2.0)
    stops = [one for one in said if isinstance(one, AttemptStopped)]
    assert [(one.node, one.token) for one in stops] == [("a", first.token)]
    again = [one for one in said if isinstance(one, AttemptPlaced)]
    assert {one.token for one in again} == {first.token + 1}
    assert len(again) == 2
