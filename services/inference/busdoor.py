"""Inference over the bus: a request on `predict.<project>.<model>`, the answer to its inbox.

The bodies are those of HTTP, and so is the header for binary tensors. Nothing is kept: replicas
that serve a model share its requests, and where there is none the caller is told at once.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from functools import partial
from time import perf_counter

import msgspec

from libs.bus import PAYLOAD_BYTES_MAX, TRACE_HEADER, Bus, Reply, Request
from libs.doors import Exhausted, Internal, Refused
from libs.doors.metrics import count
from libs.doors.serve import background
from services.inference.bodies import HEADER_LENGTH, Exchange
from services.inference.compression import TooLarge
from services.inference.endpoints import Key

log = logging.getLogger(__name__)
GROUP = "predict"
VERSION_HEADER = "model-version"
STATUS_HEADER = "status"
RETRY_HEADER = "retry-after"
RETRY_AFTER_S = "1"
PATIENCE_S = 60.0
"""No request waits longer, whatever `timeout` it asks for."""
POLL_S = 0.2
ANSWER_BYTES_MAX = PAYLOAD_BYTES_MAX - (64 << 10)
"""The broker counts the headers too."""


class BusDoor:
    def __init__(self, bus: Bus, exchange: Exchange) -> None:
        self.bus = bus
        self.exchange = exchange
        self.open: dict[str, contextlib.AsyncExitStack] = {}
        """Subject -> what closes it."""
        self.closing: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Answers for every model that is served; when the block ends, what was accepted."""
        try:
            async with background(self.follow()):
                yield
        finally:
            for subject in list(self.open):
                self.close(subject)
            await asyncio.gather(*self.closing)

    async def follow(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(POLL_S)

    async def look(self) -> None:
        """Listens for what is served now or sleeps, and for nothing else."""
        endpoints = self.exchange.endpoints
        routed = [key for key in endpoints.by_key if endpoints.is_routed(key)]
        keys = [*routed, *endpoints.elsewhere.asleep()]
        served = {subject_of(key): endpoints.name_of(key) for key in keys}
        for subject in self.open.keys() - served.keys():
            self.close(subject)
        for subject in served.keys() - self.open.keys():
            stack = contextlib.AsyncExitStack()
            answer = partial(self.answer, served[subject])
            await stack.enter_async_context(self.bus.respond(subject, GROUP, answer))
            self.open[subject] = stack

    def close(self, subject: str) -> None:
        """In its own time: what it accepted may still be computed."""
        task = asyncio.create_task(self.open.pop(subject).aclose())
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)

    async def answer(self, model: str, request: Request) -> Reply:
        began = perf_counter()
        try:
            reply = await self.infer(model, request)
        except Refused as error:
            reply = refusal(error)
        except Exception as error:  # who asked would wait until it gives up
            log.exception("a request on %s failed", request.subject)
            reply = refusal(Internal(f"Unexpected {type(error)}: {error}"))
        count("bus", f"{GROUP}.*", reply.headers[STATUS_HEADER], began)
        return reply

    async def infer(self, model: str, request: Request) -> Reply:
        """Raises `Refused`."""
        headers = request.headers
        body = await self.exchange.infer(
            model,
            headers.get(VERSION_HEADER, ""),
            request.payload,
            headers.get(HEADER_LENGTH),
            headers.get(TRACE_HEADER, ""),
            PATIENCE_S,
        )
        size = len(body.payload)
        if size > ANSWER_BYTES_MAX:
            raise TooLarge(f"the answer has {size} bytes, a message at most {ANSWER_BYTES_MAX}")
        length = {HEADER_LENGTH: str(body.header_length)} if body.header_length else {}
        return Reply(body.payload, {STATUS_HEADER: "200", **length})


def subject_of(key: Key) -> str:
    project, model = key
    return f"{GROUP}.{project}.{model}"


def refusal(error: Refused) -> Reply:
    full = isinstance(error, Exhausted)
    headers = {STATUS_HEADER: "503" if full else str(error.http_status)}
    if full:
        headers[RETRY_HEADER] = RETRY_AFTER_S
    return Reply(msgspec.json.encode({"error": str(error)}), headers)
