"""What a heartbeat says of a model is what there was to do for it, by arithmetic done by hand."""

import asyncio
import threading
from time import monotonic_ns

import pytest

from services.inference import native
from services.inference.front import LATENCY_BOUNDS_NS
from services.inference.loads import WINDOW_NS, Load, Loads, p95_ms, together
from services.inference.served import Served
from services.inference.tests.desk import Own, double, opened, request, row
from services.inference.tests.test_busdoor import gated
from stack.testing import eventually

KEY = ("default", "double")
S = 1_000_000_000


def buckets(**counts: int) -> list[int]:
    """`ms5=3`: three in the bucket up to 5 ms."""
    found = [0] * (len(LATENCY_BOUNDS_NS) + 1)
    for name, count in counts.items():
        found[LATENCY_BOUNDS_NS.index(int(name[2:]) * 1_000_000)] = count
    return found


@pytest.mark.parametrize(
    ("latency", "expected"),
    [
        ([0] * (len(LATENCY_BOUNDS_NS) + 1), 0),
        (buckets(ms1=1), 1),
        (buckets(ms50=100), 48),
        (buckets(ms10=95, ms100=5), 10),
        (buckets(ms10=90, ms100=10), 75),
        ([0] * len(LATENCY_BOUNDS_NS) + [1], 9750),
    ],
)
def test_the_slowest_twentieth(latency: list[int], expected: int) -> None:
    assert p95_ms(latency) == expected


async def test_who_waits_and_who_was_answered_is_told_once() -> None:
    release = threading.Event()
    async with opened() as desk:
        await desk.serve("double", gated(release))
        served = desk.endpoints.served("double", "")
        loads = Loads(desk.endpoints, monotonic_ns())
        asking = [asyncio.create_task(ask(desk.stub)) for _ in range(64)]
        await eventually(lambda: served.counts().waiting > 30)
        (load,) = loads.look({}, loads.looked_ns + S)
        assert (load.project, load.model, load.requests, load.ready) == (*KEY, 0, True)
        assert 30_000 < load.concurrency_milli <= 64_000
        release.set()
        await asyncio.gather(*asking)
        spent_ns = served.counts().success_ns
        (load,) = loads.look({}, loads.looked_ns + S)
        assert load.requests == 64
        assert load.concurrency_milli == spent_ns * 1000 // S
        assert load.p95_ms >= 1
        assert loads.look({}, loads.looked_ns + S) == [Load(*KEY, 0)]


@pytest.mark.parametrize("kind", ["native", "python"])
async def test_what_runs_is_there_though_nobody_waits_and_nothing_was_answered(kind: str) -> None:
    """A request that takes longer than a model may be idle would lose it its replica."""
    if kind == "native" and not native.available():
        pytest.skip("leptonic_native is not built: make native")
    release = threading.Event()
    async with opened(kind=kind) as desk:
        await desk.serve("double", gated(release))
        served = desk.endpoints.served("double", "")
        loads = Loads(desk.endpoints, monotonic_ns())
        asking = asyncio.create_task(ask(desk.stub))
        await eventually(lambda: served.running == [1])
        for _ in range(3):
            assert loads.look({}, loads.looked_ns + S) == [Load(*KEY, 1000)]
        release.set()
        await asking
        await eventually(lambda: not served.running)


async def test_a_look_too_soon_finds_what_the_last_found() -> None:
    """A window of a millisecond in which a batch ends holds seconds of waiting."""
    async with opened() as desk:
        await desk.serve("double", double())
        loads = Loads(desk.endpoints, monotonic_ns())
        await ask(desk.stub)
        first = loads.look({}, loads.looked_ns + S)
        assert first[0].requests == 1
        looked_ns = loads.looked_ns
        await ask(desk.stub)
        soon = loads.look({("default", "other"): 2}, looked_ns + WINDOW_NS - 1)
        assert soon == [*first, Load("default", "other", 2000, ready=False)]
        assert [one.requests for one in loads.look({}, looked_ns + WINDOW_NS)] == [1]


async def test_what_somebody_waits_for_is_told_though_it_is_not_here() -> None:
    async with opened() as desk:
        loads = Loads(desk.endpoints, 0)
        assert loads.look({KEY: 3}, S) == [Load(*KEY, 3000, ready=False)]
        desk.endpoints.at(KEY)
        assert loads.look({}, 2 * S) == [], "known, and not loaded yet"


def test_what_several_processes_of_a_node_have_to_do_is_one_load() -> None:
    other = Load("default", "other", 10)
    waiting = Load(*KEY, 1000, ready=False)
    busy, idle = Load(*KEY, 2500, 40, 7), Load(*KEY, 500, 90, 1)
    assert together([[busy, other], [], [idle]]) == [Load(*KEY, 3000, 90, 8), other]
    assert together([[waiting], [busy]]) == [Load(*KEY, 3500, 40, 7)]
    assert together([[waiting], [waiting]]) == [Load(*KEY, 2000, ready=False)]


async def test_a_version_that_went_takes_nothing_with_it() -> None:
    async with opened() as desk:
        await desk.serve("double", double())
        loads = Loads(desk.endpoints, monotonic_ns())
        await ask(desk.stub)
        loads.look({}, loads.looked_ns + S)
        before: Served = desk.endpoints.served("double", "")
        another: Own = double()
        await desk.serve("double", another)
        assert desk.endpoints.served("double", "") is not before
        assert loads.look({}, loads.looked_ns + S) == [Load(*KEY, 0)]


async def ask(stub: object) -> None:
    await stub.ModelInfer(request("double", row(1, 2), [1, 2]))  # type: ignore[attr-defined]
