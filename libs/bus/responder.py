"""Answers many requests of a subject at once, a bounded number, and those it has when it ends."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from libs.bus import ANSWERING_MAX, Answer, Reply, Request

log = logging.getLogger(__name__)
Send = Callable[[Reply], Awaitable[None]]


class Responder:
    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.room = asyncio.Semaphore(ANSWERING_MAX)
        self.running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Responder":
        return self

    async def __aexit__(self, *_: object) -> None:
        """Who has not given up gets an answer."""
        if self.running:
            await asyncio.wait(self.running)

    async def take(self, asked: Request, send: Send) -> None:
        """Returns once there is room for another."""
        await self.room.acquire()
        task = asyncio.create_task(self.run(asked, send))
        self.running.add(task)
        task.add_done_callback(self.done)

    async def run(self, asked: Request, send: Send) -> None:
        await send(await self.answer(asked))

    def done(self, task: asyncio.Task[None]) -> None:
        self.room.release()
        self.running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request was not answered", exc_info=error)
