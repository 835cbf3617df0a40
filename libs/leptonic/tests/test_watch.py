"""Following a loop on its events: the first that fits, failures at once, a diagnosis at the end."""

import io
import time
from typing import Any

import pytest
from leptonic import Client, rounds
from leptonic.watch import Stalled, Watch, at
from rich.console import Console


def event(platform: Any, what: str, /, time_s: int = 0, **data: Any) -> None:
    sequence = len(platform.events) + 1
    when = f"2026-11-21T00:00:{time_s:02}+00:00"
    subject = f"events.default.{what}"
    platform.events.append({"sequence": sequence, "subject": subject, "time": when, "data": data})


@pytest.fixture
def watch(client: Client) -> Watch:
    watch = Watch(Console(file=io.StringIO(), width=200), 0.0)
    watch.attach(client)
    return watch


def waited(watch: Watch, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = watch.event(kind, lambda data: True, 0.3, "waiting")["data"]
    return found


def test_only_what_happens_after_attaching_counts(client: Client, platform: Any) -> None:
    event(platform, "job.succeeded", job="old")
    watch = Watch(Console(file=io.StringIO()), 0.0)
    watch.attach(client)
    event(platform, "job.succeeded", job="new")
    assert waited(watch, "job.succeeded") == {"job": "new"}


def test_a_failed_job_or_gate_ends_the_wait_with_its_reason(watch: Watch, platform: Any) -> None:
    event(platform, "job.failed", job="train-a", attempt=2, reason="ValueError: third epoch")
    started = time.monotonic()
    with pytest.raises(Stalled, match="train-a failed on attempt 2: ValueError: third epoch"):
        watch.event("job.succeeded", lambda data: True, 30, "training")
    assert time.monotonic() - started < 5
    watch.seen.clear()
    checks = [{"sentence": "accuracy 0.5 is not at least 0.95"}]
    event(platform, "model_version.gated", model="m", number=1, passed=False, checks=checks)
    with pytest.raises(Stalled, match=r"failed its gate: .*0\.5 is not at least"):
        waited(watch, "deployment.ready")


def test_a_deadline_says_what_was_waited_for_and_what_the_platform_says(
    watch: Watch, platform: Any
) -> None:
    watch.dead_after = 0
    event(platform, "part.landed", rows=50)
    with pytest.raises(Stalled) as caught:
        waited(watch, "dataset_version.created")
    said = str(caught.value)
    assert "waiting: no dataset_version.created within 0 s" in said
    assert "dead letter dlq.records.default.digits: label: missing" in said
    assert "job train-b is waiting: needs 2 cpu" in said
    assert "default.part.landed" in said


def test_stages_take_the_events_own_times(watch: Watch, platform: Any) -> None:
    event(platform, "part.landed", time_s=3)
    event(platform, "job.requested", time_s=5)
    for kind in ("part.landed", "job.requested"):
        found = watch.event(kind, lambda data: True, 1, "waiting")
        watch.mark(kind, at=at(found))
    assert watch.marks[1].seconds == 2.0


def test_a_round_is_followed_to_the_canary_and_its_promotion(watch: Watch, platform: Any) -> None:
    digest, job = "d" * 64, f"train-digits-1-{'d' * 12}"
    event(platform, "dataset_version.created", dataset="other", number=9, digest="e", rows=1)
    event(
        platform, "dataset_version.created", dataset="digits", number=2, digest=digest, rows=1800,
        reason="drift",
    )  # fmt: skip
    event(platform, "job.requested", kind="train", job=job)
    event(platform, "attempt.placed", job=job, workers=2, node="local")
    event(platform, "job.progressed", job=job, epoch=1, epochs=1, metrics={"loss": 0.5})
    event(platform, "job.succeeded", job=job)
    event(platform, "model_version.registered", job=job, number=2, metrics={"accuracy": 0.97})
    event(platform, "model_version.gated", model="digits", number=2, passed=True, checks=[])
    targets = [{"number": 1, "percent": 80}, {"number": 2, "percent": 20}]
    event(platform, "deployment.updated", model="digits", generation=2, targets=targets)
    event(platform, "deployment.ready", model="digits", generation=2)
    deployed = rounds.follow(watch, "digits", "digits", 1)
    assert (deployed.number, deployed.percent, deployed.dataset_version) == (2, 20, 2)
    sent = []

    def send() -> None:
        sent.append(1)
        if len(sent) == 2:
            event(platform, "model_version.promoted", model="digits", number=2, reason="better")
            alone = [{"number": 2, "percent": 100}]
            event(platform, "deployment.updated", model="digits", generation=3, targets=alone)
            event(platform, "deployment.ready", model="digits", generation=3)

    rounds.promote(watch, deployed, "digits", send)
    stages = [mark.stage for mark in watch.marks]
    assert stages[-2:] == ["deployed", "canary promoted"]
    assert len(sent) >= 2


def test_a_canary_that_is_taken_back_is_said_at_once(watch: Watch, platform: Any) -> None:
    deployed = rounds.Deployed(dataset_version=2, number=2, percent=20, metrics={})
    event(platform, "model_version.rejected", number=2, reason="0.5 is worse", model="digits")
    with pytest.raises(Stalled, match=r"taken back: 0\.5 is worse"):
        rounds.promote(watch, deployed, "digits", lambda: None)
