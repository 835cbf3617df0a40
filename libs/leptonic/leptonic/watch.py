"""Following a loop on its events: waiting for what should happen, with a time for each stage."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from leptonic import show
from leptonic.client import Client
from leptonic.errors import Error

POLL_S = 0.1
EVENTS_MAX = 1000
REASON_SHOWN = 1500
UNREACHABLE_MAX_S = 20.0
"""A service that is being restarted answers again; waiting goes on for so long."""

Data = Mapping[str, Any]
Wanted = Callable[[Data], bool]


class Stalled(Error):
    """A stage did not complete; the text says what was waited for, and what went wrong."""


@dataclasses.dataclass(frozen=True)
class Mark:
    """A stage that completed: when (Unix seconds), and how long after the one before."""

    stage: str
    detail: str
    at: float
    seconds: float


@dataclasses.dataclass
class Elapsed:
    """A line that counts while something is waited for."""

    text: str
    started: float = dataclasses.field(default_factory=time.monotonic)

    def __rich__(self) -> Text:
        return Text(f"{time.monotonic() - self.started:5.1f} s  {self.text}", style="cyan")


class Watch:
    """Stage after stage of one loop, read from the platform's event feed."""

    def __init__(self, console: Console, started_at: float) -> None:
        self.console = console
        self.started_at = started_at
        self.marks: list[Mark] = []
        self.line = Elapsed("")
        self.status = Status(self.line, console=console)
        self.client: Client | None = None
        self.seen: list[dict[str, Any]] = []
        self.after = 0
        self.dead_after = 0
        self.heard = time.monotonic()

    def attach(self, client: Client) -> None:
        """From now on: what happened on this data folder before is not looked at."""
        self.client = client
        self.after = end_of(client.events)
        self.dead_after = end_of(client.dead_letters)

    def forget(self) -> None:
        """From now on only what happens next counts."""
        self.poll()
        self.seen.clear()

    def doing(self, text: str) -> None:
        self.line.text, self.line.started = text, time.monotonic()

    def mark(self, stage: str, detail: str = "", at: float | None = None) -> None:
        """Notes a stage as done and says so."""
        last = self.marks[-1].at if self.marks else self.started_at
        when = max(last, time.time() if at is None else at)
        self.marks.append(Mark(stage, detail, when, when - last))
        text = Text(f"{when - self.started_at:6.1f} s  ", style="dim")
        text.append(f"{stage:<34}", style="bold green")
        text.append(f" {when - last:5.1f} s  ", style="green")
        self.console.print(text.append(detail), soft_wrap=True)

    def event(
        self,
        kind: str,
        wanted: Wanted,
        timeout_s: float,
        waiting: str,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """The first such event since `attach`, e.g. `job.succeeded`; waits for it.

        Raises `Stalled` when a job or a gate failed meanwhile, or at the deadline.
        """
        self.doing(waiting)
        deadline = time.monotonic() + timeout_s
        index = 0
        while True:
            while index < len(self.seen):
                one = self.seen[index]
                index += 1
                if is_kind(one, kind) and wanted(one["data"]):
                    return one
            self.refuse_failures()
            if time.monotonic() > deadline:
                problem = f"{waiting}: no {kind} within {timeout_s:.0f} s"
                raise Stalled(f"{problem}\n{self.diagnosis()}")
            if meanwhile is not None:
                meanwhile()
            self.poll()

    def poll(self) -> None:
        """Reads on; a registry that is away for a moment is asked again."""
        assert self.client is not None
        try:
            found, self.after = self.client.events(self.after, EVENTS_MAX)
            self.heard = time.monotonic()
        except Error as error:
            is_away = error.code in ("UNREACHABLE", "UNAVAILABLE")
            if not is_away or time.monotonic() - self.heard > UNREACHABLE_MAX_S:
                raise
            found = []
        for one in found:
            self.tell(one)
        self.seen += found
        if not found:
            time.sleep(POLL_S)

    def tell(self, event: Data) -> None:
        """The waiting line shows a training's progress as it comes."""
        if is_kind(event, "job.progressed"):
            data = event["data"]
            metrics = show.short(data["metrics"])
            self.line.text = f"epoch {data['epoch']}/{data['epochs']} {metrics}"

    def refuse_failures(self) -> None:
        for one in self.seen:
            data = one["data"]
            if is_kind(one, "job.failed"):
                reason = str(data["reason"])[-REASON_SHOWN:]
                raise Stalled(f"job {data['job']} failed on attempt {data['attempt']}: {reason}")
            if is_kind(one, "model_version.gated") and not data["passed"]:
                failed = [sentence_of(one) for one in data["checks"] if not one.get("passed")]
                problem = f"{data['model']} version {data['number']} failed its gate"
                raise Stalled(f"{problem}: {'; '.join(failed)}")

    def diagnosis(self) -> str:
        """What the platform itself says: dead letters, jobs that wait, the last events."""
        return "\n".join(self.symptoms())

    def symptoms(self) -> Iterator[str]:
        assert self.client is not None
        try:
            letters, _ = self.client.dead_letters(self.dead_after)
            yield from (f"dead letter {one['subject']}: {one['reason']}" for one in letters[-3:])
            for job in self.client.jobs():
                if job["state"] not in ("succeeded", "running"):
                    yield f"job {job['job']} is {job['state']}: {job['reason']}"
        except Error as error:
            yield str(error)
        yield from (f"last event: {show.event_line(one)}" for one in self.seen[-3:])


def sentence_of(check: Data) -> str:
    """A gate's check in words."""
    return str(check.get("sentence") or show.short(check))


def is_kind(event: Data, kind: str) -> bool:
    """`job.succeeded` of `events.<project>.job.succeeded`."""
    return str(event["subject"]).split(".", 2)[-1] == kind


def at(event: Data) -> float:
    """When it was emitted, Unix seconds."""
    return datetime.fromisoformat(event["time"]).timestamp()


def end_of(read: Callable[[int, int], tuple[list[dict[str, Any]], int]]) -> int:
    """The sequence of the last message so far."""
    last = 0
    while True:
        found, last = read(last, EVENTS_MAX)
        if not found:
            return last
