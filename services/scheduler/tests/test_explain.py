"""What is advised places the job next, through the very same scheduler, and less of it does not.

Random worlds: nodes of several sorts, one of them sick, queues that borrow, gangs, parts of GPUs.
"""

import random
import sys
from collections import Counter

import msgspec
import pytest

from libs.contracts.events import AttemptSucceeded, JobCancelled, JobRequested, Resources
from services.scheduler import explain
from services.scheduler.changes import END, NODE, QUOTA, Change, again, stimuli_of
from services.scheduler.domain import Scheduler, State, restore
from services.scheduler.jobs import LIVE, WAITING, Job, Key
from services.scheduler.stimuli import Heartbeat, JobSubmitted, QueueApplied, QueueSpec
from services.scheduler.trial import Trial

NOW = 1000.0
INSTANCES, INSTANCES_LONG = 60, 1000
SHAPES = (
    Resources(1000, 1024),
    Resources(2000, 4096, 300),
    Resources(1000, 1024, 500),
    Resources(4000, 2048, 1000),
    Resources(2000, 8192, 1000, 2),
    Resources(4000, 8192, 1000, 4),
)


def world_of(seed: int) -> Scheduler:
    """More is asked for than there is."""
    dice = random.Random(seed)
    scheduler = Scheduler()
    for n in range(dice.randint(1, 4)):
        gpus = dice.choice([0, 2, 4, 8])
        capacity = Resources(dice.choice([8000, 16000]), 32768, 1000, gpus)
        health = dice.choice(["Healthy"] * 6 + ["Degraded"])
        labels = dice.choice([{}, {"zone": "x"}])
        model = dice.choice("AB") if gpus else ""
        beat = Heartbeat(f"n{n}", "1", ["train"], capacity, [], health, model, labels)
        scheduler.handle(beat, NOW)
    for queue in dice.sample(["left", "right", "alone"], dice.randint(0, 3)):
        scheduler.handle(QueueApplied(spec_of(dice, queue)), NOW)
    for n in range(dice.randint(4, 24)):
        scheduler.handle(JobSubmitted(request_of(dice, f"j{n}")), NOW + n)
    return scheduler


def spec_of(dice: random.Random, queue: str) -> QueueSpec:
    cohort = "" if queue == "alone" else "both"
    nominal = {"gpu_milli": 1000 * dice.randint(0, 8)}
    if dice.random() < 0.4:
        nominal["cpu_milli"] = 1000 * dice.randint(0, 16)
    if dice.random() < 0.3:
        nominal["gpu_milli/A"] = 1000 * dice.randint(0, 4)
    return QueueSpec(
        queue=queue,
        cohort=cohort,
        nominal=nominal,
        borrowing_limit=dice.choice([{}, {"gpu_milli": 1000}]) if cohort else {},
        lending_limit=dice.choice([{}, {"gpu_milli": 1000}]) if cohort else {},
        within_queue=dice.choice(["never", "lower"]),
        reclaim=dice.choice(["never", "any"]),
        order=dice.choice(["priority", "priority", "attained"]),
    )


def request_of(dice: random.Random, name: str) -> JobRequested:
    return JobRequested(
        project="p",
        job=name,
        kind=dice.choice(["train"] * 40 + ["serve"]),
        queue=dice.choice(["left", "right", "alone", "default"]),
        priority=dice.choice([0, 0, 1, 5]),
        workers=dice.choice([1, 1, 1, 2, 3]),
        resources=dice.choice(SHAPES),
        gpu_models=["A"] if dice.random() < 0.15 else [],
        labels={"zone": "x"} if dice.random() < 0.05 else {},
        topology=dice.choice(["node", "any"]),
        duration_s=dice.choice([0, 0, 60, 600]),
        preemptible=dice.random() < 0.8,
    )


def finish(scheduler: Scheduler, job: Job, now: float) -> None:
    """As its nodes would say so; whoever waits is cancelled."""
    project, name = job.key
    if job.placement is None:
        scheduler.handle(JobCancelled(project=project, job=name), now)
        return
    for part in list(job.live.parts):
        attempt, token = job.attempt, job.live.token
        done = AttemptSucceeded(
            project=project, job=name, attempt=attempt, token=token, node=part.node
        )
        scheduler.handle(done, now)


def follow(scheduler: Scheduler, job: Job, changes: list[Change], now: float) -> Job:
    """Does what is advised; -> the job it was for."""
    for change in changes:
        if change.kind == END:
            for key in change.jobs:
                finish(scheduler, scheduler.jobs[key], now)
            continue
        if change.kind == QUOTA:
            spec = scheduler.specs[change.queue]
            nominal = {**spec.nominal}
            nominal[change.resource] += change.by
            more = msgspec.structs.replace(spec, nominal=nominal)
            scheduler.handle(QueueApplied(more), now)
            continue
        for stimulus in list(stimuli_of(scheduler, job, change)):
            scheduler.handle(stimulus, now)
        if change.kind == "priority":
            job = scheduler.jobs[job.key[0], again(job)]
    scheduler.validate()
    return job


def twin(scheduler: Scheduler) -> Scheduler:
    state = msgspec.json.encode(scheduler.snapshot())
    return restore(msgspec.json.decode(state, type=State))


def one_waiting(scheduler: Scheduler, seed: int) -> Key | None:
    waiting = [key for key, job in scheduler.jobs.items() if job.state == WAITING]
    return random.Random(seed).choice(waiting) if waiting else None


def verify(seed: int, counts: Counter[str]) -> None:
    scheduler, now = world_of(seed), NOW + 100
    key = one_waiting(scheduler, seed)
    if key is None:
        return
    about = explain.asked(scheduler, key)
    told = explain.why(about, now)
    counts["jobs"] += 1
    counts[f"bound by {told.constraint}"] += 1
    assert told.advices, (seed, told)
    for advice in told.advices:
        tried = twin(scheduler)
        job = follow(tried, tried.jobs[key], advice.changes, now)
        assert job.state in LIVE, (seed, advice.says)
        counts["advices"] += 1
        counts["+".join(sorted({change.kind for change in advice.changes}))] += 1
        check_smallest(Trial(about.state, key, now), advice.changes, seed)


def check_smallest(trial: Trial, changes: list[Change], seed: int) -> None:
    """One less of a quota, one job less, or one change less would not do."""
    for i, change in enumerate(changes):
        for less in smaller(change):
            rest = [*changes[:i], *less, *changes[i + 1 :]]
            assert not trial.places(rest), (seed, changes, rest)


def smaller(change: Change) -> list[list[Change]]:
    found: list[list[Change]] = [[]]
    if change.kind == QUOTA:
        found.append([msgspec.structs.replace(change, by=change.by - 1)])
    if change.kind == END and len(change.jobs) > 1:
        for key in change.jobs:
            rest = tuple(one for one in change.jobs if one != key)
            found.append([msgspec.structs.replace(change, jobs=rest)])
    if change.kind == NODE and change.machine is not None and change.machine.gpus:
        machine = msgspec.structs.replace(change.machine, gpus=change.machine.gpus - 1)
        found.append([msgspec.structs.replace(change, machine=machine)])
    return found


def verify_all(instances: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in range(instances):
        verify(seed, counts)
    sys.stdout.write(f"\n{dict(sorted(counts.items()))}\n")
    return counts


def test_what_is_advised_places_the_job_and_less_does_not() -> None:
    assert verify_all(INSTANCES)["jobs"] > INSTANCES // 2


@pytest.mark.long
def test_what_is_advised_places_the_job_in_a_thousand_worlds() -> None:
    assert verify_all(INSTANCES_LONG)["jobs"] > INSTANCES_LONG // 2
