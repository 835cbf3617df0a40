"""`leptonic`: every verb on the command line. Exit codes: 0 ok, 1 failed, 2 usage."""

import functools
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.text import Text

from leptonic import bench as benchmarks
from leptonic import compose, fashion, launch, replicas, show, stackfile, story, work
from leptonic import demo as digits
from leptonic import doctor as machine
from leptonic import serve as serving
from leptonic.client import MODEL_SCHEME, Client, model_reference
from leptonic.errors import Error
from leptonic.jsonargument import parsed

FOLLOW_S = 0.3
EVENTS_SHOWN = 30
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's dataset-fashion-mnist puts it."""


class Session:
    """What the options of a command say: which stack, and how to answer."""

    def __init__(
        self, kind: str, data_dir: Path | None, project: str | None, as_json: bool
    ) -> None:
        self.kind = kind
        self.data_dir = data_dir
        self.project = project
        self.as_json = as_json
        self.console = show.console()

    @property
    def folder(self) -> Path:
        return self.data_dir or Path(stackfile.DATA_DIR)

    @property
    def is_compose(self) -> bool:
        return self.kind == "compose"

    def locate(self) -> stackfile.Stack:
        return compose.locate() if self.is_compose else stackfile.locate(self.data_dir)

    def client(self) -> Client:
        return Client(self.locate(), self.project)

    def answer(self, value: Any, rendered: RenderableType) -> None:
        """The same answer for a program or for a person."""
        if self.as_json:
            click.echo(json.dumps(value, indent=2))
        else:
            self.console.print(rendered, soft_wrap=isinstance(rendered, Text))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leptonic")
def main() -> None:
    """Records in, served predictions out, the loop closed."""


def verb(function: Callable[..., None]) -> click.Command:
    """A command with the options every command has; a failure is one line and exit code 1."""

    @functools.wraps(function)
    def run(
        kind: str, data_dir: Path | None, project: str | None, as_json: bool, **arguments: Any
    ) -> None:
        try:
            function(Session(kind, data_dir, project, as_json), **arguments)
        except Error as error:
            click.echo(f"leptonic: {error}", err=True)
            sys.exit(1)

    folder = click.Path(file_okay=False, path_type=Path)
    options = (
        click.option("--json", "as_json", is_flag=True, help="Answer as JSON on stdout."),
        click.option("--project", help="The project; default: the stack's own."),
        click.option("--data-dir", type=folder, help="The stack's folder; default: .leptonic."),
        click.option(
            "--stack",
            "kind",
            type=click.Choice(["embedded", "compose"]),
            default="embedded",
            envvar=stackfile.KIND_VARIABLE,
            help="Processes of this machine, or the containers of compose.yaml.",
        ),
    )
    command: Callable[..., None] = run
    for option in options:
        command = option(command)
    return main.command(name=function.__name__)(command)


@verb
@click.option("--detach", is_flag=True, help="Return once the stack is ready; it runs on.")
@click.option(
    "--ports",
    type=click.Choice(["fixed", "auto"]),
    default="fixed",
    help="The documented ports, or free ones.",
)
@click.option("--roll", is_flag=True, help="Restart the running stack's, and lose no request.")
@click.argument("services", nargs=-1)
def up(session: Session, detach: bool, ports: str, roll: bool, services: tuple[str, ...]) -> None:
    """Start the stack: embedded until Ctrl-C, compose in the background.

    With --roll: one after the other of the SERVICES, or of all, a new process takes over from the
    running one once it can answer.
    """
    if roll:
        told = replicas.roll(services, None if session.is_compose else session.folder)
        return session.answer(told, f"{', '.join(told['rolled'])}: {told['seconds']:.1f} s")
    if services:
        raise click.UsageError("SERVICES go with --roll")
    if session.is_compose:
        return up_in_containers(session, ports)
    options = ("--ports", ports)
    if not detach:
        launch.in_foreground(session.folder, options)
    started = time.monotonic()
    process = launch.in_background(session.folder, options)
    stack = launch.wait_ready(session.folder, process)
    with Client(stack, session.project) as client:
        state = {**client.status(), "ready_after_s": round(time.monotonic() - started, 2)}
    return session.answer(state, show.status(state))


def up_in_containers(session: Session, ports: str) -> None:
    if ports != "fixed":
        raise Error("the ports of containers are set in .env: STACK_..._PORT")
    seconds = compose.up()
    with session.client() as client:
        state = {**client.status(), "ready_after_s": round(seconds, 2)}
    session.answer(state, show.status(state))


@verb
def down(session: Session) -> None:
    """Stop the stack and wait until it is gone; its data stays."""
    if session.is_compose:
        seconds = compose.down()
        answer: dict[str, Any] = {"stopped": True, "seconds": round(seconds, 2)}
        return session.answer(answer, f"stopped the containers in {seconds:.1f} s")
    stack = stackfile.locate(session.folder)
    seconds = launch.stop(stack.pid)
    answer = {"stopped": True, "pid": stack.pid, "seconds": round(seconds, 2)}
    return session.answer(answer, f"stopped {stack.pid} in {seconds:.1f} s")


@verb
def status(session: Session) -> None:
    """Endpoints, processes and whether they are ready; exit code 1 when they are not."""
    with session.client() as client:
        state = client.status()
    session.answer(state, show.status(state))
    if not state["ready"]:
        waiting = ", ".join(name for name, ready in state["doors"].items() if not ready)
        logs = "`docker compose logs`" if session.is_compose else f"{session.folder}/logs"
        raise Error(f"not ready: {waiting}; see {logs}")


@verb
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def apply(session: Session, file: Path) -> None:
    """Apply a FILE (YAML): a pipeline, or a queue."""
    with session.client() as client:
        applied = client.apply(file)
    if "queue" in applied:
        return session.answer(applied, work.queues([applied]))
    text = f"pipeline {applied['pipeline']} is at revision {applied['revision']}"
    return session.answer(applied, text)


@verb
@click.argument("dataset")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--id", default="", help="Publishing again with the same id stores nothing twice.")
def publish(session: Session, dataset: str, file: Path, id: str) -> None:
    """Publish the records of FILE (.ndjson .jsonl .json .csv .parquet .arrow) to DATASET."""
    with session.client() as client:
        receipt = client.publish(dataset, file, id=id)
    refused = receipt["refused"]
    columns: list[show.Column] = [(name, show.of(name)) for name in ("index", "field", "reason")]
    drawn = show.table("refused", columns, receipt["refusals"])
    session.answer(receipt, drawn if refused else f"accepted {receipt['accepted']}")
    if refused:
        raise Error(f"{refused} records were refused, {receipt['accepted']} accepted")


@verb
@click.argument("name", required=False)
def datasets(session: Session, name: str | None) -> None:
    """The datasets; or one, with its versions and drift."""
    with session.client() as client:
        if name:
            one = client.dataset(name)
            return session.answer(one, show.dataset(one))
        rows = client.datasets()
    return session.answer(rows, show.table("datasets", show.DATASETS, rows))


@verb
@click.argument("name", required=False)
@click.argument("job", required=False)
@click.option("--watch", is_flag=True, help="Draw it again until Ctrl-C, or until NAME ended.")
def jobs(session: Session, name: str | None, job: str | None, watch: bool) -> None:
    """The jobs; or one, with its epochs; or `why JOB`: what it waits for, what would place it."""
    if job and name != "why":
        raise click.UsageError(f"one job, or `why JOB`; got {name!r} and {job!r}")
    with session.client() as client:
        if job:
            told = client.why(job)
            return session.answer(told, work.why(told))

        def read() -> Any:
            return client.job(name) if name else client.jobs()

        if watch and not session.as_json:
            return work.watch(session.console, read, name)
        value = read()
    return session.answer(value, work.jobs(value, name))


@verb
@click.argument("reference", required=False)
def models(session: Session, reference: str | None) -> None:
    """The models; the versions of NAME; or one: models:/NAME/3, models:/NAME@champion."""
    with session.client() as client:
        if reference is None:
            rows = client.models()
            return session.answer(rows, show.table("models", show.MODELS, rows))
        if reference.startswith(MODEL_SCHEME):
            one = client.model_version(*model_reference(reference))
            return session.answer(one, show.model_version(one))
        rows = client.model_versions(reference)
    return session.answer(rows, show.table(reference, show.MODEL_VERSIONS, rows))


@verb
def endpoints(session: Session) -> None:
    """What is deployed, how traffic is split, and what each version counted."""
    with session.client() as client:
        found = client.endpoints()
    rows = show.endpoint_rows(found)
    session.answer(found, show.table("endpoints", show.ENDPOINTS, rows))


@verb
@click.argument("model")
@click.argument("rows")
@click.option("--id", default="", help="The request id; default: a new one.")
def predict(session: Session, model: str, rows: str, id: str) -> None:
    """Predict with MODEL: ROWS is JSON, @FILE, or - for stdin.

    A list of rows ([{"x": 1}, ...]) or columns ({"x": [1, ...]}).
    """
    value = parsed(rows)
    is_row = isinstance(value, dict) and not all(isinstance(v, list) for v in value.values())
    with session.client() as client:
        answer = client.predict(model, [value] if is_row else value, id=id)
    outputs = answer["outputs"]
    columns: list[show.Column] = [(name, show.of(name)) for name in outputs]
    lines = [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]
    short = [{name: show.short(one) for name, one in line.items()} for line in lines]
    title = f"{model} version {answer.get('model_version', '')}, request {answer.get('id', '')}"
    session.answer(answer, show.table(title, columns, short))


@verb
@click.argument("model")
@click.argument("request_id")
@click.argument("label")
def feedback(session: Session, model: str, request_id: str, label: str) -> None:
    """Send the true LABEL (JSON, else text) of a prediction."""
    try:
        value = json.loads(label)
    except ValueError:
        value = label
    with session.client() as client:
        client.feedback(model, request_id, value)
    answer = {"model": model, "request_id": request_id, "label": value}
    session.answer(answer, f"label {value!r} noted for {request_id}")


@verb
def nodes(session: Session) -> None:
    """The pool: health, what runs where, which GPUs are free, what of that is in pieces."""
    with session.client() as client:
        answer = client.fleet()
    session.answer(answer["nodes"], work.nodes(answer))


@verb
@click.option("--delete", help="The quota and rules of this queue; its jobs stay.")
def queues(session: Session, delete: str | None) -> None:
    """The queues: what waits and runs, is own, borrowed, lent, left, owed (same unit); replicas."""
    with session.client() as client:
        if delete:
            client.delete_queue(delete)
        rows = client.queues()
    session.answer(rows, work.queues(rows))


@verb
@click.option(
    "--after", type=int, default=-EVENTS_SHOWN, help="A sequence; negative: before the end."
)
@click.option("--limit", type=click.IntRange(1, 1000), default=100, help="So many at most.")
@click.option(
    "--follow", is_flag=True, help="Go on with what happens next; with --json one object a line."
)
@click.option("--dead", is_flag=True, help="Dead letters with their reasons, instead of events.")
def events(session: Session, after: int, limit: int, follow: bool, dead: bool) -> None:
    """What happened on the platform."""
    with session.client() as client:
        read = client.dead_letters if dead else client.events
        found, last = read(after, limit)
        if not follow:
            return session.answer(found, drawn_events(found, dead))
        while True:
            for one in found:
                if session.as_json:
                    click.echo(json.dumps(one))
                else:
                    session.console.print(drawn_events([one], dead), soft_wrap=True)
            time.sleep(FOLLOW_S)
            found, last = read(last, limit)


def drawn_events(found: list[dict[str, Any]], dead: bool) -> RenderableType:
    if dead:
        return show.table("dead letters", show.DEAD_LETTERS, found)
    return show.lines(show.event_line(one) for one in found)


@verb
@click.argument("reference")
@click.option("--all", "everything", is_flag=True, help="Every span, also the repeated ones.")
def trace(session: Session, reference: str, everything: bool) -> None:
    """The story behind a prediction (its request id), a trace id, or models:/NAME/3."""
    with session.client() as client:
        told = client.trace(reference)
    session.answer(told, story.tree(told, everything))


@verb
def doctor(session: Session) -> None:
    """Check that this machine can run the stack; exit code 1 when it cannot."""
    checks = machine.examine(session.folder)
    session.answer(checks, show.table("this machine", show.CHECKS, checks))
    failed = [one["name"] for one in checks if not one["ok"]]
    if failed:
        raise Error(f"not fit for the embedded stack: {', '.join(failed)}")


@verb
@click.argument("what", type=click.Choice(["doors", "scheduler"]), default="doors")
@click.option("--trace", default="", help="scheduler: openb, philly or a file of jobs.")
@click.option("--data", type=click.Path(path_type=Path), help="scheduler: holds openb, philly.")
def bench(session: Session, what: str, trace: str, data: Path | None) -> None:
    """Measure the doors as ratios to the bare servers below them, or the scheduler on traces."""
    output = sys.stderr if session.as_json else None
    figures = benchmarks.measure(launch.platform_root(), what, trace, data, output)
    if session.as_json:
        click.echo(figures.read_text(), nl=False)


@verb
@click.argument("path", type=click.Path(path_type=Path))
@serving.options
def serve(session: Session, path: Path, **options: Any) -> None:
    """Serve the models of PATH alone: no stack, no events, no database.

    PATH is a Triton model repository, a folder with MLServer's settings, or ONNX files.
    """
    serving.in_foreground(path, options)


@verb
@click.option("--keep", is_flag=True, help="Leave the stack running.")
@click.option(
    "--fashion-mnist",
    "folder",
    is_flag=False,
    flag_value=str(FASHION_MNIST),
    type=click.Path(path_type=Path),
    help="The second example instead, some minutes long: FOLDER holds the four IDX files.",
)
def demo(session: Session, keep: bool, folder: Path | None) -> None:
    """Run the whole loop on real data: publish, train, deploy, drift, retrain, promote."""
    console = show.console(stderr=session.as_json)
    try:
        if folder is None:
            measured = digits.run(stack_of(session, console, keep), console)
        else:
            measured = fashion.run(stack_of(session, console, keep), folder, console)
    except KeyboardInterrupt:
        raise Error("interrupted; what was started is stopped") from None
    if session.as_json:
        click.echo(json.dumps(measured, indent=2))


def stack_of(
    session: Session, console: Console, keep: bool
) -> AbstractContextManager[stackfile.Stack]:
    """What a demo runs on."""
    if session.is_compose:
        return compose.running(keep)
    return digits.embedded(session.folder, console, keep)
