"""What the registry decides: whether a version passes its gate, and what a deployment should be.

A deployment is a state machine: `handle(deployment, stimulus)` looks (state, kind of stimulus) up
in `TRANSITIONS` and returns the new desired state with the events that tell of it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from msgspec import UNSET, structs

from libs.contracts.artifacts import Evaluation
from libs.contracts.autoscaling import (
    REPLICA_ATTEMPTS_MAX,
    REPLICA_KIND,
    REPLICA_PRIORITY,
    REPLICA_QUEUE,
    first_replica,
)
from libs.contracts.events import (
    DeploymentUpdated,
    Event,
    JobRequested,
    ModelVersionPromoted,
    ModelVersionRejected,
    Resources,
    Target,
)
from libs.contracts.pipeline import Canary, Gate
from libs.contracts.pipeline import Deployment as Settings

CHAMPION = "champion"
CHALLENGER = "challenger"
NONE, STABLE, ROLLING = "none", "stable", "canary"
LOWER_IS_BETTER = frozenset({"loss", "mae", "mse"})
REQUESTS_BEFORE_ROLLBACK = 10
"""Errors of a canary count once it answered so many requests, or `min_requests` if fewer."""
SERVE_RESOURCES = Resources(cpu_milli=200, memory_mib=256)


@dataclass(frozen=True)
class Check:
    """One bound of one gate, with its numbers."""

    metric: str
    rule: str
    """`min`, `max` or `max_drop`."""
    bound: float
    value: float | None
    champion: float | None
    passed: bool
    sentence: str


def gate(gates: list[Gate], evaluation: Evaluation, champion: int | None) -> list[Check]:
    """Every bound of every gate; the version passes if all of them do.

    `champion` is the version that serves now, with which `max_drop` compares.
    """
    return [
        check(one, rule, bound, evaluation, champion)
        for one in gates
        for rule, bound in (("min", one.min), ("max", one.max), ("max_drop", one.max_drop))
        if bound is not None
    ]


def check(
    one: Gate, rule: str, bound: float, evaluation: Evaluation, champion: int | None
) -> Check:
    value = measured(evaluation.metrics, one.metric)
    before = measured(evaluation.champion_metrics, one.metric)
    if value is None:
        said = sorted(evaluation.metrics)
        passed, sentence = False, f"{one.metric} was not measured; measured: {', '.join(said)}"
    elif rule == "max_drop":
        passed, sentence = drop(one.metric, bound, value, before, evaluation.champion, champion)
    else:
        passed = value >= bound if rule == "min" else value <= bound
        relation = "at least" if rule == "min" else "at most"
        not_ = "" if passed else "not "
        sentence = f"{one.metric} {value:.6g} is {not_}{relation} {bound:.6g}"
    return Check(one.metric, rule, bound, value, before, passed, sentence)


def drop(
    metric: str,
    bound: float,
    value: float,
    before: float | None,
    compared: int | None,
    champion: int | None,
) -> tuple[bool, str]:
    """Whether the metric got worse than the champion's by more than `bound`, and the sentence."""
    if champion is None:
        return True, f"{metric} is {value:.6g}; no champion to compare with"
    if compared != champion:
        against = "no champion" if compared is None else f"version {compared}"
        return False, (
            f"{metric} was compared with {against}, but version {champion} is champion now: "
            "evaluate again"
        )
    if before is None:
        return False, f"{metric} of the champion, version {champion}, was not measured"
    worse = value - before if metric in LOWER_IS_BETTER else before - value
    relation = "at most" if worse <= bound else "more than"
    return worse <= bound, (
        f"{metric} {value:.6g} against version {champion}'s {before:.6g} "
        f"is worse by {worse:.6g}, {relation} {bound:.6g}"
    )


def measured(metrics: Mapping[str, float], metric: str) -> float | None:
    """None for a metric that is absent or no number."""
    value = metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Version:
    number: int
    digest: str
    traceparent: str = ""


@dataclass(frozen=True)
class Deployment:
    """Desired state of what serves one model."""

    project: str
    model: str
    settings: Settings
    state: str = NONE
    generation: int = 0
    champion: Version | None = None
    canary: Version | None = None

    @property
    def targets(self) -> list[Target]:
        """The champion first."""
        percent = self.settings.canary.traffic_percent if self.canary else 0
        shares = ((self.champion, 100 - percent), (self.canary, percent))
        return [Target(v.number, share, v.digest, v.traceparent) for v, share in shares if v]

    @property
    def aliases(self) -> dict[str, int]:
        named = {CHAMPION: self.champion, CHALLENGER: self.canary}
        return {alias: version.number for alias, version in named.items() if version}


@dataclass(frozen=True)
class Counts:
    """What a version did in the deployment's generation, all replicas together."""

    requests: int = 0
    errors: int = 0
    labelled: int = 0
    correct: int = 0
    quarantined: bool = False
    """A replica gave it up: it crashed too often, and gets no requests there any more."""

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def accuracy(self) -> float:
        return self.correct / self.labelled if self.labelled else 0.0


@dataclass(frozen=True)
class Passed:
    """A new version passed its gate."""

    version: Version


@dataclass(frozen=True)
class Observed:
    """Counts by version number, of the current generation."""

    counts: Mapping[int, Counts]


@dataclass(frozen=True)
class Chosen:
    """Somebody promotes a version by hand."""

    version: Version


@dataclass(frozen=True)
class Configured:
    """The pipeline's deployment section is another one."""

    settings: Settings


Stimulus = Passed | Observed | Chosen | Configured


@dataclass(frozen=True)
class Outcome:
    deployment: Deployment
    events: tuple[Event, ...] = ()
    states: Mapping[int, str] = field(default_factory=dict)
    """Version number -> its new state."""


class Impossible(Exception):
    """A stimulus that cannot happen in the deployment's state."""


def handle(deployment: Deployment, stimulus: Stimulus) -> Outcome:
    """The decision. Raises `Impossible` for a transition that is not in the table."""
    transition = TRANSITIONS.get((deployment.state, type(stimulus)))
    if transition is None:
        raise Impossible(f"{type(stimulus).__name__} of a deployment that is {deployment.state}")
    return transition(deployment, stimulus)


def deploy_first(before: Deployment, stimulus: Passed) -> Outcome:
    outcome = promote(before, stimulus.version, "the first version that passed its gate")
    request = JobRequested(
        project=before.project,
        job=first_replica(before.model),
        kind=REPLICA_KIND,
        queue=REPLICA_QUEUE,
        priority=REPLICA_PRIORITY,
        resources=SERVE_RESOURCES,
        attempts_max=REPLICA_ATTEMPTS_MAX,
        preemptible=False,
        spec={"model": before.model},
    )
    return replace(outcome, events=(*outcome.events, request))


def begin_canary(before: Deployment, stimulus: Passed) -> Outcome:
    return updated(
        before, state=ROLLING, canary=stimulus.version, states={stimulus.version.number: "canary"}
    )


def supersede(before: Deployment, stimulus: Passed) -> Outcome:
    number = stimulus.version.number
    said, states = reject(before, f"superseded by version {number}, which passed its gate")
    return updated(
        before,
        state=ROLLING,
        canary=stimulus.version,
        facts=(said,),
        states={**states, number: "canary"},
    )


def unchanged(before: Deployment, _: Any) -> Outcome:
    return Outcome(before)


def judge(before: Deployment, stimulus: Observed) -> Outcome:
    assert before.champion is not None
    assert before.canary is not None
    champion = stimulus.counts.get(before.champion.number, Counts())
    canary = stimulus.counts.get(before.canary.number, Counts())
    better, reason = verdict(before.settings.canary, champion, canary)
    if better is None:
        return Outcome(before)
    return promote(before, before.canary, reason) if better else roll_back(before, reason)


def choose(before: Deployment, stimulus: Chosen) -> Outcome:
    assert before.champion is not None
    if stimulus.version.number != before.champion.number:
        return promote(before, stimulus.version, "promoted by hand")
    if before.canary is None:
        return Outcome(before)
    return roll_back(before, f"version {before.champion.number} was chosen by hand")


def configure(before: Deployment, stimulus: Configured) -> Outcome:
    if stimulus.settings == before.settings:
        return Outcome(before)
    return updated(before, state=before.state, canary=before.canary, settings=stimulus.settings)


TRANSITIONS: dict[tuple[str, type[Stimulus]], Callable[[Deployment, Any], Outcome]] = {
    (NONE, Passed): deploy_first,
    (STABLE, Passed): begin_canary,
    (STABLE, Observed): unchanged,
    (STABLE, Chosen): choose,
    (STABLE, Configured): configure,
    (ROLLING, Passed): supersede,
    (ROLLING, Observed): judge,
    (ROLLING, Chosen): choose,
    (ROLLING, Configured): configure,
}


def verdict(rules: Canary, champion: Counts, canary: Counts) -> tuple[bool | None, str]:
    """(True: promote, False: roll back, None: wait) and why."""
    rate = f"{canary.errors} errors in {canary.requests} requests"
    if canary.quarantined:
        return False, f"{rate}: it crashed so often that it is quarantined"
    enough = min(REQUESTS_BEFORE_ROLLBACK, rules.min_requests)
    if canary.requests >= enough and canary.error_rate > rules.max_error_rate:
        return False, f"{rate}: {canary.error_rate:.4f} is more than {rules.max_error_rate:.4f}"
    compared = ""
    if min(champion.labelled, canary.labelled) >= max(rules.min_labelled, 1):
        lost = champion.accuracy - canary.accuracy
        compared = (
            f", accuracy {canary.accuracy:.4f} of {canary.labelled} labels "
            f"against {champion.accuracy:.4f} of {champion.labelled}"
        )
        if lost > rules.max_accuracy_drop:
            return False, f"{rate}{compared}: dropped more than {rules.max_accuracy_drop:.4f}"
    if canary.requests < rules.min_requests:
        return None, f"{rate}{compared}: waits for {rules.min_requests} requests"
    return True, f"{rate}{compared}"


def promote(before: Deployment, version: Version, reason: str) -> Outcome:
    """All traffic to `version`; a canary that is another version is taken back."""
    previous = before.champion.number if before.champion else None
    said = ModelVersionPromoted(
        project=before.project,
        model=before.model,
        number=version.number,
        previous=previous,
        reason=reason,
    )
    facts: tuple[Event, ...] = (said,)
    states = {} if previous is None else {previous: "retired"}
    if before.canary and before.canary.number != version.number:
        rejected, taken_back = reject(before, f"version {version.number} was {reason}")
        facts, states = (rejected, said), states | taken_back
    states[version.number] = "serving"
    return updated(before, state=STABLE, champion=version, facts=facts, states=states)


def roll_back(before: Deployment, reason: str) -> Outcome:
    said, states = reject(before, reason)
    return updated(before, state=STABLE, facts=(said,), states=states)


def reject(before: Deployment, reason: str) -> tuple[Event, dict[int, str]]:
    """The canary is taken back: the event and the version's new state."""
    assert before.champion is not None
    assert before.canary is not None
    said = ModelVersionRejected(
        project=before.project,
        model=before.model,
        number=before.canary.number,
        serving=before.champion.number,
        reason=reason,
    )
    return said, {before.canary.number: "rejected"}


def updated(
    before: Deployment,
    *,
    state: str,
    champion: Version | None = None,
    canary: Version | None = None,
    settings: Settings | None = None,
    facts: tuple[Event, ...] = (),
    states: Mapping[int, str] | None = None,
) -> Outcome:
    """The next generation; its `DeploymentUpdated` follows the other facts."""
    after = replace(
        before,
        state=state,
        generation=before.generation + 1,
        champion=champion or before.champion,
        canary=canary,
        settings=settings or before.settings,
    )
    return Outcome(after, (*facts, news_of(after)), states or {})


def news_of(deployment: Deployment) -> DeploymentUpdated:
    batching, autoscaling = deployment.settings.batching, deployment.settings.autoscaling
    return DeploymentUpdated(
        project=deployment.project,
        model=deployment.model,
        generation=deployment.generation,
        replicas=deployment.settings.replicas,
        targets=deployment.targets,
        batching={name: getattr(batching, name) for name in batching.__struct_fields__},
        request_log_percent=deployment.settings.request_log_percent,
        autoscaling={} if autoscaling is UNSET else structs.asdict(autoscaling),
        resources=SERVE_RESOURCES,
    )


def validate(deployment: Deployment) -> None:
    """What is true of a deployment in every state."""
    targets = deployment.targets
    numbers = [target.number for target in targets]
    if deployment.state == NONE:
        assert not targets, f"nothing is deployed, yet it targets {numbers}"
        assert deployment.generation == 0
        return
    assert deployment.state in (STABLE, ROLLING), deployment.state
    assert deployment.generation > 0
    assert deployment.champion is not None, "a champion always serves"
    assert numbers[0] == deployment.champion.number
    assert len(set(numbers)) == len(numbers) <= 2, f"at most one canary beside: {numbers}"
    assert (deployment.canary is not None) == (deployment.state == ROLLING)
    assert sum(target.percent for target in targets) == 100
    assert all(1 <= target.percent <= 100 for target in targets)
