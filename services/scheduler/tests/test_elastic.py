"""Replicas are where they should be: one a node, moved when it is lost, lent while nobody needs
them, and given back."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.contracts.autoscaling import NODE_LABEL, Autoscaling
from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    JobCancelled,
    JobRequested,
    Resources,
)
from services.scheduler.domain import Scheduler, restore
from services.scheduler.jobs import CANCELLED, LIVE, PLACED, TERMINAL, WAITING, Job
from services.scheduler.stimuli import (
    Deployed,
    Heartbeat,
    JobSubmitted,
    Load,
    Running,
    Scaled,
    Stimulus,
    Tick,
)

KEY = ("default", "digits")
REPLICA = Resources(cpu_milli=200, memory_mib=256)
WANTED = Autoscaling(min_replicas=0, max_replicas=9)


class World:
    def __init__(self, *nodes: str, cpu_milli: int = 1000) -> None:
        self.scheduler = Scheduler()
        self.log: list[tuple[Stimulus, float, list[Event]]] = []
        self.cpu_milli = cpu_milli
        for node in nodes:
            self.beat(node)

    def do(self, stimulus: Stimulus) -> list[Event]:
        if not self.scheduler.is_news(stimulus):
            return []
        now = 1000.0 + len(self.log)
        decided = self.scheduler.handle(stimulus, now)
        self.scheduler.validate()
        self.log.append((stimulus, now, decided))
        return decided

    def beat(self, node: str, running: Sequence[Running] = ()) -> list[Event]:
        return self.do(
            Heartbeat(
                node=node,
                incarnation="1",
                kinds=["serve", "train"],
                capacity=Resources(self.cpu_milli, 4096),
                running=list(running),
                labels={NODE_LABEL: node},
            )
        )

    def deploy(self, wanted: Autoscaling = WANTED, generation: int = 1) -> list[Event]:
        return self.do(
            Deployed(
                project=KEY[0],
                model=KEY[1],
                generation=generation,
                wanted=wanted,
                resources=REPLICA,
                traceparent="trace",
            )
        )

    def scale(self, replicas: int, spare: int = 0) -> list[Event]:
        return self.do(Scaled(*KEY, replicas, spare))

    def submit(self, job: str, cpu_milli: int, preemptible: bool = True) -> Job:
        request = JobRequested(
            project="default",
            job=job,
            kind="train",
            resources=Resources(cpu_milli, 256),
            preemptible=preemptible,
        )
        self.do(JobSubmitted(request))
        return self.scheduler.jobs["default", job]

    @property
    def replicas(self) -> dict[str, str]:
        """Job -> its node, "" while it waits."""
        jobs = [job for job in self.scheduler.jobs.values() if job.request.kind == "serve"]
        alive = [job for job in jobs if job.state not in TERMINAL]
        return {job.request.job: job.live.parts[0].node if job.placement else "" for job in alive}


def test_the_first_replica_is_there_before_anybody_asks() -> None:
    world = World("a")
    (placed,) = world.deploy()
    assert isinstance(placed, AttemptPlaced)
    assert (placed.job, placed.node, placed.kind) == ("serve-digits", "a", "serve")
    assert placed.spec == {"model": "digits"}
    assert world.scheduler.jobs["default", "serve-digits"].traceparent == "trace"


def test_who_asks_for_the_first_replica_means_the_same_one() -> None:
    """The registry does, in an event of its own, and events overtake each other."""
    request = JobSubmitted(
        JobRequested(project="default", job="serve-digits", kind="serve", spec={"model": "digits"})
    )
    world = World("a", "b")
    world.deploy()
    assert world.do(request) == []
    other = World("a", "b")
    other.do(request)
    assert other.deploy() == []
    assert list(other.replicas) == list(world.replicas) == ["serve-digits"]


def test_replicas_are_on_nodes_of_their_own() -> None:
    world = World("a", "b")
    world.deploy()
    world.scale(3)
    assert sorted(world.replicas.values()) == ["a", "b"], "a third would serve nobody"
    world.beat("c")
    assert sorted(world.replicas.values()) == ["a", "b", "c"]


def test_a_replica_goes_where_there_is_room() -> None:
    world = World("a", "b", "c")
    world.deploy()
    world.submit("on-b", 900)
    taken = {*world.replicas.values(), *world.scheduler.jobs["default", "on-b"].live.nodes}
    world.scale(2)
    assert set(world.replicas.values()) - taken == {"a", "b", "c"} - taken


def test_a_lost_node_s_replica_is_elsewhere_in_the_same_step() -> None:
    world = World("a", "b", "c")
    world.deploy()
    world.scale(2)
    lost, kept = world.replicas.values()
    decided = world.do(Tick([lost]))
    assert [one.node for one in decided if isinstance(one, AttemptPlaced)] == list(
        {"a", "b", "c"} - {lost, kept}
    )
    assert len(set(world.replicas.values())) == 2


@pytest.mark.parametrize("how", ["lost", "failed"])
def test_the_first_replica_does_not_end_up_beside_another(how: str) -> None:
    """Who asked for it named no node."""
    world = World("b")
    world.do(
        JobSubmitted(
            JobRequested(
                project="default",
                job="serve-digits",
                kind="serve",
                resources=REPLICA,
                spec={"model": "digits"},
            )
        )
    )
    world.deploy()
    world.beat("a")
    world.scale(2)
    first = world.scheduler.jobs["default", "serve-digits"].live
    (node,) = first.nodes
    if how == "lost":
        world.do(Tick([node]))
        assert len(world.replicas) == 1
        world.beat("c")
    else:
        world.do(
            AttemptFailed(
                project="default",
                job="serve-digits",
                attempt=1,
                token=first.token,
                node=node,
                reason="it fell",
                retryable=True,
            )
        )
    assert len(set(world.replicas.values()) - {""}) == 2


def test_fewer_are_the_newest_less() -> None:
    world = World("a", "b", "c")
    world.deploy()
    world.scale(3)
    oldest = next(iter(world.replicas))
    stopped = world.scale(1)
    assert len([one for one in stopped if isinstance(one, AttemptStopped)]) == 2
    assert list(world.replicas) == [oldest]


def test_from_zero_it_is_another_job() -> None:
    """A job that has ended is not asked for twice."""
    world = World("a")
    world.deploy()
    world.scale(0)
    assert world.replicas == {}
    (placed,) = world.scale(1)
    assert isinstance(placed, AttemptPlaced)
    assert (placed.job, placed.node) == ("serve-digits.2", "a")


def test_no_replica_takes_the_name_of_somebody_s_job() -> None:
    world = World("a", "b")
    taken = [world.submit(name, 100) for name in ("serve-digits", "serve-digits.2")]
    world.deploy()
    world.scale(2)
    assert list(world.replicas) == ["serve-digits.3", "serve-digits.4"]
    assert [job.request.kind for job in taken] == ["train", "train"]
    assert all(world.scheduler.jobs[job.key] is job for job in taken)


def test_a_replica_that_waits_for_one_node_goes_where_a_job_ends() -> None:
    """In that step: nobody needs to say more about the nodes."""
    world = World("a", "b")
    jobs = [world.submit("first", 900), world.submit("second", 900)]
    world.deploy()
    waits_for = world.scheduler.jobs["default", "serve-digits"].request.labels[NODE_LABEL]
    (job,) = [job for job in jobs if waits_for not in job.live.nodes]
    (node,) = job.live.nodes
    about: dict[str, Any] = {"attempt": job.attempt, "token": job.live.token, "node": node}
    world.do(AttemptSucceeded(project="default", job=job.request.job, **about))
    assert world.replicas == {"serve-digits.2": node}


def test_only_decisions_are_logged() -> None:
    """Each node says its load twice a second, and each look decides something."""
    world = World("a")
    world.deploy()
    lines = len(world.log)
    for milli in range(50):
        world.do(
            Heartbeat(
                node="a",
                incarnation="1",
                kinds=["serve", "train"],
                capacity=Resources(1000, 4096),
                running=[Running("default", "serve-digits", 1, 1)],
                labels={NODE_LABEL: "a"},
                loads=[Load(*KEY, milli)],
            )
        )
        world.scale(1)
    assert len(world.log) == lines
    world.scale(1, spare=1)
    assert len(world.log) == lines + 1


def test_other_bounds_hold_at_once_and_an_older_generation_says_nothing() -> None:
    world = World("a", "b", "c")
    world.deploy()
    world.scale(0)
    world.deploy(Autoscaling(2, 3), generation=2)
    assert len(world.replicas) == 2
    world.deploy(Autoscaling(1, 1), generation=1)
    assert len(world.replicas) == 2
    world.deploy(Autoscaling(1, 1), generation=3)
    assert len(world.replicas) == 1


def test_a_replica_that_somebody_cancels_is_replaced() -> None:
    world = World("a")
    world.deploy()
    world.do(JobCancelled(project="default", job="serve-digits"))
    assert world.replicas == {"serve-digits.2": "a"}


def test_training_gets_the_room_of_an_idle_replica_and_gives_it_back() -> None:
    world = World("a")
    world.deploy()
    job = world.submit("training", 900)
    assert job.state == WAITING, "the replica is not idle"
    stopped, placed = world.scale(1, spare=1)
    assert isinstance(stopped, AttemptStopped)
    assert isinstance(placed, AttemptPlaced)
    assert (stopped.job, placed.job) == ("serve-digits", "training")
    assert world.replicas == {}
    stopped, placed = world.scale(1)
    assert isinstance(stopped, AttemptStopped)
    assert isinstance(placed, AttemptPlaced)
    assert (stopped.job, placed.job) == ("training", "serve-digits.2")
    assert (job.state, job.preempted) == (WAITING, 1), "an attempt that does not count"


def test_what_comes_while_replicas_are_idle_gets_their_room_too() -> None:
    world = World("a")
    world.deploy()
    world.scale(1, spare=1)
    assert world.submit("training", 900).state == PLACED
    assert world.replicas == {}


def test_no_replica_gives_way_in_vain_nor_more_than_are_needed() -> None:
    world = World("a", "b", "c")
    world.deploy()
    world.scale(3)
    world.scale(3, spare=3)
    assert world.submit("too-large", 1100).state == WAITING
    assert len(world.replicas) == 3
    assert world.submit("one-node", 1000).state in LIVE
    assert len(world.replicas) == 2


def test_training_that_may_not_be_preempted_keeps_what_it_was_lent() -> None:
    world = World("a")
    world.deploy()
    world.scale(1, spare=1)
    job = world.submit("training", 900, preemptible=False)
    world.scale(1)
    assert job.state == PLACED
    assert world.replicas == {"serve-digits.2": ""}
    world.do(JobCancelled(project="default", job="training"))
    assert world.replicas == {"serve-digits.2": "a"}


def test_room_is_not_taken_from_those_who_were_lent_nothing() -> None:
    world = World("a")
    job = world.submit("training", 900)
    world.deploy()
    assert job.state == PLACED
    assert world.replicas == {"serve-digits": ""}


def test_a_replica_that_loses_its_node_gets_what_was_lent_elsewhere() -> None:
    """In that step: it waited for the lost node to come back while training had its room."""
    world = World("a", "b")
    world.deploy()
    world.scale(2)
    world.scale(2, spare=1)
    job = world.submit("training", 900)
    (node,) = world.replicas.values()
    (lent,) = job.live.nodes
    world.do(Tick([node]))
    assert list(world.replicas.values()) == [lent]
    assert job.state == WAITING


def test_who_gave_its_room_back_owes_no_other() -> None:
    world = World("a")
    world.deploy()
    world.scale(1, spare=1)
    job = world.submit("training", 900)
    world.do(Heartbeat("b", "1", ["train"], Resources(1000, 4096)))
    world.scale(1)
    assert (list(world.replicas.values()), job.live.nodes) == (["a"], {"b"})
    world.beat("b")
    world.do(Tick(["a"]))
    assert (list(world.replicas.values()), job.live.nodes) == ([""], {"b"})


NODES = st.sampled_from(["a", "b", "c"])
STEPS = st.one_of(
    st.tuples(st.just("beat"), NODES),
    st.tuples(st.just("lose"), NODES),
    st.tuples(st.just("scale"), st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.just("submit"), st.sampled_from([300, 600, 900, 1000])),
    st.tuples(st.just("cancel"), st.integers(0, 9)),
)


def step(world: World, number: int, *wish: object) -> None:
    match wish:
        case "beat", str(node):
            world.beat(node)
        case "lose", str(node):
            world.do(Tick([node]))
        case "scale", int(replicas), int(spare):
            world.scale(replicas, min(spare, replicas))
        case "submit", int(cpu_milli):
            world.submit(f"job-{number}", cpu_milli)
        case "cancel", int(which):
            jobs = [job for job in world.scheduler.jobs.values() if job.state not in TERMINAL]
            if jobs:
                job = jobs[which % len(jobs)]
                world.do(JobCancelled(project="default", job=job.request.job))


@given(st.lists(STEPS, max_size=40))
def test_whatever_happens_replicas_are_apart_and_as_many_as_can_be(
    steps: list[tuple[object, ...]],
) -> None:
    world = World("a", "b")
    world.deploy()
    for number, one in enumerate(steps):
        step(world, number, *one)
        scheduler = world.scheduler
        deployment = scheduler.deployments[KEY]
        nodes = [node for node in world.replicas.values() if node]
        assert len(set(nodes)) == len(nodes)
        able = sum(scheduler.is_open(node) for node in scheduler.nodes)
        fewest = min(deployment.replicas, max(able, 1 if deployment.replicas else 0))
        assert fewest <= len(world.replicas) <= deployment.replicas
        assert 0 <= deployment.spare <= deployment.replicas
    replayed = Scheduler()
    for at, (stimulus, now, decided) in enumerate(world.log):
        if at == len(world.log) // 2:
            replayed = restore(replayed.snapshot())
        assert replayed.handle(stimulus, now) == decided


def test_a_replica_that_gives_way_says_for_whom() -> None:
    world = World("a")
    world.deploy()
    world.scale(1, spare=1)
    world.submit("training", 900)
    gone = world.scheduler.jobs["default", "serve-digits"]
    assert (gone.state, gone.reason) == (CANCELLED, "gives its room to default/training")
