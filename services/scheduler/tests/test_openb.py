"""Proves that openb's files are read strictly, that pods are placed in the order of the file, only
where they fit and whenever they fit anywhere, that it is the service's state machine that places
them, that learned prices pack more than best fit, and that names, units and the order in which
nodes come decide nothing."""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from msgspec.structs import replace

from services.scheduler.openb import Pod, Replay, pods_of, replay, write
from services.scheduler.scores import Prices
from services.scheduler.shapes import Free, Machine, Shape, Spot, admits, capacity, room
from services.scheduler.simulator import PROJECT, heartbeat_of
from services.scheduler.traces import BadTrace, machines_of

Sized = TypeVar("Sized", Machine, Shape)
HEAD = "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos"
MACHINES = [
    *(Machine(f"g{i}", 96_000, 393_216, 8, "G2") for i in range(4)),
    *(Machine(f"t{i}", 104_000, 524_288, 2, "T4") for i in range(4)),
    Machine("cpu", 32_000, 131_072),
]
SHAPES = [
    Shape(3_152, 5_600, 1, 810),
    Shape(11_300, 49_152, 1, 1000),
    Shape(11_908, 47_104, 1, 470),
    Shape(4_000, 16_000, 1, 320, ("T4",)),
    Shape(60_200, 262_144, 4, 1000, ("G2", "T4")),
    Shape(12_500, 57_344),
]


def pods_file(folder: Path, *lines: str, head: str = HEAD) -> Path:
    path = folder / "pods.csv"
    path.write_text("\n".join((head, *lines)) + "\n")
    return path


def test_pods_are_read_with_or_without_what_is_not_needed(tmp_path: Path) -> None:
    path = pods_file(
        tmp_path, "a,1000,2048,1,470,T4|G2|T4,LS", "b,500,64,0,0,,BE", "c,1,2,4,1000,,LS"
    )
    assert pods_of(path) == [
        Pod("a", Shape(1000, 2048, 1, 470, ("G2", "T4"))),
        Pod("b", Shape(500, 64)),
        Pod("c", Shape(1, 2, 4, 1000)),
    ]
    path = pods_file(
        tmp_path, "a,1000,2048,1,470", head="name,cpu_milli,memory_mib,num_gpu,gpu_milli"
    )
    assert pods_of(path) == [Pod("a", Shape(1000, 2048, 1, 470))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a,1,1,1,1001,,", "line 2, column 'gpu_milli': an integer from 1 to 1000, got '1001'"),
        ("a,1,1,1,0,,", "line 2, column 'gpu_milli': an integer from 1 to 1000, got '0'"),
        ("a,1,1,2,500,,", "line 2, column 'gpu_milli': 1000 where num_gpu is more than 1, got 500"),
        ("a,x,1,1,1,,", "line 2, column 'cpu_milli': an integer from 0 to"),
        (",1,1,1,1,,", "line 2, column 'name'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(BadTrace, match=r"pods\.csv") as caught:
        pods_of(pods_file(tmp_path, line))
    assert said in str(caught.value)


def stream(seed: int, count: int) -> list[Pod]:
    drawn = random.Random(seed).choices(SHAPES, (30, 30, 20, 10, 2, 8), k=count)
    return [Pod(f"pod-{i}", shape) for i, shape in enumerate(drawn)]


def fits_somewhere(free: dict[str, Free], shape: Shape) -> bool:
    return any(admits(one, shape) and room(free[one.node], shape) for one in MACHINES)


def less(free: Free, shape: Shape, spot: Spot) -> Free:
    left = [milli - shape.gpu_milli * (i in spot.gpus) for i, milli in enumerate(free.gpus)]
    cpu_milli, memory_mib = free.cpu_milli - shape.cpu_milli, free.memory_mib - shape.memory_mib
    assert min(cpu_milli, memory_mib, *left, 0) == 0, (shape, spot, free)
    return Free(cpu_milli, memory_mib, tuple(left))


@pytest.mark.parametrize("seed", range(3))
def test_a_pod_is_placed_if_and_only_if_it_fits(seed: int) -> None:
    """By a ledger of its own and every node."""
    pods = stream(seed, 120)
    free = {machine.node: capacity(machine) for machine in MACHINES}
    machines = {machine.node: machine for machine in MACHINES}
    for pod, (name, spot) in zip(pods, replay(MACHINES, pods), strict=True):
        assert name == pod.name
        assert (spot is not None) == fits_somewhere(free, pod.shape)
        if spot is not None:
            assert len(set(spot.gpus)) == pod.shape.gpus
            assert admits(machines[spot.node], pod.shape)
            free[spot.node] = less(free[spot.node], pod.shape, spot)
    assert not fits_somewhere(free, SHAPES[1])


def test_what_is_decided_for_a_pod_does_not_depend_on_those_after_it() -> None:
    pods = stream(7, 80)
    assert replay(MACHINES, pods[:50]) == replay(MACHINES, pods)[:50]


def allocated(policy: str, seed: int, plans: bool = False) -> int:
    run = Replay(MACHINES, policy)
    run.plans = plans
    placed = (pod.shape for pod in stream(seed, 120) if run.place(pod.shape) is not None)
    return sum(shape.gpus * shape.gpu_milli for shape in placed)


def test_learning_from_arrivals_packs_more_than_knowing_nothing_and_than_best_fit() -> None:
    learned = sum(allocated("priced", seed, plans=True) for seed in range(40))
    assert learned > sum(allocated("priced", seed) for seed in range(40))
    assert learned > sum(allocated("best_fit", seed) for seed in range(40))


def renamed(machine: Machine) -> Machine:
    return replace(machine, node=f"a-{machine.node}")


def in_other_units(one: Sized) -> Sized:
    return replace(one, cpu_milli=4 * one.cpu_milli, memory_mib=8 * one.memory_mib)


def places(
    seed: int,
    machine: Callable[[Machine], Machine] = lambda one: one,
    shape: Callable[[Shape], Shape] = lambda one: one,
) -> list[tuple[int, tuple[int, ...]] | None]:
    """Nodes by their place in the order of names; they join in any order."""
    machines = [machine(one) for one in MACHINES]
    order = sorted(one.node for one in machines)
    run = Replay(())
    for one in random.Random(seed).sample(machines, len(machines)):
        run.tell(heartbeat_of(one))
    spots = [run.place(shape(pod.shape)) for pod in stream(seed, 120)]
    assert run.scheduler.prices != Prices()
    return [(order.index(spot.node), spot.gpus) if spot else None for spot in spots]


@pytest.mark.parametrize("seed", range(4))
def test_names_and_units_and_who_joins_first_decide_nothing(seed: int) -> None:
    """Through the scheduler, which learns its plans meanwhile."""
    as_they_are = places(seed)
    run = Replay(MACHINES)
    order = sorted(one.node for one in MACHINES)
    spots = [run.place(pod.shape) for pod in stream(seed, 120)]
    assert as_they_are == [(order.index(spot.node), spot.gpus) if spot else None for spot in spots]
    assert places(seed, renamed) == as_they_are
    assert places(seed, in_other_units, in_other_units) == as_they_are


def test_what_places_them_is_the_scheduler_and_its_log() -> None:
    """Every pod runs or is cancelled, plans came at their times, and the books are right."""
    run, pods = Replay(MACHINES), stream(1, 120)
    spots = [run.place(pod.shape) for pod in pods]
    run.scheduler.validate()
    jobs = [run.scheduler.jobs[PROJECT, f"pod-{i}"] for i in range(1, len(pods) + 1)]
    assert [job.state for job in jobs] == ["running" if spot else "cancelled" for spot in spots]
    assert [job.live.parts[0].spots[0] for job in jobs if job.placement] == [
        spot for spot in spots if spot
    ]
    assert {"running", "cancelled"} <= {job.state for job in jobs}
    assert run.scheduler.prices != Prices()
    assert run.scheduler.typical.due_at == 128, "after 16, 32 and 64 arrivals"


def test_decisions_are_written_in_order_and_empty_where_none_fits(tmp_path: Path) -> None:
    path = tmp_path / "decisions.csv"
    write(path, [("a", Spot("n", (0, 3))), ("b", None), ("c", Spot("m"))])
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["name", "node", "gpus"],
            ["a", "n", "0|3"],
            ["b", "", ""],
            ["c", "m", ""],
        ]


def test_nodes_and_pods_are_of_the_same_columns_as_openb(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes.csv"
    nodes.write_text("sn,cpu_milli,memory_mib,gpu,model\nn0,64000,262144,2,P100\n")
    pods = pods_file(tmp_path, "a,1,1,1,600,P100,", "b,1,1,2,1000,,", "c,1,1,1,600,T4,")
    places = replay(machines_of(nodes), pods_of(pods))
    assert [(name, spot and spot.node) for name, spot in places] == [
        ("a", "n0"),
        ("b", None),
        ("c", None),
    ]
