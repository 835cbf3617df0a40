"""Whatever the schedule: nobody is lost, answered twice or given another's answer."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.contracts.pipeline import Batching
from services.inference.batcher import Batcher, Full, Item, Late, Line, Result, RunFailed
from services.inference.tensors import Arrays


def item(mark: int, rows: int, width: int, arrived_s: float, deadline_s: float | None) -> Item:
    inputs = {"x": np.full((rows, width), mark)}
    return Item(inputs, rows, [("x", (width,))], arrived_s, deadline_s)


arrivals = st.tuples(
    st.integers(1, 5), st.sampled_from([1, 2]), st.none() | st.integers(1, 40), st.integers(0, 4)
)


@given(st.lists(st.one_of(arrivals, st.none()), max_size=60), st.integers(0, 10), st.integers(5, 9))
def test_every_request_leaves_the_line_once_in_order_and_among_its_equals(
    schedule: list[tuple[int, int, int | None, int] | None], delay: int, size: int
) -> None:
    """None takes a turn; anything else is (rows, width, deadline, time until it arrives)."""
    limits = Batching(size, delay * 1_000_000, 10)
    line, now, joined, left = Line(limits), 0.0, list[Item](), list[Item]()

    def turn() -> float:
        decided = line.take(now)
        assert len({str(one.shapes) for one in decided.batch}) <= 1
        assert sum(one.rows for one in decided.batch) <= size
        assert all(one.deadline_s is not None and one.deadline_s <= now for one in decided.late)
        assert not (decided.batch and decided.wait_s)
        assert decided.wait_s <= delay
        left.extend([*decided.batch, *decided.late])
        return decided.wait_s

    for mark, step in enumerate(schedule):
        if step is None:
            now += turn() or 1
            continue
        rows, width, deadline, later = step
        now += later
        one = item(mark, rows, width, now, None if deadline is None else now + deadline)
        if len(line.waiting) < 10:
            line.join(one)
            joined.append(one)
        else:
            with pytest.raises(Full):
                line.join(one)
    while line.waiting:
        now += turn()
    assert sorted(map(id, left)) == sorted(map(id, joined))
    for width in (1, 2):
        served = [o for o in left if o.shapes == [("x", (width,))] and o.deadline_s is None]
        assert served == sorted(served, key=joined.index)


class Gate:
    """A graph that answers when the test lets it; it adds 1000 to its input."""

    def __init__(self) -> None:
        self.batches: list[np.ndarray] = []
        self.open = asyncio.Event()
        self.now_s = 0.0

    async def run(self, inputs: Arrays) -> Arrays:
        self.batches.append(inputs["x"])
        await self.open.wait()
        if (inputs["x"] < 0).any():
            raise RunFailed("negative")
        return {"y": inputs["x"] + 1000}


def batcher(gate: Gate, **limits: int) -> Batcher:
    return Batcher(gate.run, Batching(**limits), lambda: gate.now_s)


def ask(one: Batcher, *values: int, deadline_s: float | None = None) -> Awaitable[Result]:
    inputs = {"x": np.array(values)}
    return asyncio.create_task(one.infer(inputs, len(values), deadline_s))


async def until(check: Callable[[], bool]) -> None:
    """Lets the event loop turn, without time passing."""
    for _ in range(1000):
        if check():
            return
        await asyncio.sleep(0)
    raise AssertionError("never happened")


async def test_what_queued_while_a_batch_ran_is_the_next_batch_and_each_gets_its_rows() -> None:
    gate = Gate()
    one = batcher(gate, max_batch_size=4)
    first = ask(one, 1)
    await until(lambda: len(gate.batches) == 1)
    rest = [ask(one, 2, 3), ask(one, 4), ask(one, 5, 6)]
    await until(lambda: len(one.line.waiting) == 3)
    gate.open.set()
    answers = [await answer for answer in [first, *rest]]
    assert [batch.tolist() for batch in gate.batches] == [[1], [2, 3, 4], [5, 6]]
    assert [answer.outputs["y"].tolist() for answer in answers] == [
        [1001],
        [1002, 1003],
        [1004],
        [1005, 1006],
    ]
    assert [answer.batch_rows for answer in answers] == [1, 3, 3, 2]


async def test_a_lone_request_runs_at_once() -> None:
    gate = Gate()
    gate.open.set()
    assert (await ask(batcher(gate), 7)).queue_s == 0.0


async def test_a_request_that_makes_the_graph_fail_fails_alone() -> None:
    gate = Gate()
    one = batcher(gate, max_batch_size=8)
    first = ask(one, 0)
    await until(lambda: len(gate.batches) == 1)
    good, bad, other = ask(one, 1), ask(one, -1), ask(one, 2)
    await until(lambda: len(one.line.waiting) == 3)
    gate.open.set()
    assert [(await a).outputs["y"].tolist() for a in (first, good, other)] == [
        [1000],
        [1001],
        [1002],
    ]
    with pytest.raises(RunFailed, match="negative"):
        await bad


async def test_a_deadline_that_passes_in_line_is_said_and_costs_no_run() -> None:
    gate = Gate()
    one = batcher(gate)
    first = ask(one, 1)
    await until(lambda: len(gate.batches) == 1)
    second = ask(one, 2, deadline_s=3.0)
    await until(lambda: len(one.line.waiting) == 1)
    gate.now_s = 5.0
    gate.open.set()
    await first
    with pytest.raises(Late, match=r"waited 5\.000 s"):
        await second
    assert len(gate.batches) == 1


async def test_a_full_line_refuses_and_those_in_it_are_answered() -> None:
    gate = Gate()
    one = batcher(gate, max_queue_size=2)
    accepted = [ask(one, 0)]
    await until(lambda: len(gate.batches) == 1)
    accepted += [ask(one, 1), ask(one, 2)]
    await until(lambda: len(one.line.waiting) == 2)
    with pytest.raises(Full, match="2 requests"):
        await ask(one, 3)
    gate.open.set()
    assert [(await answer).outputs["y"][0] for answer in accepted] == [1000, 1001, 1002]


async def test_who_went_away_is_not_run_and_closing_answers_the_others() -> None:
    gate = Gate()
    one = batcher(gate)
    first = ask(one, 1)
    await until(lambda: len(gate.batches) == 1)
    gone, stays = asyncio.ensure_future(ask(one, 2)), ask(one, 3)
    await until(lambda: len(one.line.waiting) == 2)
    gone.cancel()
    gate.open.set()
    await first
    await one.close()
    assert (await stays).outputs["y"].tolist() == [1003]
    assert [batch.tolist() for batch in gate.batches] == [[1], [3]]


async def test_an_output_with_another_number_of_rows_is_nobodys_answer() -> None:
    async def run(inputs: Arrays) -> Arrays:
        return {"y": np.zeros(5)}

    with pytest.raises(RunFailed, match=r"shape \[5\] for 1 rows"):
        await Batcher(run, Batching(), lambda: 0.0).infer({"x": np.zeros(1)}, 1)
