"""A writer at work, and what was written."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from libs.contracts.events import JobRequested
from services.scheduler.stimuli import JobSubmitted
from services.scheduler.writer import Writer


@contextlib.asynccontextmanager
async def led(writer: Writer) -> AsyncIterator[None]:
    writer.leading.set()
    task = asyncio.create_task(writer.write())
    try:
        yield
    finally:
        writer.leading.clear()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def job(name: str) -> JobSubmitted:
    return JobSubmitted(JobRequested(project="p", job=name, kind="train"))


async def scheduled(writer: Writer) -> list[tuple[str, str]]:
    """(job, state) of all there are."""
    return await writer.read(lambda now: [(key[1], job.state) for key, job in now.jobs.items()])
