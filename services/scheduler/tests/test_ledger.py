"""The scheduler under all that can happen, against a ledger that knows none of its counters.

Submissions, results, failures, silence, restarts of nodes, shrinking nodes, queues that come,
change and go, evictions, deployments that grow, shrink, lend and go to zero, and a crash of the
scheduler at any point: after each the ledger agrees,
the scheduler agrees with itself, and its log read again gives the same state and decisions.
"""

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from libs.contracts.autoscaling import Autoscaling
from libs.contracts.events import (
    AttemptPlaced,
    AttemptStopped,
    JobCancelled,
    JobRequested,
    Resources,
)
from services.scheduler.ledger import Ledger
from services.scheduler.stimuli import (
    Deployed,
    Heartbeat,
    JobSubmitted,
    QueueApplied,
    QueueDeleted,
    QueueSpec,
    Scaled,
    Tick,
)
from services.scheduler.tests.world import World

NODES = ("a", "b", "c")
QUEUES = ("default", "left", "right", "served")
SHAPES = [
    Resources(1, 1, 0),
    Resources(2, 1, 0),
    Resources(1, 1, 300),
    Resources(1, 1, 500),
    Resources(1, 1, 1000),
    Resources(2, 2, 1000, 2),
    Resources(0, 0, 1000, 4),
]
shapes = st.sampled_from(SHAPES)
amounts = st.dictionaries(
    st.sampled_from(["cpu_milli", "gpu_milli", "gpu_milli/A"]), st.integers(0, 4), max_size=2
).map(lambda found: {k: v * (1 if k == "cpu_milli" else 1000) for k, v in found.items()})
specs = st.builds(
    QueueSpec,
    queue=st.sampled_from(QUEUES),
    cohort=st.sampled_from(["", "all", "all", "all"]),
    nominal=amounts,
    borrowing_limit=st.just({}) | amounts,
    lending_limit=st.just({}) | amounts,
    weight=st.sampled_from([1000, 3000]),
    order=st.sampled_from(["priority", "priority", "attained"]),
    within_queue=st.sampled_from(["never", "lower"]),
    reclaim=st.sampled_from(["never", "lower", "any"]),
    grace_s=st.sampled_from([0, 30]),
    aging_s=st.sampled_from([0, 50]),
    placement=st.sampled_from(["pack", "spread"]),
)


requests = st.builds(
    JobRequested,
    project=st.just("p"),
    job=st.integers(0, 19).map("job-{}".format),
    kind=st.just("train"),
    queue=st.sampled_from(QUEUES),
    priority=st.integers(0, 2),
    workers=st.sampled_from([1, 1, 2, 3]),
    resources=shapes,
    attempts_max=st.sampled_from([1, 3, 5]),
    gpu_models=st.sampled_from([[], [], ["A"], ["A", "B"]]),
    labels=st.sampled_from([{}, {}, {"zone": "x"}]),
    topology=st.sampled_from(["node", "any"]),
    duration_s=st.sampled_from([0, 0, 0, 5, 50]),
    preemptible=st.sampled_from([True, True, False]),
)
nodes = st.sampled_from(NODES)
DURATIONS_S, NOT_KNOWN = (0, 0, 20, 100), (0,)
"""Where one is known a reservation may keep something free, and the ledger asks less."""
REPLICAS = [Resources(2, 1, 0), Resources(3, 2, 0), Resources(1, 1, 500), Resources(2, 1, 1000, 2)]
MODELS = ("digits", "words")


def deployed(model: str, generation: int, least: int, more: int, needs: Resources) -> Deployed:
    return Deployed(
        project="p",
        model=model,
        generation=generation,
        wanted=Autoscaling(min_replicas=least, max_replicas=max(1, least + more)),
        resources=needs,
    )


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        for node, model in zip(NODES, "ABA", strict=True):
            self.world.beat(node, Resources(8, 8, 1000, 4), model, {"zone": "x"})

    @rule(request=requests)
    def submit(self, request: JobRequested) -> None:
        self.world.tell(JobSubmitted(request))

    @rule(
        node=nodes,
        cpus=st.integers(1, 8),
        gpus=st.integers(0, 4),
        model=st.sampled_from(["A", "B"]),
        zone=st.sampled_from(["x", "y"]),
        health=st.sampled_from(["Healthy"] * 6 + ["Degraded", "Initializing", "Unhealthy"]),
    )
    def heartbeat(
        self, node: str, cpus: int, gpus: int, model: str, zone: str, health: str
    ) -> None:
        has = Resources(cpus, 8, 1000, gpus)
        self.world.beat(node, has, model, {"zone": zone}, health)

    @rule(node=nodes)
    def recover(self, node: str) -> None:
        self.world.recover(node)

    @rule(node=nodes, keeps=st.booleans())
    def reboot(self, node: str, keeps: bool) -> None:
        self.world.reboot(node, keeps)

    @rule(node=nodes)
    def silence(self, node: str) -> None:
        self.world.tell(Tick([node]))

    @rule(seconds=st.sampled_from([1, 20, 100, 4000]))
    def look(self, seconds: int) -> None:
        self.world.tell(Tick(look=True), seconds)

    @rule(node=nodes)
    def obey(self, node: str) -> None:
        self.world.obey(node)

    @precondition(lambda self: self.world.placed)
    @rule(data=st.data(), outcome=st.sampled_from(["starts", "succeeds", "fails", "breaks"]))
    def answer(self, data: st.DataObject, outcome: str) -> None:
        self.world.answer(data.draw(st.sampled_from(self.world.placed[-6:])), outcome)

    @rule(number=st.integers(0, 21))
    def cancel(self, number: int) -> None:
        self.world.tell(JobCancelled(project="p", job=f"job-{number}"))

    @rule(spec=specs)
    def apply(self, spec: QueueSpec) -> None:
        self.world.tell(QueueApplied(spec))

    @rule(queue=st.sampled_from(QUEUES))
    def delete(self, queue: str) -> None:
        self.world.tell(QueueDeleted(queue))

    @rule(
        model=st.sampled_from(MODELS),
        least=st.integers(0, 2),
        more=st.integers(0, 2),
        needs=st.sampled_from(REPLICAS),
    )
    def deploy(self, model: str, least: int, more: int, needs: Resources) -> None:
        known = self.world.ledger.servings.get(("p", model))
        generation = known.told.generation + 1 if known else 1
        self.world.tell(deployed(model, generation, least, more, needs))

    @precondition(lambda self: self.world.ledger.servings)
    @rule(data=st.data(), replicas=st.integers(0, 4), spare=st.integers(0, 4))
    def scale(self, data: st.DataObject, replicas: int, spare: int) -> None:
        serving = self.world.ledger.servings[data.draw(servings_of(self.world))]
        scale(self.world, serving.told, replicas, spare)

    @precondition(lambda self: self.world.ledger.replicas)
    @rule(data=st.data())
    def cancel_replica(self, data: st.DataObject) -> None:
        project, job = data.draw(st.sampled_from(list(self.world.ledger.replicas)))
        self.world.tell(JobCancelled(project=project, job=job))

    @rule(keeps=st.booleans())
    def crash(self, keeps: bool) -> None:
        self.world.crash(keeps)

    @invariant()
    def agrees(self) -> None:
        self.world.check()


def servings_of(world: World) -> st.SearchStrategy[tuple[str, str]]:
    return st.sampled_from(list(world.ledger.servings))


def scale(world: World, told: Deployed, replicas: int, spare: int) -> None:
    """Within its bounds, as the autoscaler decides: what is spare is above its least."""
    least, most = told.wanted.min_replicas, told.wanted.max_replicas
    replicas = min(max(replicas, least), most)
    world.tell(Scaled(told.project, told.model, replicas, min(spare, replicas - least)))


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("seed", range(8))
def test_a_busy_cluster_keeps_its_books(seed: int) -> None:
    """A walk that keeps three nodes full: evictions, reservations and borrowing all the time."""
    chance = random.Random(seed)
    world = World()
    for node, model in zip(NODES, "ABA", strict=True):
        world.beat(node, Resources(16, 16, 1000, 4), model, {"zone": "x"})
    for queue in QUEUES[1:]:
        world.tell(QueueApplied(queue_of(chance, queue)))
    for number in range(300):
        step(world, chance, number)
        world.check_promise()
        if number % 10 == 0:
            world.check()
    assert world.promises > 10
    world.crash(keeps=True)
    world.check()


def step(
    world: World, chance: random.Random, number: int, durations: Sequence[int] = DURATIONS_S
) -> None:
    live = list(world.ledger.live.values())
    match chance.choices(range(6), [12, 6, 4, 2, 1, 1])[0]:
        case 0:
            world.tell(JobSubmitted(request_of(chance, number, durations)))
        case 1 if live:
            for share in chance.choice(live).shares.values():
                world.answer(share, chance.choice(["starts", "succeeds", "succeeds", "fails"]))
        case 2:
            world.tell(Tick(look=True), chance.choice([1, 10, 60, 3000]))
        case 3:
            world.obey(chance.choice(NODES))
        case 4:
            world.tell(Tick([chance.choice(NODES)]))
        case _:
            world.recover(chance.choice(NODES))


@pytest.mark.parametrize("seed", range(2, 10))
def test_replicas_that_come_and_go_lend_their_room_and_get_it_back(seed: int) -> None:
    """Two deployments on a cluster that training fills, under the same walk."""
    chance = random.Random(seed)
    world = World()
    for node, model in zip(NODES, "ABA", strict=True):
        world.beat(node, Resources(8, 8, 1000, 4), model, {"zone": "x"})
    for number in range(300):
        if chance.random() < 0.3:
            turn(world, chance, number)
        else:
            step(world, chance, number, NOT_KNOWN)
        if number % 10 == 0:
            world.check()
    assert any("gives its room to" in said.reason for said in stops(world))
    world.crash(keeps=True)
    world.check()


def turn(world: World, chance: random.Random, number: int) -> None:
    """More or fewer of a model, or the model anew."""
    known = world.ledger.servings.get(("p", model := chance.choice(MODELS)))
    if known is None or chance.random() < 0.1:
        least, more = chance.randrange(2), chance.randrange(3)
        world.tell(deployed(model, number + 1, least, more, chance.choice(REPLICAS)))
    else:
        scale(world, known.told, chance.randrange(4), chance.randrange(4))


def stops(world: World) -> list[AttemptStopped]:
    return [one for *_, said in world.log for one in said if isinstance(one, AttemptStopped)]


def request_of(chance: random.Random, number: int, durations: Sequence[int]) -> JobRequested:
    resources = chance.choice(SHAPES)
    return JobRequested(
        project="p",
        job=f"job-{number}",
        kind="train",
        queue=chance.choice(QUEUES),
        priority=chance.randrange(4),
        workers=chance.choice([1, 1, 2, 3]),
        resources=resources,
        attempts_max=9,
        gpu_models=chance.choice([[], [], [], ["A"], ["B"]]) if resources.gpu_milli else [],
        topology=chance.choice(["node", "any"]),
        duration_s=chance.choice(durations),
        preemptible=chance.random() < 0.9,
    )


def queue_of(chance: random.Random, queue: str) -> QueueSpec:
    order: Any = chance.choice(["priority", "attained"])
    reclaim: Any = chance.choice(["lower", "any"])
    return QueueSpec(
        queue=queue,
        cohort="all",
        nominal={"gpu_milli": chance.choice([2000, 4000])},
        borrowing_limit=chance.choice([{}, {"gpu_milli": 3000}]),
        lending_limit=chance.choice([{}, {"gpu_milli": 1000}]),
        order=order,
        within_queue="lower",
        reclaim=reclaim,
        grace_s=chance.choice([0, 20]),
        aging_s=chance.choice([0, 30]),
        placement="spread" if queue == "right" else "pack",
    )


def placed(node: str, gpu: int, token: int = 1) -> AttemptPlaced:
    fields = {"project": "p", "job": f"j{token}", "attempt": 1, "token": token, "node": node}
    share = {"workers": 1, "gpus": [[gpu]], "gang": [{"node": node, "workers": 1}]}
    return msgspec.convert({**fields, **share, "kind": "train"}, AttemptPlaced)


def test_the_ledger_finds_what_is_given_twice() -> None:
    ledger = Ledger()
    ledger.enter(Heartbeat("a", 1, ["train"], Resources(9, 9, 1000, 2)), [], 1.0)
    for token in (1, 2):
        request = JobRequested(project="p", job=f"j{token}", kind="train", workers=1)
        resources = Resources(1, 1, 600)
        request = msgspec.structs.replace(request, resources=resources)
        ledger.enter(JobSubmitted(request), [], 1.0)
    ledger.enter(Tick(), [placed("a", 1, 1)], 2.0)
    with pytest.raises(AssertionError, match="1200"):
        ledger.enter(Tick(), [placed("a", 1, 2)], 3.0)


def test_the_ledger_finds_a_node_that_is_not_told_to_stop() -> None:
    ledger = Ledger()
    ledger.enter(Heartbeat("a", 1, ["train"], Resources(9, 9, 1000, 2)), [], 1.0)
    request = JobRequested(project="p", job="j1", kind="train", resources=Resources(1, 1, 600))
    ledger.enter(JobSubmitted(request), [placed("a", 0)], 1.0)
    stopped = AttemptStopped(project="p", job="j1", attempt=1, token=1, node="a")
    with pytest.raises(AssertionError, match="not told to stop"):
        ledger.enter(JobCancelled(project="p", job="j1"), [], 2.0)
    ledger.owed.clear()
    ledger.enter(Tick(), [stopped], 3.0)
