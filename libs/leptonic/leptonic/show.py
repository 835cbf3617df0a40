"""What the platform answers, as tables on a terminal."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], Any]]
GOOD = {"succeeded", "serving", "stable", "Healthy", "running", "ready", "ok", "True"}
BAD = {"failed", "rejected", "Unhealthy", "no", "cancelled", "False"}
SECRET = re.compile(r"(password=)\S+|(nats://)[^@/]+(?=@)")
DIGEST_SHOWN = 12
DETAIL_SHOWN = 60
DRIFT_SHOWN = 10
PIPED_COLUMNS = 140
CHAMPION_PERCENT = 100


def of(name: str) -> Callable[[Row], Any]:
    return lambda row: row.get(name, "")


def moment(name: str) -> Callable[[Row], str]:
    """A time to the second."""
    return lambda row: str(row.get(name, ""))[:19].replace("T", " ")


def table(title: str, columns: Iterable[Column], rows: Iterable[Row]) -> Table:
    """A title with the count, one line a row; states are coloured."""
    columns, rows = list(columns), list(rows)
    drawn = Table(title=f"{title} ({len(rows)})", title_justify="left", title_style="bold")
    for name, _ in columns:
        drawn.add_column(name)
    for row in rows:
        drawn.add_row(*(cell(value(row)) for _, value in columns))
    return drawn


def cell(value: Any) -> Text:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    style = "green" if text in GOOD else "red" if text in BAD else ""
    return Text(text, style=style, overflow="fold")


def fields(title: str, row: Row, names: Iterable[str]) -> RenderableType:
    """Name: value lines of one thing."""
    drawn = Table(box=None, show_header=False, title=title, title_justify="left", pad_edge=False)
    for name in names:
        if row.get(name) not in (None, "", {}, []):
            drawn.add_row(Text(name, style="dim"), cell(short(row[name])))
    return drawn


def short(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={short(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(str(short(one)) for one in value)
    return f"{value:.4f}" if isinstance(value, float) else value


def digest(row: Row) -> str:
    return str(row.get("digest", ""))[:DIGEST_SHOWN]


DATASETS: tuple[Column, ...] = (
    ("dataset", of("dataset")),
    ("rows", of("rows")),
    ("parts", of("parts")),
    ("duplicates", of("duplicates")),
    ("dead letters", of("dead_letters")),
    ("pipeline", of("pipeline")),
)
DATASET_VERSIONS: tuple[Column, ...] = (
    ("version", of("number")),
    ("digest", digest),
    ("rows", of("rows")),
    ("reason", of("reason")),
    ("created", moment("created_at")),
)
DRIFT: tuple[Column, ...] = (
    ("source", of("source")),
    ("feature", of("feature")),
    ("psi", of("psi")),
    ("ks", of("ks")),
    ("rows", of("window_rows")),
)
MODELS: tuple[Column, ...] = (
    ("model", of("model")),
    ("versions", of("versions")),
    ("aliases", lambda row: short(row.get("aliases", {}))),
)
MODEL_VERSIONS: tuple[Column, ...] = (
    ("version", of("number")),
    ("state", of("state")),
    ("aliases", lambda row: ", ".join(row.get("aliases", []))),
    ("metrics", lambda row: short(row.get("metrics", {}))),
    ("digest", digest),
    ("job", of("job")),
    ("registered", moment("registered_at")),
)
ENDPOINTS: tuple[Column, ...] = (
    ("model", of("model")),
    ("state", of("state")),
    ("version", of("number")),
    ("traffic", lambda row: f"{row.get('percent', 0)} %"),
    ("requests", of("requests")),
    ("errors", of("errors")),
    ("labelled", of("labelled")),
    ("correct", of("correct")),
    ("generation", of("generation")),
    ("ready", lambda row: "ready" if row["ready_generation"] == row["generation"] else "no"),
)
DEAD_LETTERS: tuple[Column, ...] = (
    ("sequence", of("sequence")),
    ("subject", of("subject")),
    ("reason", of("reason")),
    ("at", moment("at")),
    ("payload", lambda row: str(row.get("payload", ""))[:DETAIL_SHOWN]),
)
CHECKS: tuple[Column, ...] = (
    ("", lambda row: "ok" if row.get("ok") else "no"),
    ("check", of("name")),
    ("", of("detail")),
    ("advice", of("advice")),
)


def dataset(row: Row) -> RenderableType:
    names = ("dataset", "pipeline", "rows", "parts", "duplicates", "dead_letters")
    drawn = [
        fields("dataset", row, names),
        table("versions", DATASET_VERSIONS, row["versions"]),
    ]
    if drift := row.get("drift", {}).get("features"):
        worst = sorted(drift, key=lambda one: -one["psi"])[:DRIFT_SHOWN]
        drawn.append(table("drift against the last version, largest first", DRIFT, worst))
    return Group(*drawn)


def model_version(row: Row) -> RenderableType:
    names = ("model", "number", "state", "aliases", "digest", "metrics", "job", "registered_at")
    manifest = row.get("manifest") or {}
    checks = [dict(one) for one in row.get("checks", [])]
    columns = [(name, of(name)) for name in dict.fromkeys(n for one in checks for n in one)]
    return Group(
        fields("model version", row, (*names, "traceparent")),
        fields("lineage", manifest.get("lineage", {}), manifest.get("lineage", {})),
        table("gate", columns, checks),
    )


def endpoint_rows(deployments: Iterable[Row]) -> list[Row]:
    """One row a target: desired traffic beside what was counted."""
    rows: list[Row] = []
    for one in deployments:
        counted = {target["number"]: target for target in one["serving"]["targets"]}
        rows += [{**one, **counted.get(t["number"], {}), **t} for t in one["targets"]]
    return rows


def status(row: Row) -> RenderableType:
    state = "ready" if row["ready"] else "not ready"
    title = f"{row['source']}: {state}, project {row['project']}, pid {row['pid']}"
    processes: list[Column] = [("process", of("name")), ("pid", of("pid"))]
    processes += [("restarts", of("restarts")), ("ready", of("ready"))]
    running = [{"name": name, **one} for name, one in row["processes"].items()]
    doors = [
        {
            "name": name,
            "url": SECRET.sub(r"\1\2...", url),
            "ready": row["doors"].get(name, ""),
        }
        for name, url in row["endpoints"].items()
    ]
    columns: list[Column] = [
        ("endpoint", of("name")),
        ("address", of("url")),
        ("ready", of("ready")),
    ]
    return Group(
        Text(title, style="bold"),
        table("endpoints", columns, doors),
        table("processes", processes, running),
    )


def event_line(event: Row) -> Text:
    """One event on one line: when, what, and its short fields."""
    data = event.get("data") or {}
    plain = {n: v for n, v in data.items() if n != "project" and not isinstance(v, dict | list)}
    _, _, what = str(event["subject"]).partition(".")
    line = Text()
    line.append(str(event.get("time", ""))[11:23] + " ", style="dim")
    line.append(f"{event['sequence']:>6} ", style="dim")
    line.append(f"{what:<34} ", style="bold")
    line.append(" ".join(f"{name}={short(value)}" for name, value in plain.items()))
    return line


def console(stderr: bool = False) -> Console:
    """As wide as the terminal; into a pipe or a file, wide enough for every table."""
    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = PIPED_COLUMNS
    return made


def lines(texts: Iterable[Text]) -> Text:
    return Text("\n").join(texts)


def stacked(*parts: RenderableType) -> Group:
    """One below the other, with room between."""
    return Group(*(one for part in parts for one in (Text(""), part)))
