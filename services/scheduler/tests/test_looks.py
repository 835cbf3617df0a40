"""A cluster on which nothing happens is looked at when somebody's turn has come, and only then."""

from libs.contracts.events import JobRequested, Resources
from services.scheduler.levels import LEVELS_GPU_S, WAIT_MAX_S
from services.scheduler.philly import cluster, shared_queue
from services.scheduler.simulator import Simulator, Work
from services.scheduler.stimuli import Stimulus, Tick

LOOKED_S = 10.0


class Watched(Simulator):
    def __init__(self) -> None:
        self.looks: list[float] = []
        super().__init__(cluster(1), shared_queue())

    def tell(self, stimulus: Stimulus) -> None:
        if isinstance(stimulus, Tick):
            self.looks.append(self.now)
        super().tell(stimulus)


def work(job: str, at_s: float, duration_s: float) -> Work:
    resources = Resources(cpu_milli=1, memory_mib=1, gpu_milli=1000, gpus=8)
    request = JobRequested(
        project="trace", job=job, kind="train", queue="shared", resources=resources
    )
    return Work(at_s, request, duration_s)


def test_it_is_looked_at_when_a_job_sinks() -> None:
    """Whoever waits is then placed instead, at its first level, and looked at for in 10 s."""
    world = Watched()
    courses = world.run([work("old", 1.0, 1000.0), work("new", 2.0, 100.0)])
    sinks_at = 1.0 + LEVELS_GPU_S[0] / 8
    assert world.looks[:2] == [LOOKED_S, sinks_at + 1]
    assert courses[1].first_wait_s == sinks_at + 1 - 2.0
    assert len(world.looks) < 10


def test_it_is_looked_at_when_a_job_is_overdue() -> None:
    """Both have sunk to the last level, so only the wait that is too long changes anything."""
    long_s = LEVELS_GPU_S[-1] / 8 + 3 * WAIT_MAX_S
    world = Watched()
    courses = world.run([work("one", 1.0, long_s), work("two", 2.0, long_s)])
    gone = min(courses, key=lambda course: course.ended_s)
    assert WAIT_MAX_S <= gone.wait_s < WAIT_MAX_S + 2 * LOOKED_S
    assert len(world.looks) < 60
