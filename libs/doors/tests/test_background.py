"""The jobs beside a service end when it does."""

import asyncio

import pytest

from libs.doors.serve import background


@pytest.mark.parametrize("turns", range(6))
async def test_a_job_that_misses_its_cancellation_is_cancelled_again(turns: int) -> None:
    """`asyncio.wait_for` of Python 3.11 loses a cancellation that meets its result."""
    rang = asyncio.Event()

    async def job() -> None:
        while True:
            async with asyncio.timeout(60):
                await rang.wait()
            rang.clear()

    async with asyncio.timeout(10), background(job()):
        for _ in range(10):
            await asyncio.sleep(0)
        rang.set()
        for _ in range(turns):
            await asyncio.sleep(0)


async def test_a_job_that_fails_ends_the_service() -> None:
    async def job() -> None:
        raise ValueError("broken")

    with pytest.raises(ExceptionGroup) as failed:
        async with background(job()):
            await asyncio.Event().wait()
    assert [str(one) for one in failed.value.exceptions] == ["broken"]
