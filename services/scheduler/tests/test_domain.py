"""Single decisions, each by its number."""

from typing import Any

import msgspec
import pytest

from libs.contracts.events import (
    AttemptFailed,
    AttemptPlaced,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    JobCancelled,
    JobFailed,
    JobRequested,
    JobSucceeded,
    Resources,
)
from services.scheduler import domain
from services.scheduler.book import JOB_MOVES, Cause, Impossible
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.fleet import NODE_MOVES
from services.scheduler.jobs import SPEC_BYTES_MAX, STATES, TERMINAL, Placement
from services.scheduler.nodes import DEAF_S, HEALTH, SILENT_S, Liveness
from services.scheduler.stimuli import (
    Heartbeat,
    JobSubmitted,
    QueueApplied,
    QueueSpec,
    Running,
    Stimulus,
    Tick,
)

TWO_CPUS = Resources(cpu_milli=2000, memory_mib=4096)


def request(job: str = "j", **fields: Any) -> JobSubmitted:
    return JobSubmitted(JobRequested(project="p", job=job, kind="train", **fields))


def beat(
    node: str = "n", *running: Running, incarnation: int = 1, capacity: Resources = TWO_CPUS
) -> Heartbeat:
    return Heartbeat(node, incarnation, ["train"], capacity, list(running))


def placed_by(said: list[Event]) -> AttemptPlaced:
    (placed,) = (event for event in said if isinstance(event, AttemptPlaced))
    return placed


def succeeded(placed: AttemptPlaced) -> AttemptSucceeded:
    return AttemptSucceeded(
        project="p", job=placed.job, attempt=placed.attempt, token=placed.token, node=placed.node
    )


def failed(placed: AttemptPlaced, *, retryable: bool) -> AttemptFailed:
    return AttemptFailed(
        project="p",
        job=placed.job,
        attempt=placed.attempt,
        token=placed.token,
        node=placed.node,
        reason="loss is NaN",
        retryable=retryable,
    )


def run(scheduler: Scheduler, *stimuli: Stimulus) -> list[Event]:
    """What the last one brought about."""
    said: list[Event] = []
    for stimulus in stimuli:
        said = scheduler.handle(stimulus, 1.0)
        scheduler.validate()
    return said


def why(scheduler: Scheduler, job: str = "j") -> str:
    return scheduler.why(scheduler.jobs["p", job])


def test_a_gang_is_placed_whole_or_not_at_all() -> None:
    scheduler = Scheduler()
    said = run(scheduler, beat("a"), beat("b"), request(workers=3))
    assert said == []
    assert why(scheduler) == "needs 3 x 1000 cpu_milli; no node is that large: a has 2000 in all"
    said = run(scheduler, beat("c", capacity=Resources(3000, 4096)))
    assert placed_by(said).node == "c"
    assert placed_by(said).workers == 3
    assert scheduler.nodes["c"].allocated == Resources(3000, 1536)


def test_a_waiting_job_says_why_with_numbers() -> None:
    scheduler = Scheduler()
    run(scheduler, request("x"))
    assert why(scheduler, "x") == "no node runs jobs of kind 'train' (announced: none)"
    run(scheduler, beat("local-train", capacity=Resources(4000, 4096)), request("big", workers=4))
    assert why(scheduler, "big") == (
        "needs 4 x 1000 cpu_milli; the largest free node local-train has 3000 free"
    )
    run(scheduler, Tick(["local-train"]))
    assert why(scheduler, "big") == (
        "needs a Healthy node for kind 'train': local-train is Unhealthy"
    )


def test_priority_goes_before_submission_and_small_jobs_pass() -> None:
    scheduler = Scheduler()
    run(scheduler, request("large", workers=3, priority=9), request("late"), request("first"))
    run(scheduler, request("urgent", priority=1))
    said = run(scheduler, beat("n"))
    assert [event.job for event in said if isinstance(event, AttemptPlaced)] == ["urgent", "late"]


def test_a_silent_node_loses_its_attempts_and_old_tokens_are_refused() -> None:
    scheduler = Scheduler()
    old = placed_by(run(scheduler, beat("a"), request()))
    said = run(scheduler, beat("b"), Tick(["a"]))
    new = placed_by(said)
    assert (new.node, new.attempt, new.token) == ("b", 2, old.token + 1)
    assert run(scheduler, succeeded(old)) == []
    assert isinstance(run(scheduler, succeeded(new))[0], JobSucceeded)
    assert run(scheduler, succeeded(new)) == []


def test_a_node_back_from_the_dead_is_told_to_stop_once() -> None:
    scheduler = Scheduler()
    old = placed_by(run(scheduler, beat("a"), request()))
    run(scheduler, beat("b"), Tick(["a"]))
    ghost = Running("p", "ghost", 1, 99)
    back = beat("a", Running("p", "j", old.attempt, old.token), ghost)
    said = run(scheduler, back)
    assert [(event.job, event.token) for event in said if isinstance(event, AttemptStopped)] == [
        ("ghost", 99)
    ], "j was told when a was lost"
    assert not scheduler.is_news(back)
    assert scheduler.is_news(beat("a"))


def test_a_new_incarnation_keeps_what_it_still_runs() -> None:
    scheduler = Scheduler()
    kept = placed_by(run(scheduler, beat(), request("kept")))
    lost = placed_by(run(scheduler, request("lost")))
    said = run(scheduler, beat("n", Running("p", "kept", 1, kept.token), incarnation=2))
    assert [type(event) for event in said] == [AttemptStopped, AttemptPlaced]
    assert placed_by(said).job == "lost"
    assert placed_by(said).token > lost.token
    assert scheduler.jobs["p", "kept"].attempt == 1


def test_a_node_that_shrinks_gives_up_its_newest_attempts() -> None:
    scheduler = Scheduler()
    run(scheduler, beat(), request("old"), request("new"))
    run(scheduler, beat(capacity=Resources(1000, 4096)))
    assert scheduler.jobs["p", "old"].state == "placed"
    assert scheduler.jobs["p", "new"].state == "waiting"


def test_failures_are_tried_again_up_to_the_limit() -> None:
    scheduler = Scheduler()
    first = placed_by(run(scheduler, beat(), request(attempts_max=2)))
    second = placed_by(run(scheduler, failed(first, retryable=True)))
    assert why(scheduler) == "attempt 1 on n: loss is NaN"
    (ended,) = run(scheduler, failed(second, retryable=True))
    assert isinstance(ended, JobFailed)
    assert ended.reason == "attempt 2 on n: loss is NaN (all 2 attempts used)"


def test_an_attempt_that_was_preempted_counts_for_none() -> None:
    scheduler = Scheduler()
    run(scheduler, beat(), QueueApplied(QueueSpec(queue="q", within_queue="lower")))
    whole: dict[str, Any] = {"queue": "q", "resources": TWO_CPUS, "attempts_max": 2}
    run(scheduler, request("low", **whole))
    high = placed_by(run(scheduler, request("high", priority=1, **whole)))
    second = placed_by(run(scheduler, succeeded(high)))
    third = placed_by(run(scheduler, failed(second, retryable=True)))
    assert (third.job, third.attempt) == ("low", 3)
    (ended,) = run(scheduler, failed(third, retryable=True))
    assert isinstance(ended, JobFailed)


def test_an_error_of_the_users_fails_at_once() -> None:
    scheduler = Scheduler()
    placed = placed_by(run(scheduler, beat(), request(attempts_max=9)))
    (ended,) = run(scheduler, failed(placed, retryable=False))
    assert isinstance(ended, JobFailed)
    assert ended.attempt == 1


def test_a_finished_job_asked_for_again_stays_finished() -> None:
    scheduler = Scheduler()
    placed = placed_by(run(scheduler, beat(), request()))
    run(scheduler, succeeded(placed))
    assert run(scheduler, request()) == []
    assert scheduler.jobs["p", "j"].state == "succeeded"


def test_a_cancellation_may_come_before_the_request() -> None:
    scheduler = Scheduler()
    cancelled = JobCancelled(project="p", job="j", reason="superseded")
    assert run(scheduler, beat(), cancelled, request()) == []
    assert scheduler.jobs["p", "j"].state == "cancelled"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"workers": 0}, "workers"),
        ({"resources": Resources(cpu_milli=-1)}, "resources.cpu_milli"),
        ({"attempts_max": 0}, "attempts_max"),
        ({"queue": "no spaces"}, "queue"),
        ({"spec": {"blob": "x" * SPEC_BYTES_MAX}}, "spec"),
    ],
)
def test_what_can_never_run_fails_and_names_the_field(fields: dict[str, Any], field: str) -> None:
    (ended,) = run(Scheduler(), request(**fields))
    assert isinstance(ended, JobFailed)
    assert ended.reason.startswith(f"{field}: ")
    assert len(msgspec.json.encode(ended)) < 1000


def test_ended_jobs_are_forgotten_oldest_first_and_not_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(domain, "FINISHED_MIN", 3)
    monkeypatch.setattr(domain, "FINISHED_MAX", 5)
    scheduler = Scheduler()

    def known_after(number: int, now: float) -> list[str]:
        scheduler.handle(JobCancelled(project="p", job=f"{number}"), 10_000.0 + now)
        return [job for _, job in scheduler.jobs]

    for number in range(5):
        known = known_after(number, number)
    assert known == ["0", "1", "2", "3", "4"], "too many, but who asks again may mean them"
    assert known_after(5, 5.0) == ["1", "2", "3", "4", "5"], "there is no room for more"
    assert known_after(6, 3.5 + domain.KNOWN_S) == ["4", "5", "6"], "nobody means them any more"


def test_a_name_that_comes_again_is_fenced_from_who_had_it_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both are attempt 1 of their job; only the token tells them apart."""
    monkeypatch.setattr(domain, "FINISHED_MIN", 0)
    scheduler = Scheduler()
    before = placed_by(run(scheduler, beat(), request()))
    run(scheduler, JobCancelled(project="p", job="j"))
    scheduler.handle(Tick(), 2.0 + domain.KNOWN_S)
    assert ("p", "j") not in scheduler.jobs, "it is forgotten"
    again = placed_by(scheduler.handle(request(), 3.0 + domain.KNOWN_S))
    assert (again.attempt, again.node) == (before.attempt, before.node)
    assert scheduler.handle(succeeded(before), 4.0 + domain.KNOWN_S) == []
    assert scheduler.jobs["p", "j"].state == "placed"
    said = scheduler.handle(succeeded(again), 5.0 + domain.KNOWN_S)
    assert [type(event) for event in said] == [JobSucceeded]


def test_a_move_that_no_table_has_raises() -> None:
    scheduler = Scheduler()
    run(scheduler, beat(), request(), JobCancelled(project="p", job="j"))
    job = scheduler.jobs["p", "j"]
    for to in STATES:
        with pytest.raises(Impossible, match=f"cancelled -> {to}"):
            scheduler.move(job, to, Cause())
    with pytest.raises(Impossible, match="Healthy -> Unheard"):
        scheduler.turn(scheduler.nodes["n"], "Unheard", "")
    assert not [move for move in JOB_MOVES if move[0] in TERMINAL]
    assert {*HEALTH} == {state for move in NODE_MOVES for state in move}


def test_silence_counts_only_while_the_scheduler_hears() -> None:
    liveness = Liveness(["a", "b"], now=0.0)
    liveness.heard_itself(DEAF_S)
    liveness.heard_itself(2 * DEAF_S)
    assert liveness.silent(2 * DEAF_S) == []
    assert liveness.silent(SILENT_S + 0.1) == ["a", "b"]
    deaf = SILENT_S + 2 * DEAF_S
    assert liveness.silent(deaf) == [], "the scheduler did not hear itself either"
    liveness.heard_itself(deaf)
    assert liveness.silent(deaf) == [], "silent for two seconds that count"
    liveness.heard("b", deaf)
    liveness.heard_itself(deaf + DEAF_S)
    assert liveness.silent(deaf + DEAF_S) == ["a"]


def test_a_loss_that_is_known_is_not_said_again_until_the_node_was_heard() -> None:
    liveness = Liveness(["a", "b"], now=0.0)
    later = SILENT_S + 1
    liveness.heard_itself(later - DEAF_S)
    liveness.seen = {"a": 0.0, "b": 0.0}
    assert liveness.silent(later) == ["a", "b"]
    liveness.heard("b", later + 0.1)
    liveness.known(["a", "b"], later)
    again = later + SILENT_S + 1
    liveness.ear = again
    assert liveness.silent(again) == ["b"], "heard in between, and silent again"
    liveness.heard("a", again)
    liveness.ear = again + SILENT_S + 1
    assert liveness.silent(liveness.ear) == ["a", "b"]


def test_an_old_token_is_refused_on_the_same_node_too() -> None:
    scheduler = Scheduler()
    old = placed_by(run(scheduler, beat(), request()))
    new = placed_by(run(scheduler, failed(old, retryable=True)))
    assert (new.node, new.token) == (old.node, old.token + 1)
    assert run(scheduler, succeeded(old)) == []
    assert scheduler.jobs["p", "j"].state == "placed"


@pytest.mark.parametrize(("workers", "expected"), [(1, "placed"), (3, "waiting")])
def test_a_gang_that_an_earlier_release_placed_stays_if_it_fits(
    workers: int, expected: str
) -> None:
    """Its snapshot says on which node, not on which GPUs."""
    scheduler = Scheduler()
    run(scheduler, beat(), request(resources=Resources(1000, 1024)), beat("a"), beat("z"))
    state = scheduler.snapshot()
    (job,) = state.jobs
    job.request = msgspec.structs.replace(job.request, workers=workers)
    job.placement = Placement(1, 1, node="n")
    frozen = msgspec.json.encode(state)
    restored = restore(msgspec.json.decode(frozen, type=State))
    restored.validate()
    again = restored.jobs["p", "j"]
    assert again.state == expected
    if again.placement is not None:
        assert [(part.node, len(part.gpus)) for part in again.placement.parts] == [("n", workers)]
