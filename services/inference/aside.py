"""Work that would hold up the event loop, on a thread: large requests read, large answers written.

Python's threads share one interpreter, so a thread helps only where its calls are short: `tensors`
takes values in parts. Four requests of 10 MB of typed floats, one after the other, held the loop
for 2.0 to 3.3 s at the longest when they were read on it, and for 0.18 to 0.23 s here (four tries
of each by turns; two cores that had six times as much to do).
"""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from libs.doors import Exhausted

IN_PLACE_BYTES = 64 << 10
"""What is done sooner than a thread is found."""
ASIDE_BYTES_MAX = 1 << 30
"""Of all that is on the threads or waits for one."""
P = ParamSpec("P")
T = TypeVar("T")


class Aside:
    held = 0


ASIDE = Aside()


async def aside(size: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Of `size` bytes. Raises `Exhausted`, and what the work raises."""
    if size <= IN_PLACE_BYTES:
        return work(*args, **options)
    if ASIDE.held + size > ASIDE_BYTES_MAX:
        raise Exhausted(f"{ASIDE.held} bytes of others are being read and written already")
    ASIDE.held += size
    try:
        return await asyncio.to_thread(work, *args, **options)
    finally:
        ASIDE.held -= size
