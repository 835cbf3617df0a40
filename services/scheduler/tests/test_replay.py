"""A trace goes through the scheduler itself, twice alike; a bad one says where it is bad."""

import csv
import itertools
import random
from pathlib import Path

import pytest

from libs.contracts.events import JobRequested
from services.scheduler import philly, replay, traces
from services.scheduler.ledger import Ledger
from services.scheduler.levels import WAIT_MAX_S
from services.scheduler.shapes import Machine
from services.scheduler.simulator import Course, Simulator, Stretch, Work
from services.scheduler.stimuli import Stimulus
from services.scheduler.traces import BadTrace, TraceJob

HEADER = "timestamp,duration,num_gpus,gpu_time,cluster\n"
DAY_S = 86_400


class Watched(Simulator):
    """With the ledger, at every stimulus."""

    def __init__(self, machines: list[Machine], before: list[Stimulus]) -> None:
        self.ledger = Ledger()
        super().__init__(machines, before)

    def tell(self, stimulus: Stimulus) -> None:
        said = self.scheduler.handle(stimulus, self.now)
        self.ledger.enter(stimulus, said, self.now)
        for event in said:
            self.hear(event)


def overload(seed: int, count: int = 80, nodes: int = 3) -> list[TraceJob]:
    """About 1.5 times of what the nodes can do, for half a day."""
    draw = random.Random(seed)
    sizes = [draw.choice((1, 1, 1, 1, 2, 4, 8, 16)) for _ in range(count)]
    durations = [draw.expovariate(1 / draw.choice((60, 3_000, 12_000))) for _ in range(count)]
    wanted = sum(size * duration for size, duration in zip(sizes, durations, strict=True))
    span = wanted / (nodes * 8) / 1.5
    arrivals = sorted(draw.uniform(0, span) for _ in range(count))
    named = zip(itertools.count(1), arrivals, durations, sizes, strict=False)
    return [TraceJob(f"job-{i}", at, d, g, draw.choice("ab")) for i, at, d, g in named]


def simulate(jobs: list[TraceJob], shares: dict[str, int] | None = None) -> list[Course]:
    before = philly.shared_queue() if shares is None else philly.vc_queues(shares, 24)
    world = Watched(philly.cluster(3), [*before])
    return world.run(philly.works_of(jobs, by_vc=shares is not None))


@pytest.mark.parametrize("shares", [None, {"a": 2, "b": 1}])
def test_an_overload_ends_and_keeps_every_rule(shares: dict[str, int] | None) -> None:
    jobs = overload(seed=3)
    courses = simulate(jobs, shares)
    assert [course.work.request.job for course in courses] == [job.name for job in jobs]
    assert sum(course.preemptions for course in courses) > 0
    for course, job in zip(courses, jobs, strict=True):
        assert course.left_s == pytest.approx(0, abs=1e-3)
        assert course.first_wait_s >= 0
        resumed = sum(min(one.end_s - one.start_s, one.resume_s) for one in course.stretches)
        assert course.delay_s == pytest.approx(course.wait_s + resumed, abs=1e-3)
        ran = sum(one.end_s - one.start_s for one in course.stretches)
        assert ran == pytest.approx(job.duration_s + resumed, abs=1e-3)
        for before, after in itertools.pairwise(course.stretches):
            assert before.end_s <= after.start_s


def test_the_same_trace_gives_the_same_decisions(tmp_path: Path) -> None:
    for name in ("one", "two"):
        replay.write(tmp_path / name, simulate(overload(seed=5)))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_durations_that_are_not_known_decide_nothing() -> None:
    """Two traces that differ only in what has not happened yet are decided alike until then."""
    jobs = overload(seed=7)
    cut = jobs[50].at_s
    longer = [
        TraceJob(job.name, job.at_s, job.duration_s + 5_000 * (job.at_s > cut), job.gpus, job.vc)
        for job in jobs
    ]
    first, second = simulate(jobs), simulate(longer)

    def until_then(courses: list[Course]) -> list[tuple[float, list[str]]]:
        stretches = [one for course in courses for one in course.stretches]
        return sorted((one.start_s, one.nodes) for one in stretches if one.start_s <= cut)

    assert until_then(first) == until_then(second)


def test_whoever_waits_too_long_goes_before_everybody() -> None:
    """A node that is always wanted by who is new, and one job that has long been served."""
    jobs = [TraceJob("old", 0.0, 10 * DAY_S, 8, "a")]
    jobs += [TraceJob(f"new-{i}", 65 * 3_600 / 8 + i * 12_000, 12_001, 8, "a") for i in range(20)]
    world = Simulator(philly.cluster(1), philly.shared_queue())
    courses = {course.work.request.job: course for course in world.run(philly.works_of(jobs))}
    assert courses["old"].preemptions > 0
    assert WAIT_MAX_S <= courses["old"].wait_s < WAIT_MAX_S + 12_001


def test_quotas_are_whole_nodes_in_proportion() -> None:
    assert philly.apportioned({"a": 64, "b": 32, "c": 8}, 13) == {"a": 8, "b": 4, "c": 1}
    assert philly.apportioned({"a": 1, "b": 1, "c": 1}, 8) == {"a": 3, "b": 3, "c": 2}


@pytest.mark.parametrize(
    ("gpus", "workers", "each", "sizes"),
    [
        (1, 1, 1, philly.SIZES),
        (8, 1, 8, philly.SIZES),
        (16, 2, 8, philly.SIZES),
        (12, 2, 6, philly.SIZES),
        (13, 13, 1, philly.SIZES),
        (12, 3, 4, {8: 1, 4: 1}),
        (16, 4, 4, {8: 1, 4: 9}),
    ],
)
def test_a_gang_is_split_into_workers_as_large_as_the_cluster_has_room_for(
    gpus: int, workers: int, each: int, sizes: philly.Sizes
) -> None:
    request = philly.request_of(TraceJob("j", 0, 1, gpus, "a"), False, "q", sizes)
    assert (request.workers, request.resources.gpus) == (workers, each)
    assert request.topology == ("node" if gpus <= 8 else "any")


def test_wait_is_what_it_was_not_placed() -> None:
    work = Work(100.0, JobRequested(project="p", job="j", kind="train"), 50.0)
    stretches = [
        Stretch(1, 1, ["a"], [[[0]]], 110.0, 0.0, 140.0),
        Stretch(2, 5, ["a"], [[[0]]], 200.0, 7.0, 227.0),
    ]
    course = Course(work, 0.0, stretches)
    assert (course.first_wait_s, course.wait_s, course.delay_s) == (10.0, 70.0, 77.0)


def test_the_door_writes_a_line_an_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs, nodes, out = tmp_path / "jobs.csv", tmp_path / "nodes.csv", tmp_path / "out.csv"
    rows = "2017-10-01 00:00:10,60,8,480,a\n2017-10-01 00:00:20,30.5,1,30.5,b\n"
    jobs.write_text(HEADER + rows)
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\nn1,64000,262144,8,V100M16\n")
    replay.main(["--jobs", str(jobs), "--nodes", str(nodes), "--out", str(out)])
    assert '"mean_wait_s": 25.0' in capsys.readouterr().out
    with out.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(one["job"], one["started_s"], one["stopped_s"]) for one in lines] == [
        ("job-1", "10.000", "70.000"),
        ("job-2", "70.000", "100.500"),
    ]
    assert lines[0]["gpus"] == "0 1 2 3 4 5 6 7"
    assert {one["outcome"] for one in lines} == {"done"}


def problem(tmp_path: Path, text: str) -> str:
    path = tmp_path / "jobs.csv"
    path.write_text(text)
    with pytest.raises(BadTrace) as caught:
        traces.jobs_of(path)
    return str(caught.value).removeprefix(f"{path}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ", line 1: no column 'timestamp'"),
        ("timestamp,duration\n", ", line 1: no column 'num_gpus'; expected timestamp, "),
        (HEADER, ": no jobs"),
        (HEADER + "soon,1,1,1,a\n", ", line 2, column 'timestamp': a time such as"),
        (HEADER + "2017-10-01,nan,1,1,a\n", ", line 2, column 'duration': a number from 0"),
        (HEADER + "2017-10-01,1,1,1,a\n2017-10-01,1,0,1,a\n", ", line 3, column 'num_gpus'"),
        (HEADER + "2017-10-01,1,1.5,1,a\n", "column 'num_gpus': an integer from 1 to"),
        (HEADER + "2017-10-01,1,1,1\n", "column 'cluster': a name, got ''"),
    ],
)
def test_a_bad_trace_says_where(tmp_path: Path, text: str, said: str) -> None:
    assert said in problem(tmp_path, text)


def test_a_job_larger_than_the_cluster_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = tmp_path / "jobs.csv"
    jobs.write_text(HEADER + "2017-10-01,1,648,1,a\n")
    with pytest.raises(SystemExit) as caught:
        replay.main(["--jobs", str(jobs), "--out", str(tmp_path / "out.csv")])
    assert caught.value.code == 2
    assert "job-1: needs 648 GPUs, the cluster has 640" in capsys.readouterr().err
