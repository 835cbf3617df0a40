"""A loaded version: its model, its queue, and the threads between the two."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Thread
from time import monotonic_ns
from typing import NamedTuple

import grpc

from libs.contracts.pipeline import Batching
from libs.contracts.protos.model_config_pb2 import ModelConfig
from libs.doors import DeadlineExceeded, Exhausted, Internal, Refused, Unavailable
from services.inference import modelconfig, sequences
from services.inference.front import (
    Batch,
    Batcher,
    Counts,
    Front,
    Lane,
    Note,
    Sampling,
    full_text,
    leaving_text,
)
from services.inference.models import Crashed, Model, RunFailed
from services.inference.responses import Responses
from services.inference.sequencer import Sequencer
from services.inference.tally import Tally
from services.inference.tensors import Arrays

log = logging.getLogger(__name__)
INTERNAL = grpc.StatusCode.INTERNAL.value[0]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]
REFUSALS: dict[int, type[Refused]] = {
    kind.code.value[0]: kind for kind in (DeadlineExceeded, Exhausted, Internal, Unavailable)
}
STREAMS_MAX = 64
"""Of one decoupled version at a time; each holds a thread while it waits for its next answer."""
STREAMS_END_S = 10.0
"""A version that is unloaded leaves its streams so long to come to their end."""
TOLD_EVERY_S = 0.5
"""What is noted is told together: whenever the loop's thread is woken it stops the runners."""
UNTOLD_MAX = 256
"""More is told at once: callers may trace everything."""
FULL, CLOSED = 0, -1
"""What `Batcher.join` says instead of a ticket."""


class Rates(NamedTuple):
    """At most how many requests of a version are traced and logged beside the callers' own
    traces."""

    traces_per_s: float
    log_per_s: float


class Result(NamedTuple):
    """The rows of one request."""

    outputs: Arrays
    place: str
    """Traceparent of the request's span; "" when it has none."""


class Noted(NamedTuple):
    """An answered request that is traced or logged, with what went in and came out."""

    note: Note
    inputs: Arrays
    outputs: Arrays
    answered_ns: int
    batch_rows: int


Tell = Callable[[Sequence[Noted]], None]
"""On the event loop."""


class Waiting:
    """A request that came from Python: its batch is run on a thread, its caller awaits."""

    def __init__(self, batched: bool) -> None:
        self.batched = batched
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Result] = self.loop.create_future()

    def answered(
        self,
        outputs: Arrays,
        start: int,
        stop: int,
        batch_rows: int,
        note: Note | None,
    ) -> None:
        if self.batched:
            outputs = {name: array[start:stop] for name, array in outputs.items()}
        result = Result(outputs, note.place if note else "")
        self.loop.call_soon_threadsafe(self.settle, result)

    def failed(self, code: int, text: str) -> None:
        self.loop.call_soon_threadsafe(self.settle, REFUSALS.get(code, Internal)(text))

    def settle(self, outcome: Result | Refused) -> None:
        if self.result.done():
            return
        if isinstance(outcome, Result):
            self.result.set_result(outcome)
        else:
            self.result.set_exception(outcome)


class Stream:
    """The answers of a decoupled model to one request."""

    def __init__(self, answers: Iterator[Arrays]) -> None:
        self.answers = answers
        self.coming: Future[Arrays | None] = Future()
        """The next of them, on a thread."""
        self.coming.set_result(None)


class Served:
    """`instances` threads take batches; `tell` hears of what is traced or logged, `crashed` of a
    worker process that died."""

    def __init__(
        self,
        front: Front,
        name: str,
        version: str,
        model: Model,
        instances: int,
        tell: Tell,
        crashed: Callable[["Served", str], None],
        rates: Rates,
        config: ModelConfig,
    ) -> None:
        self.name = name
        self.version = version
        self.model = model
        self.config = config
        self.signature = modelconfig.signature_of(config)
        """What clients send and get; a graph may have more, for its sequences."""
        sequence_plan = sequences.plan_of(config)
        self.sequencer = Sequencer(name, sequence_plan) if sequence_plan else None
        self.limits = Batching()
        self.tell = tell
        self.crashed = crashed
        self.rates = rates
        self.log_percent = 0
        self.loop = asyncio.get_running_loop()
        self.lock = Lock()
        self.blamed = 0
        self.untold: list[Noted] = []
        self.refused: dict[int, tuple[int, int]] = {}
        """Requests that never joined, as `Counts.failures`."""
        self.streams = 0
        self.running: list[int] = []
        """Requests of each batch that the model runs now."""
        self.quiet = asyncio.Event()
        """No stream runs."""
        self.quiet.set()
        self.is_closed = False
        self.streamed = Tally()
        """Of a decoupled model, which runs in no batch."""
        self.responses = Responses()
        self.pool = ThreadPoolExecutor(STREAMS_MAX, f"{name}-{version}-stream")
        self.batcher: Batcher = front.batcher(
            Lane(name, version, model.signature, model.batched, self.is_opaque())
        )
        model.on_crash = self.fell
        self.threads = [
            Thread(target=self.work, name=f"{name}-{version}-{one}", daemon=True)
            for one in range(instances)
        ]
        for thread in self.threads:
            thread.start()

    def is_opaque(self) -> bool:
        """Strings have no fixed size, sequences and streams no batch of their own choice: their
        requests do not go through the wire's fast path."""
        tensors = (*self.model.signature.inputs, *self.model.signature.outputs)
        has_strings = any(tensor.datatype == "BYTES" for tensor in tensors)
        return has_strings or self.model.decoupled or self.sequencer is not None

    @property
    def title(self) -> str:
        return f"model '{self.name}' version {self.version}"

    @property
    def rows_max(self) -> int:
        return self.limits.max_batch_size if self.model.batched else 1

    def configure(self, limits: Batching, log_percent: int) -> None:
        """From the next request on."""
        self.limits = limits
        self.log_percent = log_percent
        sampling = Sampling(self.rates.traces_per_s, log_percent, self.rates.log_per_s)
        self.batcher.configure(limits, sampling)

    def sample(self, rates: Rates) -> None:
        """From the next request on."""
        self.rates = rates
        self.configure(self.limits, self.log_percent)

    async def infer(
        self,
        inputs: Arrays,
        rows: int,
        id: str = "",
        traceparent: str = "",
        deadline_ns: int = 0,
        timeout_us: int = 0,
        priority: int = 0,
    ) -> Result:
        """Raises `Exhausted`, `DeadlineExceeded`, `Unavailable`, `Internal`."""
        waiting = Waiting(self.model.batched)
        ticket = self.batcher.join(
            inputs, rows, waiting, id, traceparent, deadline_ns, timeout_us, priority
        )
        if ticket == FULL:
            raise Exhausted(full_text(self.title, f"{self.limits.max_queue_size} requests"))
        if ticket == CLOSED:
            raise Unavailable(leaving_text(self.title))
        try:
            return await waiting.result
        except asyncio.CancelledError:
            self.batcher.leave(ticket)
            raise

    async def stream(self, inputs: Arrays, deadline_ns: int) -> AsyncIterator[Arrays]:
        """The answers of a decoupled model as they come. Raises `Refused`."""
        if self.streams >= STREAMS_MAX:
            raise Exhausted(f"{self.title}: {self.streams} streams run already")
        self.streams += 1
        self.quiet.clear()
        began_ns = asked_ns = monotonic_ns()
        stream, place = Stream(self.model.stream(inputs)), 0
        try:
            while (outputs := await self.next_of(stream, deadline_ns)) is not None:
                self.responses.answered(place, monotonic_ns() - asked_ns)
                yield outputs
                asked_ns, place = monotonic_ns(), place + 1
        except Refused as error:
            self.responses.failed(place, monotonic_ns() - asked_ns)
            self.refuse(error.code.value[0], began_ns)
            raise
        else:
            rows = len(next(iter(inputs.values()))) if self.model.batched else 1
            spent_ns = monotonic_ns() - began_ns
            self.streamed.answered([began_ns], rows, began_ns, (0, spent_ns, 0))
        finally:
            stream.coming.add_done_callback(self.stream_over)

    def stream_over(self, _: "Future[Arrays | None]") -> None:
        """Nobody may wait for it any more while its thread still does."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.give_back)

    def give_back(self) -> None:
        self.streams -= 1
        if not self.streams:
            self.quiet.set()

    async def next_of(self, stream: "Stream", deadline_ns: int) -> Arrays | None:
        if self.is_closed:
            raise Unavailable(leaving_text(self.title))
        left_s = (deadline_ns - monotonic_ns()) / 1e9 if deadline_ns else None
        stream.coming = self.pool.submit(next, stream.answers, None)
        try:
            async with asyncio.timeout(left_s):
                return await asyncio.wrap_future(stream.coming)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.title} did not answer in time") from error
        except Crashed as error:
            self.blame()
            raise Unavailable(f"{self.title}: {error}") from error
        except RunFailed as error:
            self.blame()
            raise Internal(f"{self.title} failed: {error}") from error

    def work(self) -> None:
        while (batch := self.batcher.take()) is not None:
            self.run(batch)

    def run(self, batch: Batch) -> None:
        try:
            inputs = batch.inputs()
            outputs = self.computed(inputs, batch.size)
            batch.answer(outputs)
        except Crashed as error:
            for part in batch.split():
                self.blame()
                part.fail(UNAVAILABLE, f"{self.title}: {error}")
        except (RunFailed, ValueError) as error:
            self.retry(batch, str(error))
        except Exception as error:  # a thread that ends would leave its version without an answer
            log.exception("%s: a batch of %s rows", self.title, batch.rows)
            self.retry(batch, f"{type(error).__name__}: {error}")
        else:
            if batch.notes:
                self.keep([self.noted(batch, note, inputs, outputs) for note in batch.notes])

    def computed(self, inputs: Arrays, requests: int) -> Arrays:
        self.running.append(requests)
        try:
            return self.model.run(inputs)
        finally:
            self.running.remove(requests)

    def retry(self, batch: Batch, problem: str) -> None:
        """One by one, so that a request fails for itself only."""
        parts = batch.split()
        if len(parts) == 1:
            self.blame()
            parts[0].fail(INTERNAL, f"{self.title} failed: {problem}")
            return
        for part in parts:
            self.run(part)

    def noted(self, batch: Batch, note: Note, inputs: Arrays, outputs: Arrays) -> Noted:
        """With copies: a view would keep the whole batch in memory for as long as the log waits."""
        rows = slice(note.start, note.stop) if self.model.batched else slice(None)
        given, given_back = (
            {name: array[rows].copy() for name, array in arrays.items()} if note.logged else {}
            for arrays in (inputs, outputs)
        )
        return Noted(note, given, given_back, monotonic_ns(), batch.rows)

    def keep(self, noted: Sequence[Noted]) -> None:
        with self.lock:
            is_first = not self.untold
            self.untold += noted
            is_much = len(self.untold) >= UNTOLD_MAX
        if is_much:
            self.loop.call_soon_threadsafe(self.tell_noted)
        elif is_first:
            self.loop.call_soon_threadsafe(self.loop.call_later, TOLD_EVERY_S, self.tell_noted)

    def tell_noted(self) -> None:
        with self.lock:
            noted, self.untold = self.untold, []
        if noted:
            self.tell(noted)

    def blame(self) -> None:
        with self.lock:
            self.blamed += 1

    def faults(self) -> int:
        """Requests that failed for what the version did, which is what a canary is judged by: not
        those that came too late or found it full."""
        with self.lock:
            return self.blamed

    def refuse(self, code: int, began_ns: int) -> None:
        """Counts a request that was refused before it joined."""
        requests, spent_ns = self.refused.get(code, (0, 0))
        self.refused[code] = (requests + 1, spent_ns + monotonic_ns() - began_ns)

    def counts(self) -> Counts:
        counts = self.streamed.counts(0) if self.model.decoupled else self.batcher.counts()
        failures = dict(counts.failures)
        for code, (requests, spent_ns) in self.refused.items():
            known, known_ns = failures.get(code, (0, 0))
            failures[code] = (known + requests, known_ns + spent_ns)
        return counts._replace(failures=failures)

    def fell(self, cause: str) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.crashed, self, cause)

    async def close(self) -> None:
        """Whoever is in line is answered first."""
        if self.sequencer is not None:
            self.sequencer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STREAMS_END_S):
                await self.quiet.wait()
        self.is_closed = True
        self.batcher.close()
        for thread in self.threads:
            await asyncio.to_thread(thread.join)
        self.tell_noted()
        self.pool.shutdown(wait=False)
        await asyncio.to_thread(self.model.close)
