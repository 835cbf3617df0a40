"""Both lines behind one interface, and the steps that tests take them through."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import pytest
from hypothesis import strategies as st

from libs.contracts.pipeline import Batching
from services.inference.line import Line, Turn

US = 1000
MAX_LEVELS = 3


class AnyLine(Protocol):
    @property
    def waiting(self) -> int: ...
    def configure(self, limits: Batching) -> None: ...
    def join(
        self,
        key: int,
        rows: int,
        kind: int,
        now_ns: int,
        deadline_ns: int = 0,
        timeout_us: int = 0,
        priority: int = 0,
    ) -> bool: ...
    def answered(self, requests: int, took_ns: int, now_ns: int) -> None: ...
    def over(self, requests: int) -> None: ...
    def parted(self, parts: int) -> None: ...
    def leave(self, key: int) -> None: ...
    def take(self, now_ns: int, runners: int = 1) -> Turn: ...


class Join(NamedTuple):
    rows: int
    kind: int = 0
    deadline_us: int = 0
    """From now on; 0: none."""
    timeout_us: int = 0
    priority: int = 0


class Leave(NamedTuple):
    which: int
    """Of those who ever joined, counted round and round."""


class Take(NamedTuple):
    runners: int = 1
    """Who have nothing to do."""


class Answer(NamedTuple):
    """A batch of so many, which took so long."""

    requests: int
    took_us: int


class Over(NamedTuple):
    which: int
    """Of the batches that run, counted round and round."""


class Pass(NamedTuple):
    us: int


class Configure(NamedTuple):
    limits: Batching


Step = Join | Leave | Take | Answer | Over | Pass | Configure


@st.composite
def limits(draw: st.DrawFn) -> Batching:
    size = draw(st.sampled_from([*range(1, 9), 64]))
    levels = draw(st.integers(0, MAX_LEVELS))
    return Batching(
        max_batch_size=size,
        preferred_batch_size=tuple(draw(st.lists(st.integers(1, size), max_size=2))),
        max_queue_delay_microseconds=draw(st.sampled_from([0, 0, 3, 20])),
        max_queue_size=draw(st.sampled_from([*range(1, 13), 64])),
        priority_levels=levels,
        default_priority_level=draw(st.integers(0, levels)),
        default_timeout_microseconds=draw(st.sampled_from([0, 0, 5])),
        allow_timeout_override=draw(st.booleans()),
        timeout_action=draw(st.sampled_from(["REJECT", "DELAY"])),
    )


TOOK_US = (50, 149, 150, 3_100, 3_200, 9_600, 1_000_000)
soon_us = st.sampled_from([0, 0, 0, 1, 4, 9, 30])
joins = st.builds(
    Join,
    rows=st.integers(1, 8),
    kind=st.sampled_from([0, 0, 1, 7]),
    deadline_us=soon_us,
    timeout_us=soon_us,
    priority=st.integers(0, MAX_LEVELS + 1),
)
one: st.SearchStrategy[Step] = st.one_of(
    joins,
    joins,
    joins,
    st.builds(Take, runners=st.integers(1, 4)),
    st.builds(Pass, us=st.integers(1, 12)),
    st.builds(Pass, us=st.sampled_from([90, 400, 6000])),
    st.builds(Answer, requests=st.integers(1, 3), took_us=st.sampled_from(TOOK_US)),
    st.builds(Over, which=st.integers(0, 30)),
    st.builds(Leave, which=st.integers(0, 30)),
    st.builds(Configure, limits=limits()),
)
crowds: st.SearchStrategy[list[Step]] = st.integers(9, 40).map(lambda count: [Join(1)] * count)
steps: st.SearchStrategy[list[Step]] = st.lists(
    st.one_of(*[one.map(lambda step: [step])] * 9, crowds), max_size=60
).map(lambda parts: [step for part in parts for step in part])


class NativeLine:
    """Takes `Batching` and answers in `Turn`s, as the Python one."""

    def __init__(self, given: Batching) -> None:
        import leptonic_native  # type: ignore[import-not-found]

        self.line = leptonic_native.Line(**native_limits(given))
        self.join = self.line.join
        self.answered = self.line.answered
        self.over = self.line.over
        self.parted = self.line.parted
        self.leave = self.line.leave

    @property
    def waiting(self) -> int:
        return int(self.line.waiting)

    def configure(self, given: Batching) -> None:
        self.line.configure(**native_limits(given))

    def take(self, now_ns: int, runners: int = 1) -> Turn:
        batch, late, wait_ns = self.line.take(now_ns, runners)
        return Turn(list(batch), [tuple(one) for one in late], wait_ns)


def native_limits(given: Batching) -> dict[str, object]:
    return {
        "max_batch_size": given.max_batch_size,
        "preferred_batch_size": list(given.preferred_batch_size),
        "max_queue_delay_ns": given.max_queue_delay_microseconds * US,
        "max_queue_size": given.max_queue_size,
        "priority_levels": given.priority_levels,
        "default_priority_level": given.default_priority_level,
        "default_timeout_us": given.default_timeout_microseconds,
        "allow_timeout_override": given.allow_timeout_override,
        "delay_late": given.timeout_action == "DELAY",
    }


def native(given: Batching) -> AnyLine:
    pytest.importorskip("leptonic_native", reason="the extension is not built here")
    return NativeLine(given)


Make = Callable[[Batching], AnyLine]
LINES = [pytest.param(Line, id="python"), pytest.param(native, id="native")]
