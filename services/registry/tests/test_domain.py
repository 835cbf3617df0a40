"""The deployment's state machine: every transition, and what is true whatever happens."""

import itertools

import msgspec
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from libs.contracts.autoscaling import Autoscaling
from libs.contracts.events import (
    DeploymentUpdated,
    JobRequested,
    ModelVersionPromoted,
    ModelVersionRejected,
)
from libs.contracts.pipeline import Canary
from libs.contracts.pipeline import Deployment as Settings
from services.registry.domain import (
    NONE,
    ROLLING,
    STABLE,
    Chosen,
    Configured,
    Counts,
    Deployment,
    Impossible,
    Observed,
    Outcome,
    Passed,
    Stimulus,
    Version,
    handle,
    validate,
    verdict,
)

RULES = Canary(
    traffic_percent=20,
    min_requests=50,
    max_error_rate=0.02,
    max_accuracy_drop=0.05,
    min_labelled=20,
)
SETTINGS = Settings(model="digits", replicas=2, canary=RULES)
EMPTY = Deployment("default", "digits", SETTINGS)


def version(number: int) -> Version:
    return Version(number, f"digest-{number}", f"trace-{number}")


def after(*stimuli: Stimulus) -> Outcome:
    outcome = Outcome(EMPTY)
    for stimulus in stimuli:
        outcome = handle(outcome.deployment, stimulus)
        validate(outcome.deployment)
    return outcome


def kinds(outcome: Outcome) -> list[type]:
    return [type(event) for event in outcome.events]


def shares(outcome: Outcome) -> list[tuple[int, int]]:
    return [(target.number, target.percent) for target in outcome.deployment.targets]


def observed(requests: int, errors: int, labelled: int = 0, correct: int = 0) -> Observed:
    return Observed({1: Counts(200, 0, 100, 95), 2: Counts(requests, errors, labelled, correct)})


ONE, TWO, THREE = (Passed(version(number)) for number in (1, 2, 3))


def test_the_first_version_gets_all_traffic_and_a_serve_job() -> None:
    outcome = after(ONE)
    assert shares(outcome) == [(1, 100)]
    assert (outcome.deployment.state, outcome.deployment.generation) == (STABLE, 1)
    assert outcome.deployment.aliases == {"champion": 1}
    promoted, updated, job = outcome.events
    assert isinstance(promoted, ModelVersionPromoted)
    assert (promoted.number, promoted.previous) == (1, None)
    assert isinstance(updated, DeploymentUpdated)
    assert (updated.targets[0].digest, updated.targets[0].traceparent) == ("digest-1", "trace-1")
    assert (updated.replicas, updated.batching["max_batch_size"]) == (2, 64)
    assert isinstance(job, JobRequested)
    assert (job.job, job.kind, job.workers, job.spec) == (
        "serve-digits",
        "serve",
        1,
        {"model": "digits"},
    )
    assert (updated.autoscaling, updated.resources) == ({}, job.resources)


def test_what_scales_a_deployment_is_told_with_every_generation() -> None:
    wanted = Autoscaling(min_replicas=0, max_replicas=3)
    scaled = Settings(model="digits", autoscaling=wanted)
    _, updated, job = handle(Deployment("default", "digits", scaled), ONE).events
    assert isinstance(updated, DeploymentUpdated)
    assert msgspec.convert(updated.autoscaling, Autoscaling) == wanted
    assert isinstance(job, JobRequested), "the first version is served before anybody asks"
    (again,) = handle(after(ONE).deployment, Configured(scaled)).events
    assert isinstance(again, DeploymentUpdated)
    assert again.autoscaling["max_replicas"] == wanted.max_replicas


def test_a_later_version_is_a_canary() -> None:
    outcome = after(ONE, TWO)
    assert shares(outcome) == [(1, 80), (2, 20)]
    assert kinds(outcome) == [DeploymentUpdated]
    assert outcome.deployment.aliases == {"champion": 1, "challenger": 2}
    assert outcome.states == {2: "canary"}


def test_a_good_canary_is_promoted() -> None:
    outcome = after(ONE, TWO, observed(requests=50, errors=1, labelled=20, correct=19))
    assert shares(outcome) == [(2, 100)]
    assert kinds(outcome) == [ModelVersionPromoted, DeploymentUpdated]
    assert outcome.states == {1: "retired", 2: "serving"}
    assert outcome.deployment.aliases == {"champion": 2}


def test_a_bad_canary_is_rolled_back() -> None:
    outcome = after(ONE, TWO, observed(requests=10, errors=1))
    assert shares(outcome) == [(1, 100)]
    assert kinds(outcome) == [ModelVersionRejected, DeploymentUpdated]
    assert outcome.states == {2: "rejected"}
    (rejected, _) = outcome.events
    assert isinstance(rejected, ModelVersionRejected)
    assert (rejected.number, rejected.serving) == (2, 1)
    assert "1 errors in 10 requests" in rejected.reason


def test_an_observation_of_one_version_changes_nothing() -> None:
    before = after(ONE).deployment
    assert handle(before, Observed({1: Counts(1000, 1000)})) == Outcome(before)


def test_a_new_version_replaces_a_running_canary() -> None:
    outcome = after(ONE, TWO, THREE)
    assert shares(outcome) == [(1, 80), (3, 20)]
    assert kinds(outcome) == [ModelVersionRejected, DeploymentUpdated]
    assert outcome.states == {2: "rejected", 3: "canary"}
    assert outcome.deployment.generation == 3
    assert isinstance(outcome.events[0], ModelVersionRejected)
    assert "superseded by version 3" in outcome.events[0].reason


def test_by_hand() -> None:
    promoted = after(ONE, TWO, Chosen(version(2)))
    assert shares(promoted) == [(2, 100)]
    back = handle(promoted.deployment, Chosen(version(1)))
    assert shares(back) == [(1, 100)]
    assert back.states == {2: "retired", 1: "serving"}
    assert handle(back.deployment, Chosen(version(1))).events == ()


def test_choosing_the_champion_takes_the_canary_back() -> None:
    outcome = after(ONE, TWO, Chosen(version(1)))
    assert shares(outcome) == [(1, 100)]
    assert kinds(outcome) == [ModelVersionRejected, DeploymentUpdated]


def test_choosing_a_third_version_takes_the_canary_back() -> None:
    outcome = after(ONE, TWO, Chosen(version(3)))
    assert shares(outcome) == [(3, 100)]
    assert kinds(outcome) == [ModelVersionRejected, ModelVersionPromoted, DeploymentUpdated]
    assert outcome.states == {1: "retired", 2: "rejected", 3: "serving"}


def test_new_settings_are_a_new_generation_with_the_same_versions() -> None:
    before = after(ONE, TWO).deployment
    changed = Settings(model="digits", replicas=4, canary=Canary(traffic_percent=40))
    outcome = handle(before, Configured(changed))
    assert shares(outcome) == [(1, 60), (2, 40)]
    assert outcome.deployment.generation == before.generation + 1
    assert handle(outcome.deployment, Configured(changed)) == Outcome(outcome.deployment)


@pytest.mark.parametrize("stimulus", [Observed({}), Chosen(version(1)), Configured(SETTINGS)])
def test_what_is_not_in_the_table_raises(stimulus: Stimulus) -> None:
    with pytest.raises(Impossible, match=f"{type(stimulus).__name__} .* none"):
        handle(EMPTY, stimulus)


CHAMPION = Counts(200, 0, 100, 95)


@pytest.mark.parametrize(
    ("canary", "better", "said"),
    [
        (Counts(49, 0), None, "waits for 50 requests"),
        (Counts(50, 0), True, "0 errors in 50 requests"),
        (Counts(9, 9), None, "waits"),
        (Counts(10, 9), False, "0.9000 is more than 0.0200"),
        (Counts(100, 2), True, "2 errors in 100"),
        (Counts(100, 3), False, "0.0300"),
        (Counts(50, 0, 19, 0), True, "0 errors in 50 requests"),
        (Counts(20, 0, 20, 10), False, "accuracy 0.5000 of 20 labels against 0.9500 of 100"),
        (Counts(50, 0, 20, 18), True, "accuracy 0.9000"),
        (Counts(40, 0, 20, 18), None, "waits"),
        (Counts(), None, "waits"),
        (Counts(3, 3, quarantined=True), False, "3 errors in 3 requests: it crashed so often"),
    ],
)
def test_the_verdict(canary: Counts, better: bool | None, said: str) -> None:
    answer, reason = verdict(RULES, CHAMPION, canary)
    assert answer is better
    assert said in reason


def test_errors_count_early_where_few_requests_are_asked() -> None:
    rules = Canary(min_requests=3)
    assert verdict(rules, CHAMPION, Counts(2, 2))[0] is None
    assert verdict(rules, CHAMPION, Counts(3, 1))[0] is False


def test_accuracy_waits_for_the_champions_labels() -> None:
    assert verdict(RULES, Counts(200, 0, 19, 19), Counts(50, 0, 40, 0))[0] is True


NUMBERS = st.integers(0, 100)
COUNTS = st.builds(
    lambda requests, errors, labelled, correct: Counts(
        requests, min(errors, requests), labelled, min(correct, labelled)
    ),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    NUMBERS,
)


class AnyHistory(RuleBasedStateMachine):
    """Whatever comes in whatever order: one champion, at most one canary, 100 percent."""

    def __init__(self) -> None:
        super().__init__()
        self.deployment = EMPTY
        self.numbers = itertools.count(1)
        self.passed: list[int] = []

    def take(self, stimulus: Stimulus) -> None:
        before = self.deployment
        try:
            outcome = handle(before, stimulus)
        except Impossible:
            assert before.state == NONE
            return
        after = outcome.deployment
        updates = [e for e in outcome.events if isinstance(e, DeploymentUpdated)]
        if after == before:
            assert not outcome.events
            assert not outcome.states
        else:
            assert after.generation == before.generation + 1
            (update,) = updates
            assert update.generation == after.generation
            assert update.targets == after.targets
        requests = [e for e in outcome.events if isinstance(e, JobRequested)]
        assert len(requests) == (before.state == NONE)
        self.deployment = after

    @rule()
    def passes(self) -> None:
        number = next(self.numbers)
        self.passed.append(number)
        self.take(Passed(version(number)))

    @rule(counts=st.lists(COUNTS, min_size=2, max_size=2))
    def observes(self, counts: list[Counts]) -> None:
        numbers = [target.number for target in self.deployment.targets]
        self.take(Observed(dict(zip(numbers, counts, strict=False))))

    @rule(data=st.data())
    def chooses(self, data: st.DataObject) -> None:
        self.take(Chosen(version(data.draw(st.sampled_from(self.passed or [1])))))

    @rule(percent=st.integers(1, 99), replicas=st.integers(0, 3))
    def configures(self, percent: int, replicas: int) -> None:
        canary = Canary(traffic_percent=percent)
        self.take(Configured(Settings(model="digits", replicas=replicas, canary=canary)))

    @invariant()
    def holds(self) -> None:
        validate(self.deployment)
        serving = {target.number for target in self.deployment.targets}
        assert serving <= set(self.passed), "nothing serves that did not pass"
        assert (self.deployment.state == ROLLING) == (len(serving) == 2)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = hypothesis_settings(max_examples=60, stateful_step_count=20)
