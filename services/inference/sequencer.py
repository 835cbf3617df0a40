"""Drives the sequences of a served version on the event loop; `sequences.py` decides."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from time import monotonic_ns
from typing import Protocol, TypeVar

from libs.doors import DeadlineExceeded, Exhausted, Invalid, Refused, Unavailable
from services.inference import sequences
from services.inference.front import full_text, leaving_text
from services.inference.sequences import (
    WAITING_MAX,
    Book,
    Full,
    NotStarted,
    Place,
    Plan,
    Sequence,
)
from services.inference.tensors import Arrays

NS = 1e9


class WithOutputs(Protocol):
    @property
    def outputs(self) -> Arrays: ...


Result = TypeVar("Result", bound=WithOutputs)


class Sequencer:
    """Of one served version. Used on the event loop only."""

    def __init__(self, model: str, plan: Plan) -> None:
        self.model = model
        self.plan = plan
        self.book = Book(plan.live_max, plan.idle_ns)
        self.tickets = itertools.count(1)
        self.turns: dict[int, asyncio.Future[Sequence]] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.is_closed = False

    def holds(self, sequence: bool | int | float | str) -> bool:
        return sequence in self.book.live or sequence in self.book.backlog

    async def infer(
        self,
        place: Place,
        inputs: Arrays,
        rows: int,
        deadline_ns: int,
        run: Callable[[Arrays], Awaitable[Result]],
    ) -> Result:
        """`run` with the controls and the state added, when it is this request's turn.

        Raises `Refused`.
        """
        if rows > 1:
            raise Invalid(
                f"inference request to model '{self.model}' must specify batch-size 1 due to "
                "requirements of sequence batcher"
            )
        controls = sequences.told(self.model, self.plan, place)
        sequence = await self.turn(place, deadline_ns)
        state: Arrays | None = None
        is_known = False
        try:
            result = await run(
                {**inputs, **controls, **sequences.carried(self.plan, sequence.state)}
            )
            state = sequences.kept(self.plan, result.outputs)
            is_known = True
        except Refused:
            is_known = True
            raise
        finally:
            now_ns = monotonic_ns()
            if is_known:
                self.go_on(self.book.finish(sequence, state, now_ns), place)
            else:
                self.go_on(self.book.lose(sequence, now_ns), place)
        return result

    async def turn(self, place: Place, deadline_ns: int) -> Sequence:
        self.book.expire(monotonic_ns())
        ticket = next(self.tickets)
        self.join(ticket, place)
        turn = self.turns[ticket] = asyncio.get_running_loop().create_future()
        self.go_on([], place)
        left_s = (deadline_ns - monotonic_ns()) / NS if deadline_ns else None
        try:
            async with asyncio.timeout(left_s):
                return await asyncio.shield(turn)
        except TimeoutError as error:
            self.leave(ticket, turn, place)
            raise DeadlineExceeded(
                f"model '{self.model}': sequence {place.id} did not get to this request in time"
            ) from error
        except asyncio.CancelledError:
            self.leave(ticket, turn, place)
            raise

    def join(self, ticket: int, place: Place) -> None:
        if self.is_closed:
            raise self.leaving()
        try:
            self.book.arrive(ticket, place, monotonic_ns())
        except NotStarted as error:
            raise Invalid(
                f"inference request for sequence {place.id} to model '{self.model}' must specify "
                "the START flag on the first request of the sequence"
            ) from error
        except Full as error:
            waiting = f"{WAITING_MAX} requests of sequences"
            raise Exhausted(full_text(f"model '{self.model}'", waiting)) from error

    def leave(self, ticket: int, turn: asyncio.Future[Sequence], place: Place) -> None:
        """Its turn may have come in the same moment."""
        if turn.done() and not turn.exception():
            self.go_on(self.book.lose(turn.result(), monotonic_ns()), place)
        elif self.turns.pop(ticket, None) is not None:
            self.go_on(self.book.leave(ticket, monotonic_ns()), place)

    def go_on(self, lost: list[int], place: Place) -> None:
        if self.is_closed:
            return
        for ticket in lost:
            self.turns.pop(ticket).set_exception(
                Unavailable(
                    f"sequence {place.id} of model '{self.model}' has lost an earlier request: "
                    "start it again"
                )
            )
        self.move()

    def move(self) -> None:
        for sequence, step in self.book.take():
            self.turns.pop(step.ticket).set_result(sequence)
        due_ns = self.book.due_ns()
        if self.timer is None and due_ns is not None:
            wait_s = max(due_ns - monotonic_ns(), 0) / NS
            self.timer = asyncio.get_running_loop().call_later(wait_s, self.sweep)

    def sweep(self) -> None:
        self.timer = None
        self.book.expire(monotonic_ns())
        self.move()

    def close(self) -> None:
        """Who runs is answered; who waits would wait for a sequence that nobody can end."""
        self.is_closed = True
        if self.timer is not None:
            self.timer.cancel()
        for turn in self.turns.values():
            turn.set_exception(self.leaving())
        self.turns.clear()

    def leaving(self) -> Unavailable:
        return Unavailable(leaving_text(f"model '{self.model}'"))
