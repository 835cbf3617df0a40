"""A model in a process of its own: its crash is one request's error, not the service's end.

A thread for each model keeps a worker alive and hands out what it says; see `worker` for the other
side.
"""

import contextlib
import errno
import itertools
import logging
import math
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from time import monotonic, sleep
from typing import NamedTuple

import msgspec
import numpy as np

from libs.contracts.artifacts import Signature
from services.inference.channel import Arrays, Channel, Message
from services.inference.models import Crashed, RunFailed, Unloadable
from services.inference.process import cause_of, started
from services.inference.worker import Spec

log = logging.getLogger(__name__)
RUN_S_MAX = 120.0
"""A batch that takes longer never ends; so does a stream that is silent for so long."""
START_S_MAX = 120.0
BACK_S_MAX = 10.0
"""What a batch waits for the next worker."""
END_S_MAX = 5.0
LOOK_S = 0.002
"""Between two looks at a process that is to end."""
BACKOFF_S_MAX = 30.0
FALLS_MAX = 10
"""More of them in a row lengthen the pause no further."""
ANSWERS_WAITING_MAX = 1024
"""Of one stream whose client does not read."""
LINES_KEPT = 12
LINE_CHARS_MAX = 10_000
SAID_CHARS_MAX = 600
HUNG = "was killed: it gave no answer for {:g} s"
EXITED = os.WEXITED | os.WNOWAIT
GONE = (errno.EPIPE, errno.ECONNRESET, errno.EBADF)
"""What is sent to a worker that has left, or is buried, says so."""
NOISE = ("services/inference/worker.py", "<frozen runpy>", "Extension modules:")
"""Of a crash's traceback: what is not the model's."""


class Ended(NamedTuple):
    """Instead of an answer."""

    cause: str


Answers = SimpleQueue[tuple[Message, Arrays] | Ended]


class Worker:
    """One process, our end of its channel, and what it said last."""

    def __init__(self, spec: Spec, given: Arrays) -> None:
        version = f" version {spec.version}" if spec.version else ""
        self.title = f"worker of model '{spec.name}'{version}"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(ours)
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)
        self.why = ""
        self.heard_s = 0.0
        """When it said anything, to whomever."""
        self.answered = False
        self.reaping = Lock()
        with theirs, contextlib.ExitStack() as failed:
            failed.callback(ours.close)
            self.process = started(theirs.fileno())
            failed.pop_all()
        self.listener = Thread(target=self.listen, name=self.title, daemon=True)
        self.listener.start()
        self.send(Message(text=msgspec.json.encode(spec).decode()), given)

    def listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as said:
            for line in map(str.strip, iter(partial(said.readline, LINE_CHARS_MAX), "")):
                if line and not any(one in line for one in NOISE):
                    self.lines.append(line)
                    log.info("%s: %s", self.title, line)

    def send(self, message: Message, arrays: Arrays | None = None) -> None:
        """Whether the process is still there is said by its silence only. Raises `OSError` when it
        is, and cannot be told."""
        try:
            self.channel.send(message, arrays)
        except OSError as error:
            if error.errno not in GONE:
                raise

    def first_words(self) -> Message:
        """Once it can serve; or its error, or why it cannot."""
        self.channel.sock.settimeout(START_S_MAX)
        try:
            received = self.channel.receive()
        except TimeoutError:
            self.kill(f"was killed: it was not ready after {START_S_MAX:g} s")
            received = None
        self.channel.sock.settimeout(None)
        self.bound(socket.SO_SNDTIMEO)
        if received is None:
            return Message(error=self.end())
        if received[0].error is not None:
            self.why = f"did not start: {received[0].error}"
        return received[0]

    def bound(self, option: int) -> None:
        """What the socket waits for at most; a timeout of Python's would cost a poll a call."""
        fraction, whole = math.modf(RUN_S_MAX)
        patience = struct.pack("ll", int(whole), int(fraction * 1e6))
        self.channel.sock.setsockopt(socket.SOL_SOCKET, option, patience)

    def kill(self, why: str) -> None:
        """With whatever the model started. Reaped, its number may be anybody's."""
        with self.reaping:
            if self.process.returncode is None:
                self.why = why
                os.killpg(self.process.pid, signal.SIGKILL)

    def exited(self, patience_s: float) -> bool:
        """It is not reaped by that."""
        until_s = monotonic() + patience_s
        with contextlib.suppress(ChildProcessError):  # reaped by `end`
            while os.waitid(os.P_PID, self.process.pid, EXITED | os.WNOHANG) is None:
                if monotonic() > until_s:
                    return False
                sleep(LOOK_S)
        return True

    def let_go(self) -> None:
        """It finishes what it does, says so, and ends."""
        with contextlib.suppress(OSError):
            self.channel.sock.shutdown(socket.SHUT_WR)
        if not self.exited(END_S_MAX):
            self.kill(f"was killed: it did not end within {END_S_MAX:g} s")

    def reaped(self) -> int:
        """Its exit code. What it started goes with it."""
        self.exited(math.inf)
        with self.reaping:
            if self.process.returncode is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            return self.process.wait()

    def end(self, doing: str = "") -> str:
        """Of a process that has left its channel: why it ended."""
        self.let_go()
        code = self.reaped()
        with contextlib.suppress(OSError):
            self.channel.sock.shutdown(socket.SHUT_RDWR)
        self.channel.close()
        self.listener.join(END_S_MAX)
        cause = f"{self.title} {self.why or cause_of(code)}{doing}"
        said = " | ".join(self.lines)[-SAID_CHARS_MAX:]
        return f"{cause}; it said: {said}" if said else cause


def pause_s(falls: int) -> float:
    """The first start and the first after a crash are at once."""
    return 0.0 if falls < 2 else min(2.0 ** (min(falls, FALLS_MAX) - 3), BACKOFF_S_MAX)


class Isolated:
    """The model as the batcher knows it."""

    parallel: int | None = 1

    def __init__(
        self,
        spec: Spec,
        digest: str = "",
        *,
        graph: bytes = b"",
        signature: Signature | None = None,
        decoupled: bool = False,
        labels: dict[str, list[str]] | None = None,
        on_crash: Callable[[str], None] | None = None,
        keeps: object = None,
    ) -> None:
        """`graph`: unless it is a file of the spec. `signature`: what the worker's graph says when
        None. `on_crash` is told every cause, once for each process, on this model's own thread.
        `keeps` is let go when the model is closed: what the next worker reads, too.
        Raises `Unloadable`."""
        self.spec = spec
        self.given = {"graph": np.frombuffer(graph, np.uint8)} if graph else {}
        self.digest = digest
        self.batched = spec.batched
        self.decoupled = decoupled
        self.platform = "python" if spec.kind == "python" else "onnxruntime_onnx"
        self.labels = labels or {}
        self.on_crash = on_crash
        self.keeps = keeps
        self.crashes = 0
        self.falls = 0
        """In a row, without an answer between them."""
        self.worker: Worker | None = None
        self.waiting: dict[int, Answers] = {}
        self.numbers = itertools.count(1)
        self.turn = Lock()
        self.changing = Lock()
        """Over `up`, `worker` and `waiting`: who asks a worker hears of its end."""
        self.up = Event()
        self.closing = Event()
        told: SimpleQueue[Message] = SimpleQueue()
        self.keeper = Thread(target=self.keep, args=[told], name=spec.name, daemon=True)
        self.keeper.start()
        said = told.get()
        if said.error is not None:
            self.keeper.join()
            raise Unloadable(f"failed to load '{spec.name}': {said.error}")
        self.signature = signature or msgspec.json.decode(said.text, type=Signature)

    def run(self, inputs: Arrays) -> Arrays:
        """One at a time, as a worker computes one at a time; so a crash is one batch's.

        Whoever asked reads the answer: by way of the keeper it took 14 us more.
        """
        with self.turn, self.asked(inputs) as (worker, number, answers):
            message, outputs = self.answer(worker, number) or self.next_of(worker, answers)
        if message.tensors is None:
            raise RunFailed(f"model {self.spec.name}: {message.error or 'it gave no answer'}")
        return outputs

    def answer(self, worker: Worker, number: int) -> tuple[Message, Arrays] | None:
        """None when the worker is gone: then the keeper says why."""
        try:
            while (received := worker.channel.receive()) is not None:
                if received[0].id == number:
                    worker.answered = True
                    return received
        except BlockingIOError:
            worker.kill(HUNG.format(RUN_S_MAX))
        worker.let_go()
        return None

    def stream(self, inputs: Arrays) -> Iterator[Arrays]:
        """Of a decoupled model. The keeper reads, as answers to several come as they like."""
        with self.asked(inputs) as (worker, _, answers):
            last = False
            while not last:
                message, outputs = self.next_of(worker, answers)
                last = message.last
                if message.tensors is not None:
                    yield outputs

    @contextlib.contextmanager
    def asked(self, inputs: Arrays) -> Iterator[tuple[Worker, int, Answers]]:
        number, answers = next(self.numbers), Answers()
        worker = self.joined(number, answers)
        try:
            self.ask(worker, number, inputs)
            yield worker, number, answers
        finally:
            self.waiting.pop(number, None)

    def ask(self, worker: Worker, number: int, inputs: Arrays) -> None:
        try:
            worker.send(Message(number), inputs)
        except OSError as error:
            raise RunFailed(f"model {self.spec.name} could not be asked: {error}") from error

    def joined(self, number: int, answers: Answers) -> Worker:
        """Waits for the next worker where there is none; not for one that fell at its start."""
        while self.up.wait(0 if self.falls > 1 else BACK_S_MAX):
            with self.changing:
                if self.closing.is_set():
                    raise Crashed(f"worker of model '{self.spec.name}' was told to end")
                if self.up.is_set() and self.worker is not None:
                    self.waiting[number] = answers
                    return self.worker
        raise Crashed(f"worker of model '{self.spec.name}' crashed and is not back yet")

    def next_of(self, worker: Worker, answers: Answers) -> tuple[Message, Arrays]:
        said = self.said(worker, answers)
        if isinstance(said, Ended):
            raise Crashed(said.cause)
        if said[0].error is not None:
            raise RunFailed(f"model {self.spec.name}: {said[0].error}")
        return said

    def said(self, worker: Worker, answers: Answers) -> tuple[Message, Arrays] | Ended:
        """While others are told anything it works, and we wait for our turn."""
        asked_s = monotonic()
        while (left_s := max(worker.heard_s, asked_s) + RUN_S_MAX - monotonic()) > 0:
            with contextlib.suppress(Empty):
                return answers.get(timeout=left_s)
        worker.kill(HUNG.format(RUN_S_MAX))
        return answers.get()

    def close(self) -> None:
        self.closing.set()
        with self.changing:
            worker = self.worker
        if worker is not None:
            worker.let_go()
        self.keeper.join()
        self.up.set()
        self.keeps = None

    def keep(self, told: SimpleQueue[Message]) -> None:
        """There is always a worker: the next one starts as soon as one is gone."""
        said: Message | None = None
        while not self.closing.wait(pause_s(self.falls)):
            try:
                worker = self.begin()
            except OSError as error:
                log.error("worker of model '%s' cannot be started: %s", self.spec.name, error)
                if said is None:
                    told.put(Message(error=f"its worker cannot be started: {error}"))
                    return
                self.falls += 1
                continue
            if worker is None:
                return
            is_first, said = said is None, worker.first_words()
            if is_first:
                told.put(said)
            if is_first and said.error is not None:
                worker.end()
                return
            if said.error is None:
                self.attend(worker)
            self.falls = 1 if worker.answered else self.falls + 1
            self.bury(worker)

    def begin(self) -> Worker | None:
        with self.changing:
            if self.closing.is_set():
                return None
            self.worker = Worker(self.spec, self.given)
            return self.worker

    def attend(self, worker: Worker) -> None:
        """Until it is gone."""
        if self.decoupled:
            self.up.set()
            self.hand_out(worker)
        else:
            worker.bound(socket.SO_RCVTIMEO)
            self.up.set()
            os.waitid(os.P_PID, worker.process.pid, EXITED)

    def hand_out(self, worker: Worker) -> None:
        while (received := worker.channel.receive()) is not None:
            worker.answered, worker.heard_s = True, monotonic()
            number = received[0].id
            answers = self.waiting.get(number)
            if answers is None:
                continue
            if answers.qsize() == ANSWERS_WAITING_MAX:
                error = f"{ANSWERS_WAITING_MAX} answers wait already: they are read too slowly"
                received = Message(number, error=error), {}
                self.waiting.pop(number, None)
            answers.put(received)

    def bury(self, worker: Worker) -> None:
        with self.changing:
            self.up.clear()
            waiting, self.waiting = list(self.waiting.values()), {}
        cause = worker.end(" while it ran a batch" if waiting else "")
        for answers in waiting:
            answers.put(Ended(cause))
        if self.closing.is_set():
            return
        self.crashes += 1
        log.error("%s", cause)
        if self.on_crash is not None:
            self.on_crash(cause)


def in_worker(name: str, digest: str, graph: bytes, signature: Signature) -> Isolated:
    """A graph of the platform's own, kept apart all the same. Raises `Unloadable`."""
    spec = Spec(name=name, version="", kind="onnx", batched=True)
    return Isolated(spec, digest, graph=graph, signature=signature)
