"""`leptonic demo`: the whole loop on real data, from nothing, with a time for each stage."""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from leptonic import launch, rounds, show, stackfile, story
from leptonic.client import Client
from leptonic.errors import Error
from leptonic.predictor import Answer, Predictor
from leptonic.watch import Stalled, Watch, at

DATASET = MODEL = "digits"
FIRST_COUNT = 1200
DRIFTED_COUNT = 600
HELD_OUT_OFFSET = 1500
HELD_OUT_COUNT = 297
"""The digits from 1,500 to the last: never published."""
ACCURACY_MIN = 0.9
PUBLISH_S = 60.0
TRAINING_S = 90.0
DRIFT_S = 60.0
LOGGED_S = 15.0
CANARY_BATCH = 25
PROMISED_S = 90.0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Held-out rows with their labels."""

    pixels: list[list[float]]
    labels: list[int]


NOTHING = Sample([], [])


@dataclasses.dataclass
class Demo:
    """One run of it."""

    root: Path
    watch: Watch
    client: Client
    predictor: Predictor
    run: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex[:8])
    """Part of every message id: publishing again is not taken for a repetition."""
    accuracy: dict[str, float] = dataclasses.field(default_factory=dict)
    plain: Sample = NOTHING
    drifted: Sample = NOTHING

    def first_round(self) -> None:
        """Steps 1 to 4: apply, publish, follow, predict."""
        applied = self.client.apply(self.root / "examples" / "digits.yaml")
        rounds.until_known(self.client, DATASET)
        self.watch.mark("pipeline applied", f"digits.yaml, revision {applied['revision']}")
        self.publish("publishing digits", "--count", str(FIRST_COUNT))
        with self.held_out() as plain, self.held_out("--drift") as drifted:
            deployed = rounds.follow(self.watch, DATASET, MODEL, TRAINING_S)
            self.plain, self.drifted = sample_of(plain), sample_of(drifted)
        self.measure("held-out digits", self.plain)
        rounds.promote(self.watch, deployed, MODEL, Traffic(self, self.plain))
        self.enough("held-out digits")

    def second_round(self) -> None:
        """Step 5: drift, retrain, canary, promotion."""
        self.measure("drifted digits before", self.drifted)
        self.watch.forget()
        self.publish("publishing drifted digits", "--drift", "--count", str(DRIFTED_COUNT))
        found = self.watch.event(
            "drift.detected",
            lambda data: bool(data["dataset"] == DATASET),
            DRIFT_S,
            "waiting for drift to be noticed",
        )
        drift = found["data"]
        numbers = f"{drift['feature']}: psi {drift['psi']:.2f} > {drift['threshold_psi']:.2f}"
        self.watch.mark("drift detected", f"{numbers}, ks {drift['ks']:.2f}", at(found))
        deployed = rounds.follow(self.watch, DATASET, MODEL, TRAINING_S)
        rounds.promote(self.watch, deployed, MODEL, Traffic(self, self.drifted))
        self.measure("drifted digits after", self.drifted)
        self.enough("drifted digits after")

    def publish(self, stage: str, *options: str) -> None:
        """Runs the stranger's program."""
        script = self.root / "examples" / "publish_digits.py"
        where = ["--nats", self.client.stack.endpoint("nats"), "--run", f"{self.run}-"]
        self.watch.doing(stage)
        said = rounds.output_of([str(script), *where, *options], PUBLISH_S)
        self.watch.mark("published", said.strip())

    def held_out(self, *options: str) -> "subprocess.Popen[str]":
        """Reads the digits that are never published, while something else goes on."""
        script = str(self.root / "examples" / "publish_digits.py")
        which = ["--offset", str(HELD_OUT_OFFSET), "--count", str(HELD_OUT_COUNT)]
        line = [sys.executable, script, "--print-records", *which, *options]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def measure(self, name: str, sample: Sample) -> None:
        """Predicts every row over gRPC, then tells the true labels."""
        self.watch.doing(f"predicting {name}")
        started = time.monotonic()
        answers = [self.predictor.predict(MODEL, "pixels", [row]) for row in sample.pixels]
        seconds = time.monotonic() - started
        self.feedback(answers, sample.labels)
        right = sum(a.labels == [label] for a, label in zip(answers, sample.labels, strict=True))
        self.accuracy[name] = right / len(answers)
        by_version = ", ".join(f"version {v}" for v in sorted({a.version for a in answers}))
        text = f"accuracy {self.accuracy[name]:.4f} of {len(answers)} rows by {by_version}"
        self.watch.mark(name, f"{text}, {1e3 * seconds / len(answers):.1f} ms each")

    def feedback(self, answers: list[Answer], labels: list[int]) -> None:
        for answer, label in zip(answers, labels, strict=True):
            self.client.feedback(MODEL, answer.request_id, label)

    def enough(self, name: str) -> None:
        if self.accuracy[name] < ACCURACY_MIN:
            raise Stalled(f"{name}: accuracy {self.accuracy[name]:.4f} is below {ACCURACY_MIN}")

    def told(self) -> dict[str, Any]:
        """Step 6: one more prediction, and the story behind it once it is logged."""
        self.watch.doing("waiting for the trace of a prediction")
        answer = self.predictor.predict(MODEL, "pixels", self.drifted.pixels[:1])
        deadline = time.monotonic() + LOGGED_S
        while True:
            try:
                told = self.client.trace(answer.request_id)
                if "ingest" in story.services_of(told) or time.monotonic() > deadline:
                    self.watch.mark("traced", f"prediction {answer.request_id}")
                    return {"request_id": answer.request_id, **told}
            except Error as error:
                if error.code != "NOT_FOUND" or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)


def sample_of(reading: "subprocess.Popen[str]") -> Sample:
    said, problem = reading.communicate(timeout=PUBLISH_S)
    if reading.returncode:
        raise Stalled(f"reading held-out digits ended with {reading.returncode}:\n{problem}")
    records = [json.loads(line) for line in said.splitlines()]
    return Sample([one["pixels"] for one in records], [one["label"] for one in records])


class Traffic:
    """Requests with feedback, some at a time, round and round the held-out rows."""

    def __init__(self, demo: Demo, sample: Sample) -> None:
        self.demo = demo
        self.sample = sample
        self.next = 0

    def __call__(self) -> None:
        rows = [(self.next + n) % len(self.sample.labels) for n in range(CANARY_BATCH)]
        self.next += CANARY_BATCH
        answers = [
            self.demo.predictor.predict(MODEL, "pixels", [self.sample.pixels[n]]) for n in rows
        ]
        self.demo.feedback(answers, [self.sample.labels[n] for n in rows])


@contextlib.contextmanager
def embedded(data_dir: Path, console: Console, keep: bool) -> Iterator[stackfile.Stack]:
    """The stack on a folder: one that runs there stays, one started here is stopped at the end."""
    if stackfile.runs_on(data_dir):
        yield stackfile.locate(data_dir)
        return
    process = launch.in_background(data_dir, ("--ports", "auto"), tethered=not keep)
    stopping = True
    try:
        yield launch.wait_ready(data_dir, process)
        stopping = not keep
    finally:
        if stopping:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            seconds = launch.stop(process.pid)
            process.wait()
            console.print(Text(f"stopped every process in {seconds:.1f} s", style="dim"))


def stop_on_signals() -> None:
    """SIGTERM ends a demo as Ctrl-C does, and so does SIGINT where a shell had it ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def interrupt(*_: int | FrameType | None) -> None:
    raise KeyboardInterrupt


def run(starting: AbstractContextManager[stackfile.Stack], console: Console) -> dict[str, Any]:
    """The six steps; returns what was measured. Raises `Error`."""
    stop_on_signals()
    root = launch.platform_root()
    watch = Watch(console, time.time())
    with watch.status:
        watch.doing("starting the servers and the six services")
        with starting as stack, Client(stack) as client:
            watch.mark("stack ready", f"{len(stack.processes)} processes of {stack.source}")
            watch.attach(client)
            with Predictor(stack.endpoint("inference_grpc")) as predictor:
                demo = Demo(root, watch, client, predictor)
                demo.first_round()
                demo.second_round()
                told = demo.told()
            watch.status.stop()
            console.print(summary(demo, told))
    return result(demo, told)


def result(demo: Demo, told: dict[str, Any]) -> dict[str, Any]:
    marks = demo.watch.marks
    return {
        "accuracy": demo.accuracy,
        "stages": [dataclasses.asdict(mark) for mark in marks],
        "ready_s": marks[0].seconds,
        "loop_s": marks[-1].at - marks[0].at,
        "request_id": told["request_id"],
        "trace_id": told["trace_id"],
        "services": story.services_of(told),
    }


def summary(demo: Demo, told: dict[str, Any]) -> RenderableType:
    """What was reached, how long each stage took, one story, where to look further."""
    marks = demo.watch.marks
    times = Table(title="the loop, stage by stage", title_justify="left", title_style="bold")
    for name in ("stage", "seconds", "what came of it"):
        times.add_column(name, justify="right" if name == "seconds" else "left")
    for mark in marks:
        times.add_row(mark.stage, f"{mark.seconds:.1f}", Text(mark.detail, overflow="fold"))
    reached = Table(title="accuracy", title_justify="left", title_style="bold", box=None)
    for name, value in demo.accuracy.items():
        reached.add_row(name, Text(f"{value:.4f}", style="bold green"))
    loop = f"the loop took {marks[-1].at - marks[0].at:.1f} s (promised: {PROMISED_S:.0f})"
    took = f"ready in {marks[0].seconds:.1f} s, {loop}"
    if demo.accuracy["drifted digits before"] >= ACCURACY_MIN:
        took += "; the champion of this folder had learned this drift in a run before"
    where = further(demo.client.stack, told["request_id"])
    return show.stacked(story.tree(told), times, reached, Text(took, style="bold"), where)


def further(stack: stackfile.Stack, request_id: str) -> RenderableType:
    options = f" {stack.options}" if stack.options else ""
    lines = [
        ("the same story again", f"leptonic trace {request_id}{options}"),
        ("its model and lineage", f"leptonic models models:/{MODEL}@champion{options}"),
        ("everything that happened", f"leptonic events --after 0{options}"),
        ("training jobs, epoch by epoch", f"leptonic jobs{options}"),
        ("the traces as JSON", f"{stack.endpoint('traces')}/v1/traces"),
        ("the platform API", f"{stack.endpoint('registry')}/openapi.json"),
    ]
    title = f"where to look further; `leptonic up{options}` starts it where it does not run"
    drawn = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    for what, how in lines:
        drawn.add_row(what, Text(how, style="cyan"))
    return drawn
