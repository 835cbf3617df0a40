"""Several agents are one node, each for what it runs: one that is gone takes that with it and no
more, and who begins to listen takes nobody for gone."""

from collections.abc import Iterable

import msgspec

from libs.contracts.events import JobRequested, Resources
from services.scheduler.domain import Scheduler
from services.scheduler.nodes import SILENT_S
from services.scheduler.stimuli import Heartbeat, JobSubmitted, Running
from services.scheduler.voices import Voices

BEAT_S = 0.5
LONG_S = SILENT_S + 2 * BEAT_S
"""Whoever lives has spoken within it, and who has not is gone."""
SERVES = Heartbeat("box", "s1", ["serve"], Resources(4000, 1024), labels={"node": "box"}, agent="s")
TRAINS = Heartbeat("box", "t1", ["train"], Resources(2000, 4096, 1000, 2), [], agent="t")
Each = Iterable[Heartbeat]


class Ear:
    """Hears each of some speak twice a second, and itself."""

    def __init__(self) -> None:
        self.now = 0.0
        self.voices = Voices(self.now)

    def listen(self, each: Each, seconds: float) -> list[Heartbeat]:
        """What their nodes say; those that lost somebody as well."""
        told: list[Heartbeat] = []
        until = self.now + seconds
        while self.now < until:
            self.now += BEAT_S
            self.voices.heard_itself(self.now)
            for one in each:
                self.voices.heard(one, self.now)
                if whole := self.voices.whole(one, self.now):
                    told.append(whole)
            told += self.voices.bereft(self.now)
        return told


def running(heartbeat: Heartbeat, *jobs: str) -> Heartbeat:
    runs = [Running("default", job, 1, number) for number, job in enumerate(jobs, 1)]
    return msgspec.structs.replace(heartbeat, running=runs)


def both() -> Heartbeat:
    return Ear().listen((TRAINS, SERVES), LONG_S)[-1]


def test_a_node_is_what_its_agents_are_together() -> None:
    ear = Ear()
    serves, trains = running(SERVES, "serving"), running(TRAINS, "serving", "training")
    told = ear.listen((trains, serves), LONG_S)
    assert all(one == told[0] for one in told)
    assert told[0] == Heartbeat(
        node="box",
        incarnation="s=s1 t=t1",
        kinds=["serve", "train"],
        capacity=Resources(4000, 4096, 1000, 2),
        running=[Running("default", "serving", 1, 1), Running("default", "training", 1, 2)],
        labels={"node": "box"},
    )


def test_who_is_alone_is_heard_at_once_and_as_it_is() -> None:
    alone = msgspec.structs.replace(SERVES, agent="")
    assert Ear().listen([alone], BEAT_S) == [alone]


def test_nothing_is_said_of_a_node_before_all_had_the_time_to_speak() -> None:
    ear = Ear()
    assert ear.listen([SERVES], SILENT_S) == []
    assert both() in ear.listen((SERVES, TRAINS), 2 * BEAT_S)


def test_what_was_missed_while_nobody_listened_is_not_silence() -> None:
    """Neither of an agent that was heard before, nor of one that was not yet."""
    ear = Ear()
    ear.listen((SERVES, TRAINS), LONG_S)
    ear.now += 10 * SILENT_S
    assert ear.voices.whole(SERVES, ear.now) is None
    assert ear.listen([SERVES], BEAT_S) == [both()]
    late = Ear()
    late.listen([SERVES], BEAT_S)
    late.now += 10 * SILENT_S
    assert late.listen([SERVES], SILENT_S - BEAT_S) == []


def test_who_is_not_ready_takes_no_work_and_keeps_what_it_has() -> None:
    warming = msgspec.structs.replace(running(TRAINS, "training"), health="Initializing")
    told = Ear().listen((SERVES, warming), LONG_S)[-1]
    assert (told.kinds, told.health) == (["serve"], "Healthy")
    assert [one.job for one in told.running] == ["training"]
    alone = Ear().listen([warming], LONG_S)[-1]
    assert (alone.kinds, alone.health) == (["train"], "Initializing")


def test_an_agent_that_was_all_of_the_node_is_one_of_them_from_then_on() -> None:
    """As while a process that knows of no others is replaced."""
    ear, before = Ear(), msgspec.structs.replace(SERVES, agent="")
    ear.listen([before], BEAT_S)
    told = ear.listen((TRAINS, before), 2 * SILENT_S)
    assert {tuple(one.kinds) for one in told} == {("serve", "train")}


def placed(scheduler: Scheduler, job: str, kind: str) -> Running:
    request = JobRequested(project="default", job=job, kind=kind, resources=Resources(500, 256))
    scheduler.handle(JobSubmitted(request), 1.0)
    live = scheduler.jobs["default", job].live
    return Running("default", job, live.attempt, live.token)


def test_an_agent_that_is_gone_takes_what_it_ran_with_it_and_no_more() -> None:
    ear, scheduler = Ear(), Scheduler()
    for told in ear.listen((SERVES, TRAINS), LONG_S):
        scheduler.handle(told, 1.0)
    serves = msgspec.structs.replace(SERVES, running=[placed(scheduler, "serving", "serve")])
    trains = msgspec.structs.replace(TRAINS, running=[placed(scheduler, "training", "train")])
    for told in ear.listen((serves, trains), BEAT_S):
        scheduler.handle(told, 2.0)
    assert states(scheduler) == {"serving": "placed", "training": "placed"}
    for told in ear.listen([serves], LONG_S):
        scheduler.handle(told, 3.0)
    assert states(scheduler) == {"serving": "placed", "training": "waiting"}
    assert scheduler.nodes["box"].kinds == ["serve"]
    again = msgspec.structs.replace(TRAINS, incarnation="t2")
    for told in ear.listen((serves, again), BEAT_S):
        scheduler.handle(told, 4.0)
    assert states(scheduler) == {"serving": "placed", "training": "placed"}
    scheduler.validate()


def states(scheduler: Scheduler) -> dict[str, str]:
    return {job.request.job: job.state for job in scheduler.jobs.values()}


def test_a_node_all_of_whose_agents_are_gone_is_begun_anew() -> None:
    ear = Ear()
    ear.listen((SERVES, TRAINS), LONG_S)
    assert ear.listen([], 2 * SILENT_S) == []
    assert ear.listen([SERVES], SILENT_S) == []
