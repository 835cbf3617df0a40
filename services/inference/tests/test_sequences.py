"""Sequences: each request runs once, in its sequence's order, with its own state and no other.

The book is walked at random under a virtual clock; the sequencer runs on the event loop.
"""

import asyncio
from typing import Any, NamedTuple

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from libs.contracts.protos import model_config_pb2 as pb
from libs.doors import DeadlineExceeded, Exhausted, Internal, Invalid, Unavailable
from services.inference import sequences
from services.inference.modelconfig import Misconfigured
from services.inference.sequencer import Sequencer
from services.inference.sequences import Book, Full, Id, NotStarted, Place, Plan, Sequence, Step
from services.inference.tensors import Arrays

IDLE_NS = 100
IDS = st.sampled_from([1, 2, "a", "b"])


class Walk(RuleBasedStateMachine):
    """Against a plain model: what each id's unbroken run of finished requests was."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Book(live_max=2, idle_ns=IDLE_NS, waiting_max=6)
        self.now_ns = 0
        self.ticket = 0
        self.waiting: dict[int, Id] = {}
        self.running: list[tuple[Sequence, Step]] = []
        self.taken: dict[Id, int] = {}
        self.done: dict[Id, list[int] | None] = {}
        """Tickets since the last start that came to its end; None: no start did."""

    @rule(id=IDS, start=st.booleans(), end=st.booleans())
    def arrive(self, id: Id, start: bool, end: bool) -> None:
        self.book.expire(self.now_ns)
        known = self.book.live.get(id) or self.book.backlog.get(id)
        self.ticket += 1
        try:
            self.book.arrive(self.ticket, Place(id, start, end), self.now_ns)
        except NotStarted:
            assert not start
            assert known is None or not known.is_open
        except Full:
            assert len(self.waiting) == 6
        else:
            assert start or (known is not None)
            self.waiting[self.ticket] = id

    @rule()
    def take(self) -> None:
        for sequence, step in self.book.take():
            assert self.waiting.pop(step.ticket) == sequence.id
            assert step.ticket > self.taken.get(sequence.id, 0)
            assert all(other.id != sequence.id for other, _ in self.running)
            self.taken[sequence.id] = step.ticket
            if step.start:
                assert sequence.state == {}
            else:
                assert sequence.state.get("seen", []) == self.done[sequence.id]
            self.running.append((sequence, step))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "failed", "lost"]))
    def finish(self, data: st.DataObject, outcome: str) -> None:
        sequence, step = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        known = self.done.get(sequence.id)
        if outcome == "done":
            seen = [step.ticket] if step.start else [*(known or []), step.ticket]
            self.done[sequence.id] = seen
            state: Any = {"seen": seen}
            lost = self.book.finish(sequence, state, self.now_ns)
            assert not lost
        elif outcome == "failed":
            lost = self.book.finish(sequence, None, self.now_ns)
            assert step.start or not lost
            self.done[sequence.id] = None if step.start else known
        else:
            lost = self.book.lose(sequence, self.now_ns)
            self.done[sequence.id] = None
        self.drop(lost, sequence.id)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        owner = self.waiting.pop(ticket)
        self.drop(self.book.leave(ticket, self.now_ns), owner)

    def drop(self, lost: list[int], owner: Id) -> None:
        assert lost == sorted(lost)
        for ticket in lost:
            assert self.waiting.pop(ticket) == owner

    @rule(passed_ns=st.sampled_from([1, IDLE_NS // 2, IDLE_NS]))
    def wait(self, passed_ns: int) -> None:
        self.now_ns += passed_ns
        self.book.expire(self.now_ns)

    @invariant()
    def holds(self) -> None:
        self.book.validate()
        assert self.waiting.keys() == self.book.holders.keys()

    def teardown(self) -> None:
        """Whoever waits gets a turn once the others are over or idle."""
        for _ in range(20):
            self.take()
            for sequence, _step in self.running:
                self.drop(self.book.finish(sequence, {}, self.now_ns), sequence.id)
                self.done[sequence.id] = []
            self.running.clear()
            self.wait(IDLE_NS)
        assert not self.waiting
        assert not self.book.live


TestWalk = Walk.TestCase
TestWalk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


CONFIG = """
name: "sum" max_batch_size: 8
sequence_batching {
  max_sequence_idle_microseconds: 3600000000
  control_input { name: "START" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
  control_input { name: "END"
                  control { kind: CONTROL_SEQUENCE_END bool_false_true: [false, true] } }
  control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [-1, 5] } }
  control_input { name: "ID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
  state { input_name: "before" output_name: "after" data_type: TYPE_INT32 dims: [ -1 ]
          initial_state { name: "zero" data_type: TYPE_INT32 dims: [ 1 ] zero_data: true } }
  oldest { max_candidate_sequences: 2 }
}
"""


def config_of(text: str = CONFIG, **changes: str) -> pb.ModelConfig:
    for old, new in changes.items():
        text = text.replace(old, new)
    return text_format.Parse(text, pb.ModelConfig())


def plan() -> Plan:
    found = sequences.plan_of(config_of())
    assert found is not None
    return found


class Result(NamedTuple):
    outputs: Arrays


class Sums:
    """A stateless model that adds what it is given to its state; runs when told to."""

    def __init__(self) -> None:
        self.given: list[Arrays] = []
        self.goes = asyncio.Event()

    async def run(self, inputs: Arrays) -> Result:
        self.given.append(inputs)
        await self.goes.wait()
        total = inputs["x"] + inputs["before"]
        return Result({"y": total, "after": total})


def request(sums: Sums, made: Sequencer, id: Id, x: int, said: str = "", **more: Any) -> Any:
    place = Place(id, "start" in said, "end" in said)
    inputs = {"x": np.array([[x]], np.int32)}
    asked = {"rows": 1, "deadline_ns": 0} | more
    return asyncio.create_task(made.infer(place, inputs, run=sums.run, **asked))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_sequence_runs_in_order_and_two_of_them_at_the_same_time() -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    tasks = [
        request(sums, made, 7, 1, "start"),
        request(sums, made, 7, 2),
        request(sums, made, 8, 10, "start"),
        request(sums, made, 7, 3, "end"),
    ]
    await settle()
    assert [int(one["x"][0, 0]) for one in sums.given] == [1, 10]
    sums.goes.set()
    answers = [int(result.outputs["y"][0, 0]) for result in await asyncio.gather(*tasks)]
    assert answers == [1, 3, 10, 6]
    made.close()


async def test_the_model_is_told_where_it_is() -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    sums.goes.set()
    for said in ("start", "", "end"):
        await request(sums, made, -1, 1, said)
    rows = [
        [one[name].item() for name in ("START", "END", "READY", "ID", "before")]
        for one in sums.given
    ]
    biggest = (1 << 64) - 1
    assert rows == [[1, False, 5, biggest, 0], [0, False, 5, biggest, 1], [0, True, 5, biggest, 2]]
    kinds = {name: (array.dtype.name, array.shape) for name, array in sums.given[0].items()}
    assert kinds == {
        "x": ("int32", (1, 1)),
        "START": ("float32", (1, 1)),
        "END": ("bool", (1, 1)),
        "READY": ("int32", (1, 1)),
        "ID": ("uint64", (1, 1)),
        "before": ("int32", (1, 1)),
    }
    made.close()


async def test_a_sequence_begins_with_a_start_and_has_one_row() -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    sums.goes.set()
    with pytest.raises(Invalid, match="sequence 3 to model 'sum' must specify the START flag"):
        await request(sums, made, 3, 1)
    await request(sums, made, 3, 1, "start end")
    with pytest.raises(Invalid, match="must specify the START flag"):
        await request(sums, made, 3, 1)
    with pytest.raises(Invalid, match="must specify batch-size 1 due to requirements of sequence"):
        await request(sums, made, 3, 1, "start", rows=2)
    made.close()


async def test_more_sequences_than_fit_wait_for_one_to_end() -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    tasks = [request(sums, made, one, one, "start") for one in (1, 2, 3)]
    await settle()
    assert [one["ID"].item() for one in sums.given] == [1, 2]
    sums.goes.set()
    await asyncio.gather(*tasks[:2])
    assert not tasks[2].done()
    await request(sums, made, 2, 1, "end")
    await tasks[2]
    assert [one["ID"].item() for one in sums.given] == [1, 2, 2, 3]
    made.close()


async def test_an_idle_sequence_is_dropped_and_makes_room() -> None:
    sums, made = Sums(), Sequencer("sum", plan()._replace(idle_ns=1, live_max=1))
    sums.goes.set()
    await request(sums, made, 1, 1, "start")
    await request(sums, made, 2, 1, "start")
    with pytest.raises(Invalid, match="must specify the START flag"):
        await request(sums, made, 1, 1)
    made.close()


async def test_a_request_that_is_late_leaves_and_those_behind_it_are_told() -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    first = request(sums, made, 1, 1, "start")
    await settle()
    late = request(sums, made, 1, 2, deadline_ns=1)
    behind = request(sums, made, 1, 3)
    with pytest.raises(DeadlineExceeded, match="sequence 1 did not get to this request in time"):
        await late
    with pytest.raises(Unavailable, match="sequence 1 of model 'sum' has lost an earlier request"):
        await behind
    sums.goes.set()
    await first
    assert not made.book.live
    made.close()


@pytest.mark.parametrize("waiting", [False, True])
async def test_a_cancelled_request_ends_its_sequence(waiting: bool) -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    tasks = [request(sums, made, 1, x, "start" * (x == 0)) for x in range(3)]
    await settle()
    tasks[waiting].cancel()
    sums.goes.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[waiting], asyncio.CancelledError)
    assert isinstance(results[2], Unavailable)
    assert len(sums.given) == 1
    assert not made.book.live
    assert not made.turns
    made.close()


async def test_a_failed_request_leaves_the_state_and_a_failed_start_ends_it() -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    sums.goes.set()

    async def failing(inputs: Arrays) -> Result:
        raise Internal("no")

    async def fail(said: str) -> None:
        place = Place(1, "start" in said, False)
        with pytest.raises(Internal):
            await made.infer(place, {"x": np.ones((1, 1), np.int32)}, 1, 0, failing)

    await request(sums, made, 1, 1, "start")
    await fail("")
    assert (await request(sums, made, 1, 2)).outputs["y"].item() == 3
    await fail("start")
    with pytest.raises(Invalid, match="must specify the START flag"):
        await request(sums, made, 1, 1)
    made.close()


async def test_no_more_wait_than_the_bound() -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    made.book.waiting_max = 1
    tasks = [request(sums, made, 1, x, "start" * (x == 0)) for x in range(2)]
    await settle()
    with pytest.raises(Exhausted, match="exceeds maximum queue size of model 'sum'"):
        await request(sums, made, 1, 1)
    sums.goes.set()
    await asyncio.gather(*tasks)
    made.close()


async def test_who_waits_when_the_model_goes_is_told() -> None:
    sums, made = Sums(), Sequencer("sum", plan())
    running, *waiting = [request(sums, made, 1, x, "start" * (x == 0)) for x in range(3)]
    await settle()
    made.close()
    for one in (*waiting, request(sums, made, 2, 1, "start")):
        with pytest.raises(Unavailable, match="model 'sum' is being unloaded"):
            await one
    sums.goes.set()
    assert (await running).outputs["y"].item() == 0


def test_a_plan_is_read_from_the_configuration() -> None:
    found = plan()
    assert (found.idle_ns, found.live_max, found.batched) == (3_600_000_000_000, 2, True)
    assert found.states[0].initial.tolist() == [[0]]
    assert sequences.plan_of(pb.ModelConfig()) is None
    direct = config_of(**{"oldest { max_candidate_sequences: 2 }": "direct { }", "3600000000": "0"})
    found = sequences.plan_of(direct) or found
    assert (found.idle_ns, found.live_max) == (1_000_000_000, 8)
    alone = sequences.plan_of(config_of(**{"max_batch_size: 8": ""})) or found
    assert not alone.batched
    assert sequences.told("m", alone, Place(1, True, False))["START"].shape == (1,)
    assert alone.states[0].initial.shape == (1,)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("fp32_false_true: [0, 1]", "", "'START': one of its false_true must be two values"),
        ("fp32_false_true: [0, 1]", "fp32_false_true: [0]", "must be two values"),
        ("TYPE_UINT64", "TYPE_FP32", "'ID': a correlation id is no FP32"),
        ("zero_data: true", 'data_file: "zero"', "'before': initial_state.data_file is not served"),
        ("oldest", "iterative_sequence: true oldest", "iterative_sequence is not served here"),
    ],
)
def test_what_is_not_served_is_named(old: str, new: str, said: str) -> None:
    with pytest.raises(Misconfigured, match=said):
        sequences.plan_of(config_of(**{old: new}))


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "to model 'm' must specify a non-zero or non-empty correlation ID"),
        ({"sequence_id": ""}, "non-zero or non-empty correlation ID"),
        ({"sequence_id": True}, "invalid value type for 'sequence_id' parameter"),
        ({"sequence_id": 1.5}, "expected int64_param or string_param"),
        (
            {"sequence_id": 1, "sequence_start": 1},
            "'sequence_start' parameter, expected bool_param",
        ),
        ({"sequence_id": 1, "sequence_end": "x"}, "'sequence_end' parameter, expected bool_param"),
    ],
)
def test_a_request_says_where_it_is(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(Invalid, match=said):
        sequences.place_of("m", parameters)


def test_ids_fit_the_control_that_tells_them() -> None:
    assert sequences.told_id("m", "BYTES", 5).tolist() == ["5"]
    assert sequences.told_id("m", "INT32", -5).tolist() == [-5]
    with pytest.raises(Invalid, match="sequence id 4294967296 is no UINT32, as model 'm' asks"):
        sequences.told_id("m", "UINT32", 1 << 32)
