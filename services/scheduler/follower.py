"""A standby reads the log along, so that taking over costs the lines it has not read yet.

It follows only a leader that decides by the same code: what another release keeps between two
decisions may differ although the decisions do not, and its checkpoint would disagree later.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator

from libs.database import TRANSIENT
from services.scheduler import garbage, lease, meters
from services.scheduler.domain import Scheduler
from services.scheduler.jobs import Key
from services.scheduler.store import Diverged, Store, Unknown

log = logging.getLogger(__name__)
FOLLOW_S = 0.25
"""Between two looks at the log."""


@contextlib.asynccontextmanager
async def following(store: Store) -> AsyncIterator["Follower"]:
    follower = Follower(store)
    follower.task = asyncio.create_task(follower.follow())
    try:
        yield follower
    finally:
        follower.task.cancel()
        await asyncio.gather(follower.task, return_exceptions=True)


class Follower:
    """The state of whoever leads, a little late."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.scheduler: Scheduler | None = None
        self.base: int | None = None
        """Where the last checkpoint is."""
        self.changed: deque[tuple[int, set[Key]]] = deque()
        """What changed until a line, since the last checkpoint."""
        self.over = asyncio.Event()
        self.task: asyncio.Task[None]

    async def follow(self) -> None:
        """Until told that it is over; then it is not in the middle of a line."""
        while not await self.is_over(FOLLOW_S):
            try:
                await self.look()
            except TRANSIENT as error:
                log.warning("following: %s", error)
            except (Diverged, Unknown) as error:
                log.warning("follows no more: %s", error)
                self.scheduler = None
                return

    async def is_over(self, after_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(after_s):
                await self.over.wait()
        return self.over.is_set()

    async def look(self) -> None:
        if not await lease.leads_alike(self.store.db):
            return
        if self.scheduler is None:
            with garbage.paused():
                self.scheduler = await self.store.load()
            self.base = self.store.base
            self.note(self.scheduler)
        else:
            await self.catch_up(self.scheduler)
        meters.FOLLOWED.set(self.scheduler.sequence)

    async def catch_up(self, scheduler: Scheduler) -> None:
        """Raises `Diverged` and `Unknown`."""
        self.base = await self.store.follow(scheduler, self.base)
        self.note(scheduler)

    def note(self, scheduler: Scheduler) -> None:
        """What was touched, until it is in a checkpoint."""
        if scheduler.touched:
            self.changed.append((scheduler.sequence, scheduler.touched))
            scheduler.touched = set()
        while self.changed and self.base is not None and self.changed[0][0] <= self.base:
            self.changed.popleft()

    async def ended(self) -> Scheduler | None:
        """The state at the log's end, for who leads now; None where nobody was followed."""
        self.over.set()
        await self.task
        meters.FOLLOWED.set(0)
        if self.scheduler is None:
            return None
        try:
            await self.catch_up(self.scheduler)
        except (Diverged, Unknown) as error:
            log.warning("reads all again: %s", error)
            return None
        self.store.base = self.base
        self.scheduler.touched.update(*(keys for _, keys in self.changed))
        return self.scheduler
