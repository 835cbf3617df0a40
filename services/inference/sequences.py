"""Requests that belong together: who of a sequence runs when, and what its model is told.

Pure. The requests of one sequence run one after the other in the order they came, those of
different sequences at the same time, so that they share batches; `sequencer.py` drives this. The
names are those of Triton's `sequence_batching`.
"""

from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from libs.contracts.pipeline import Batching
from libs.contracts.protos import model_config_pb2 as pb
from libs.doors import Invalid
from services.inference import modelconfig
from services.inference.modelconfig import Misconfigured
from services.inference.tensors import DTYPES, Array, Arrays

IDLE_NS = 1_000_000_000
"""Where `max_sequence_idle_microseconds` is not said."""
WAITING_MAX = Batching().max_queue_size
"""Requests that wait for another one of their sequence, or for a sequence to end."""
Id = int | str
Kind = pb.ModelSequenceBatching.Control.Kind


class Control(NamedTuple):
    """An input that tells the model where it is in a sequence."""

    name: str
    kind: Kind.ValueType
    datatype: str
    false_true: tuple[float, float] = (0, 0)
    """What it is told; a correlation id is told as it is."""


class State(NamedTuple):
    """An output that is the next request's input."""

    input_name: str
    output_name: str
    initial: Array


class Plan(NamedTuple):
    """What a configuration's `sequence_batching` asks for."""

    idle_ns: int
    live_max: int
    """More sequences than these wait until one of them ends."""
    controls: tuple[Control, ...]
    states: tuple[State, ...]
    batched: bool


def plan_of(config: pb.ModelConfig) -> Plan | None:
    """None for a model that knows no sequences. Raises `Misconfigured`."""
    if not config.HasField("sequence_batching"):
        return None
    said, batched = config.sequence_batching, config.max_batch_size > 0
    if said.iterative_sequence:
        raise Misconfigured("sequence_batching.iterative_sequence is not served here")
    each = said.oldest.max_candidate_sequences or max(config.max_batch_size, 1)
    return Plan(
        said.max_sequence_idle_microseconds * 1000 or IDLE_NS,
        each * max(modelconfig.instances_of(config), 1),
        tuple(control_of(one.name, told) for one in said.control_input for told in one.control),
        tuple(state_of(one, batched) for one in said.state),
        batched,
    )


def control_of(name: str, said: pb.ModelSequenceBatching.Control) -> Control:
    if said.kind == Kind.CONTROL_SEQUENCE_CORRID:
        datatype = modelconfig.datatype_of(said.data_type)
        if datatype not in ("BYTES", "INT32", "INT64", "UINT32", "UINT64"):
            raise Misconfigured(f"control_input '{name}': a correlation id is no {datatype}")
        return Control(name, said.kind, datatype)
    for datatype, values in (
        ("INT32", said.int32_false_true),
        ("FP32", said.fp32_false_true),
        ("BOOL", said.bool_false_true),
    ):
        if len(values) == 2:
            return Control(name, said.kind, datatype, (values[0], values[1]))
    raise Misconfigured(f"control_input '{name}': one of its false_true must be two values")


def state_of(said: pb.ModelSequenceBatching.State, batched: bool) -> State:
    """Zeros, of one row; free dimensions begin as 1."""
    first = said.initial_state[0] if said.initial_state else said
    if isinstance(first, pb.ModelSequenceBatching.InitialState) and first.data_file:
        raise Misconfigured(
            f"state '{said.input_name}': initial_state.data_file is not served here"
        )
    shape = [1] * batched + [max(size, 1) for size in first.dims]
    datatype = modelconfig.datatype_of(said.data_type)
    initial = (
        np.full(shape, "", object) if datatype == "BYTES" else np.zeros(shape, DTYPES[datatype])
    )
    return State(said.input_name, said.output_name, initial)


class Place(NamedTuple):
    """Where a request says that it is."""

    id: Id
    start: bool
    end: bool


def place_of(model: str, parameters: Mapping[str, bool | int | float | str]) -> Place:
    """Raises `Invalid`."""
    sequence = parameters.get("sequence_id", 0)
    if isinstance(sequence, bool | float):
        raise Invalid(
            "invalid value type for 'sequence_id' parameter, expected int64_param or string_param."
        )
    if not sequence:
        raise Invalid(
            f"inference request to model '{model}' must specify a non-zero or non-empty "
            "correlation ID"
        )
    return Place(sequence, flag(parameters, "sequence_start"), flag(parameters, "sequence_end"))


def flag(parameters: Mapping[str, bool | int | float | str], name: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise Invalid(f"invalid value type for '{name}' parameter, expected bool_param.")
    return value


def told(model: str, plan: Plan, place: Place) -> Arrays:
    """The control inputs of a request, one row. Raises `Invalid`."""
    shape = (1, 1) if plan.batched else (1,)
    true = {
        Kind.CONTROL_SEQUENCE_START: place.start,
        Kind.CONTROL_SEQUENCE_END: place.end,
        Kind.CONTROL_SEQUENCE_READY: True,
    }
    found = {}
    for one in plan.controls:
        if one.kind == Kind.CONTROL_SEQUENCE_CORRID:
            found[one.name] = told_id(model, one.datatype, place.id).reshape(shape)
        else:
            value = one.false_true[true[one.kind]]
            found[one.name] = np.full(shape, value, DTYPES[one.datatype])
    return found


def told_id(model: str, datatype: str, id: Id) -> Array:
    if datatype == "BYTES":
        return np.array([str(id)], object)
    if isinstance(id, str):
        raise Invalid(f"model '{model}' takes its sequence ids as {datatype}, not as text")
    bounds = np.iinfo(DTYPES[datatype])
    # int64_param carries the upper half of the unsigned ones as negative numbers.
    number = id % (1 << 64) if datatype == "UINT64" else id
    if not bounds.min <= number <= bounds.max:
        raise Invalid(f"sequence id {id} is no {datatype}, as model '{model}' asks")
    return np.array([number], DTYPES[datatype])


def carried(plan: Plan, known: Arrays) -> Arrays:
    """The state inputs: as the last request left them, else as they begin."""
    return {one.input_name: known.get(one.input_name, one.initial) for one in plan.states}


def kept(plan: Plan, outputs: Arrays) -> Arrays:
    """What the next request is given; copies, for a view would keep its whole batch."""
    return {one.input_name: outputs[one.output_name].copy() for one in plan.states}


class Step(NamedTuple):
    ticket: int
    start: bool
    end: bool


class Sequence:
    def __init__(self, id: Id, now_ns: int) -> None:
        self.id = id
        self.steps: deque[Step] = deque()
        """Not yet running, as they came."""
        self.running: Step | None = None
        self.is_open = True
        """More may come: the last that came was no end."""
        self.touched_ns = now_ns
        self.state: Arrays = {}
        """Of the last step that ran; empty at a start."""


class NotStarted(Exception):
    """The first of a sequence must say so."""


class Full(Exception):
    """`WAITING_MAX` requests wait already."""


class Book:
    """The sequences of one model version."""

    def __init__(self, live_max: int, idle_ns: int, waiting_max: int = WAITING_MAX) -> None:
        self.live_max = live_max
        self.idle_ns = idle_ns
        self.waiting_max = waiting_max
        self.live: dict[Id, Sequence] = {}
        """Longest untouched first."""
        self.backlog: dict[Id, Sequence] = {}
        """Waiting for one of the live to end, in the order they came."""
        self.holders: dict[int, Sequence] = {}
        """Ticket of a waiting step -> its sequence."""
        self.ready: deque[Sequence] = deque()
        """Live, with steps, none of them running."""

    def arrive(self, ticket: int, place: Place, now_ns: int) -> None:
        """Raises `NotStarted`, `Full`."""
        sequence = self.live.get(place.id) or self.backlog.get(place.id)
        if not place.start and (sequence is None or not sequence.is_open):
            raise NotStarted
        if len(self.holders) >= self.waiting_max:
            raise Full
        if sequence is None:
            sequence = self.backlog[place.id] = Sequence(place.id, now_ns)
        self.holders[ticket] = sequence
        sequence.is_open = not place.end
        sequence.steps.append(Step(ticket, place.start, place.end))
        self.touch(sequence, now_ns)
        if place.id in self.live and len(sequence.steps) == 1 and sequence.running is None:
            self.ready.append(sequence)
        self.admit(now_ns)

    def touch(self, sequence: Sequence, now_ns: int) -> None:
        sequence.touched_ns = now_ns
        if self.live.pop(sequence.id, None) is not None:
            self.live[sequence.id] = sequence

    def admit(self, now_ns: int) -> None:
        while self.backlog and len(self.live) < self.live_max:
            next_id = next(iter(self.backlog))
            admitted = self.live[next_id] = self.backlog.pop(next_id)
            admitted.touched_ns = now_ns
            self.ready.append(admitted)

    def take(self) -> list[tuple[Sequence, Step]]:
        """Whose turn it is: each runs until `finish`."""
        taken = []
        while self.ready:
            sequence = self.ready.popleft()
            sequence.running = sequence.steps.popleft()
            del self.holders[sequence.running.ticket]
            if sequence.running.start:
                sequence.state = {}
            taken.append((sequence, sequence.running))
        return taken

    def finish(self, sequence: Sequence, state: Arrays | None, now_ns: int) -> list[int]:
        """What ran is over. `state` is None when it did not come to its end.

        Gives the tickets of those whose sequence is lost with it: a start that failed.
        """
        step = sequence.running
        assert step is not None, sequence.id
        sequence.running = None
        lost: list[int] = []
        if state is not None:
            sequence.state = state
        elif step.start:
            lost = self.cut(sequence, 0)
        self.touch(sequence, now_ns)
        self.go_on(sequence, now_ns)
        return lost

    def leave(self, ticket: int, now_ns: int) -> list[int]:
        """A waiting step's caller has gone. Gives the tickets of those behind it: a sequence
        with a hole is none."""
        sequence = self.holders.pop(ticket)
        at = next(i for i, step in enumerate(sequence.steps) if step.ticket == ticket)
        del sequence.steps[at]
        lost = self.cut(sequence, at)
        if sequence.running is None and not sequence.steps:
            if sequence in self.ready:
                self.ready.remove(sequence)
            self.go_on(sequence, now_ns)
        return lost

    def lose(self, sequence: Sequence, now_ns: int) -> list[int]:
        """As `finish`, when nobody knows whether what ran had its effect."""
        lost = self.cut(sequence, 0)
        return lost + self.finish(sequence, None, now_ns)

    def cut(self, sequence: Sequence, at: int) -> list[int]:
        """Drops the steps from there up to the next start."""
        lost = []
        while at < len(sequence.steps) and not sequence.steps[at].start:
            lost.append(sequence.steps[at].ticket)
            del self.holders[lost[-1]]
            del sequence.steps[at]
        if at == len(sequence.steps):
            sequence.is_open = False
        return lost

    def go_on(self, sequence: Sequence, now_ns: int) -> None:
        if sequence.steps:
            self.ready.append(sequence)
        elif not sequence.is_open:
            self.live.pop(sequence.id, None)
            self.backlog.pop(sequence.id, None)
            self.admit(now_ns)

    def expire(self, now_ns: int) -> None:
        """Drops the sequences that were idle for too long."""
        idle = []
        for sequence in self.live.values():
            if now_ns - sequence.touched_ns < self.idle_ns:
                break
            if not sequence.steps and sequence.running is None:
                idle.append(sequence)
        for sequence in idle:
            sequence.is_open = False
            self.go_on(sequence, now_ns)

    def due_ns(self) -> int | None:
        """When `expire` may have something to do; None while nothing is idle."""
        idle = (one for one in self.live.values() if not one.steps and one.running is None)
        oldest = next(idle, None)
        return None if oldest is None else oldest.touched_ns + self.idle_ns

    def validate(self) -> None:
        """Holds between any two calls."""
        assert len(self.live) <= self.live_max
        assert not self.backlog or len(self.live) == self.live_max
        assert not self.live.keys() & self.backlog.keys()
        sequences = [*self.live.values(), *self.backlog.values()]
        waiting = {step.ticket: one for one in sequences for step in one.steps}
        assert waiting == self.holders
        assert len(waiting) == sum(len(one.steps) for one in sequences) <= self.waiting_max
        due = [one for one in self.live.values() if one.steps and one.running is None]
        assert sorted(map(id, self.ready)) == sorted(map(id, due))
        touched = [one.touched_ns for one in self.live.values()]
        assert touched == sorted(touched)
        for one in sequences:
            assert one.steps or one.running or one.is_open
        for one in self.backlog.values():
            assert one.steps
            assert one.running is None
