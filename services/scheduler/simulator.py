"""The scheduler under a virtual clock: the very same state machine, a world that answers at once.

Agents start what they are told in no time and report its end when its work is done. An attempt that
is stopped keeps the work it did; the next one first spends what it takes to resume. Ticks come
when the scheduler wants to look again (`due_at`), as its leader sends them. Nothing sleeps and
nothing is random: the same jobs give the same decisions.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count

import msgspec

from libs.contracts.events import (
    AttemptPlaced,
    AttemptStarted,
    AttemptStopped,
    AttemptSucceeded,
    Event,
    JobRequested,
    Resources,
)
from services.scheduler.domain import Scheduler
from services.scheduler.shapes import GPU_MILLI, Machine
from services.scheduler.stimuli import Heartbeat, JobSubmitted, Running, Stimulus, Tick

PROJECT = "trace"
KIND = "train"


class Work(msgspec.Struct, frozen=True):
    """What the scheduler is asked, and what only the world knows."""

    at_s: float
    request: JobRequested
    duration_s: float
    """Of the work itself, undisturbed."""
    resume_s: float = 0.0
    """What every attempt but the first spends before it goes on."""


class Stretch(msgspec.Struct):
    """One attempt."""

    attempt: int
    token: int
    nodes: list[str]
    gpus: list[list[list[int]]]
    """Of each node, of each worker."""
    start_s: float
    resume_s: float
    end_s: float = 0.0


class Course(msgspec.Struct):
    """What became of one job."""

    work: Work
    left_s: float
    """Work to do."""
    stretches: list[Stretch] = []

    @property
    def ended_s(self) -> float:
        return self.stretches[-1].end_s

    @property
    def first_wait_s(self) -> float:
        """From its submission until it first ran."""
        return self.stretches[0].start_s - self.work.at_s

    @property
    def wait_s(self) -> float:
        """All the time it was not placed, between and before its attempts."""
        return (
            self.ended_s - self.work.at_s - sum(one.end_s - one.start_s for one in self.stretches)
        )

    @property
    def delay_s(self) -> float:
        """What it was later than alone on an idle cluster: waits and resumptions."""
        return self.ended_s - self.work.at_s - self.work.duration_s

    @property
    def preemptions(self) -> int:
        return len(self.stretches) - 1


class Simulator:
    """Runs one list of work to its end."""

    def __init__(self, machines: Iterable[Machine], before: Iterable[Stimulus] = ()) -> None:
        self.scheduler = Scheduler()
        self.now = 0.0
        self.courses: dict[str, Course] = {}
        self.agenda: list[tuple[float, int, Callable[[], None]]] = []
        self.serial = count()
        self.machines = {machine.node: machine for machine in machines}
        self.to_clear: set[str] = set()
        """Nodes that stopped something and have not said so."""
        self.running: dict[str, dict[int, Running]] = {node: {} for node in self.machines}
        self.stimuli = 0
        for stimulus in before:
            self.tell(stimulus)
        for node in self.machines:
            self.tell(self.heartbeat(node))

    def run(self, works: Iterable[Work]) -> list[Course]:
        for work in works:
            self.at(work.at_s, partial(self.submit, work))
        while self.agenda:
            due = max(self.now, self.scheduler.due_at)
            if due < self.agenda[0][0]:
                self.now = due
                self.look()
                continue
            self.now, _, act = heapq.heappop(self.agenda)
            act()
        return list(self.courses.values())

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.agenda, (when, next(self.serial), act))

    def submit(self, work: Work) -> None:
        self.courses[work.request.job] = Course(work, work.duration_s)
        self.tell(JobSubmitted(work.request))

    def look(self) -> None:
        for node in sorted(self.to_clear):
            self.tell(self.heartbeat(node))
        self.to_clear.clear()
        self.tell(Tick(look=True))

    def tell(self, stimulus: Stimulus) -> None:
        self.stimuli += 1
        for event in self.scheduler.handle(stimulus, self.now):
            self.hear(event)

    def hear(self, event: Event) -> None:
        """Agents do as they are told, in the order they are told."""
        if isinstance(event, AttemptPlaced):
            self.start(event)
        elif isinstance(event, AttemptStopped):
            self.stop(event)

    def start(self, placed: AttemptPlaced) -> None:
        """One share of a gang; the last of them starts it."""
        course = self.courses[placed.job]
        stretches = course.stretches
        if not stretches or stretches[-1].token != placed.token:
            resume_s = course.work.resume_s if stretches else 0.0
            stretches.append(Stretch(placed.attempt, placed.token, [], [], self.now, resume_s))
        stretch = stretches[-1]
        stretch.nodes.append(placed.node)
        stretch.gpus.append(placed.gpus)
        running = Running(placed.project, placed.job, placed.attempt, placed.token)
        self.running[placed.node][placed.token] = running
        if len(stretch.nodes) == len(placed.gang):
            self.at(self.now, lambda: self.report(stretch, placed, AttemptStarted))
            end = self.now + stretch.resume_s + course.left_s
            self.at(end, lambda: self.finish(stretch, placed))

    def report(
        self,
        stretch: Stretch,
        placed: AttemptPlaced,
        what: type[AttemptStarted] | type[AttemptSucceeded],
    ) -> None:
        if stretch.end_s and what is AttemptStarted:
            return
        for node in stretch.nodes:
            told = what(
                project=placed.project,
                job=placed.job,
                attempt=placed.attempt,
                token=placed.token,
                node=node,
            )
            self.tell(told)

    def finish(self, stretch: Stretch, placed: AttemptPlaced) -> None:
        if self.running[placed.node].get(placed.token) is None:
            return
        self.end(placed.job, stretch)
        self.report(stretch, placed, AttemptSucceeded)

    def stop(self, stopped: AttemptStopped) -> None:
        if stopped.token in self.running[stopped.node]:
            self.end(stopped.job, self.courses[stopped.job].stretches[-1])
        self.to_clear.add(stopped.node)

    def end(self, job: str, stretch: Stretch) -> None:
        """Everywhere; the work that was done is kept."""
        for node in stretch.nodes:
            del self.running[node][stretch.token]
        stretch.end_s = self.now
        worked = self.now - stretch.start_s - stretch.resume_s
        self.courses[job].left_s -= max(0.0, worked)

    def heartbeat(self, node: str) -> Heartbeat:
        return heartbeat_of(self.machines[node], self.running[node].values())


def heartbeat_of(machine: Machine, running: Iterable[Running] = ()) -> Heartbeat:
    """What a node like that says of itself."""
    capacity = Resources(
        cpu_milli=machine.cpu_milli,
        memory_mib=machine.memory_mib,
        gpu_milli=GPU_MILLI if machine.gpus else 0,
        gpus=max(1, machine.gpus),
    )
    return Heartbeat(
        machine.node,
        1,
        list(machine.kinds or (KIND,)),
        capacity,
        list(running),
        gpu_model=machine.gpu_model,
        labels=dict(machine.labels),
    )


def unfinished(courses: Iterable[Course]) -> Iterator[str]:
    """Jobs that never ran, or not to their end: none fits on an empty cluster."""
    for course in courses:
        if not course.stretches or course.left_s > 1e-3:
            yield course.work.request.job
