"""Keeps a table of programs running: starts them as early as they may, restarts what dies,
stops them in the opposite order, and leaves nothing behind.
"""

import asyncio
import logging
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from stack import guard, process
from stack.process import NotReady, Program

log = logging.getLogger(__name__)
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
HAND_OVER_S = 40.0
"""For who is replaced to answer what it was asked."""
STEADY_S = 30.0
"""Up for so long, a program's next failure is its first again."""


@dataclass
class Member:
    """A program and its life so far."""

    program: Program
    log: Path
    running: subprocess.Popen[bytes] | None = None
    beside: set[int] = field(default_factory=set)
    """Process ids of its successor, not ready yet, or of its predecessor, not gone yet."""
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    was_ready: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    restarts: int = 0
    failures: int = 0
    """In a row."""


class Supervisor:
    """Runs on one event loop, in the main thread: its programs are tethered to that."""

    def __init__(
        self,
        programs: Sequence[Program],
        logs: Path,
        say: Callable[[str], None],
        changed: Callable[[], None],
    ) -> None:
        self.members = {p.name: Member(p, logs / f"{p.name}.log") for p in programs}
        self.say = say
        self.changed = changed
        self.preparing = 0
        for member in self.members.values():
            assert set(member.program.after) <= set(self.members), member.program

    async def run(self, stop: asyncio.Event) -> None:
        """Returns after `stop` was set and everything has ended.

        Raises `NotReady` when a program is not ready `process.READY_S` after the start.
        """
        guard.adopt_orphans()
        begun = monotonic()
        keepers = [asyncio.create_task(self.keep(m, begun)) for m in self.members.values()]
        starting = asyncio.create_task(self.started(begun))
        stopping = asyncio.create_task(stop.wait())
        try:
            await ends_first(stopping, starting, *keepers)
            await ends_first(stopping, *keepers)
        finally:
            for task in (starting, stopping, *keepers):
                task.cancel()
            await asyncio.gather(starting, stopping, *keepers, return_exceptions=True)
            await asyncio.gather(*(self.stop(member) for member in self.members.values()))
            await self.sweep()

    async def started(self, begun: float) -> None:
        try:
            async with asyncio.timeout(process.READY_S):
                for member in self.members.values():
                    await member.was_ready.wait()
        except TimeoutError as error:
            late = [m for m in self.members.values() if not m.was_ready.is_set()]
            told = "\n".join(f"{m.program.name}: {process.tail(m.log)}" for m in late)
            raise NotReady(f"not ready after {process.READY_S:.0f} s\n{told}") from error
        self.say(f"ready: {len(self.members)} processes in {monotonic() - begun:.1f} s")

    async def keep(self, member: Member, begun: float) -> None:
        """Starts a program once what it needs is there, and again whenever it ends."""
        name = member.program.name
        for needed in member.program.after:
            await self.members[needed].was_ready.wait()
        while True:
            started = monotonic()
            code = await self.run_once(member, begun)
            await self.sweep()
            if monotonic() - started > STEADY_S:
                member.failures = 0
            pause = backoff_s(member.failures)
            member.failures += 1
            member.restarts += 1
            self.changed()
            self.say(
                f"{name}: {how_it_ended(code)}; starting again in {pause:.1f} s ({member.log})"
            )
            await asyncio.sleep(pause)

    async def run_once(self, member: Member, begun: float) -> int:
        """From start to exit; returns the exit code."""
        self.preparing += 1
        try:
            member.running = await process.start(member.program, member.log)
        finally:
            self.preparing -= 1
        self.changed()
        try:
            async with asyncio.TaskGroup() as group:
                probing = group.create_task(self.probe(member, begun))
                code = await self.until_exit(member)
                probing.cancel()
        finally:
            member.ready.clear()
        return code

    async def until_exit(self, member: Member) -> int:
        """Of the process that nobody has replaced; returns its exit code."""
        while True:
            watched = member.running
            assert watched is not None
            code = await process.until_exit(watched)
            if member.running is watched:
                return code

    async def replace(self, name: str) -> None:
        """A new process takes over from the running one, which ends once it has answered.

        Raises `NotReady`; the running one goes on then.
        """
        member = self.members.get(name)
        if member is None or not member.program.doors:
            raise NotReady(f"no service is called {name!r}")
        if not member.ready.is_set():
            raise NotReady(f"{name} is not ready, so that there is nothing to take over")
        started = monotonic()
        leaving = new = await process.start(member.program, member.log)
        member.beside = {new.pid}
        try:
            await process.until_listening(member.program, new, member.log)
            assert member.running is not None
            leaving, member.running = member.running, new
            member.beside = {leaving.pid}
            self.changed()
            self.say(f"{name:<10} taken over after {monotonic() - started:.2f} s (pid {new.pid})")
        finally:
            await process.stop(member.program, leaving, HAND_OVER_S)
            member.beside = set()
        self.say(f"{name:<10} left after {monotonic() - started:.2f} s (pid {leaving.pid})")

    async def probe(self, member: Member, begun: float) -> None:
        """Says when it is ready."""
        assert member.running is not None
        started = monotonic()
        while not await member.program.ready():  # noqa: ASYNC110 - it tells no event
            await asyncio.sleep(process.READY_POLL_S)
        now = monotonic()
        member.ready.set()
        member.was_ready.set()
        self.changed()
        name, pid = member.program.name, member.running.pid
        self.say(
            f"{name:<10} ready at {now - begun:5.2f} s, {now - started:.2f} s after its start"
            f" (pid {pid})"
        )

    async def stop(self, member: Member) -> None:
        """Stops a program after those that need it."""
        for other in self.members.values():
            if member.program.name in other.program.after:
                await other.stopped.wait()
        if member.running is not None:
            await process.stop(member.program, member.running)
        member.stopped.set()

    async def sweep(self) -> None:
        """Ends what ended programs left behind: we inherit it.

        Not while something is being prepared: that has children which are nobody's orphans.
        """
        deadline = monotonic() + guard.SWEEP_S
        own = {m.running.pid for m in self.members.values() if m.running is not None}
        own.update(*(m.beside for m in self.members.values()))
        while not self.preparing and (strays := guard.children(besides=own)):
            guard.end(strays)
            if monotonic() > deadline:
                log.warning("processes %s did not end in %s s", strays, guard.SWEEP_S)
                return
            await asyncio.sleep(guard.POLL_S)


def backoff_s(failures: int) -> float:
    """0.1, 0.2, 0.4, ... 5, 5, ... seconds."""
    return float(min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures, 16)))


def how_it_ended(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


async def ends_first(*tasks: asyncio.Task[None] | asyncio.Task[bool]) -> None:
    """Returns when one of them ends; raises what it raised."""
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
