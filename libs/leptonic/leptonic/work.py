"""Jobs, queues and nodes as tables on a terminal, and why a job waits."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from leptonic.show import Column, Row, fields, moment, of, short, table

WATCH_S = 0.5
ENDED = ("succeeded", "failed", "cancelled")
WHOLE = 1000
SHARE_SCALE = 1_000_000


def resources(row: Row, name: str = "resources") -> str:
    amount = row.get(name) or {}
    cpu, memory = amount.get("cpu_milli", 0) / 1000, amount.get("memory_mib", 0)
    gpu = amount.get("gpu_milli", 0) * (amount.get("gpus") or 1) / WHOLE
    return f"{cpu:g} cpu, {memory} MiB" + (f", {gpu:g} gpu" if gpu else "")


JOBS: tuple[Column, ...] = (
    ("job", of("job")),
    ("kind", of("kind")),
    ("state", of("state")),
    ("attempt", of("attempt")),
    ("workers", of("workers")),
    ("each", resources),
    ("node", of("node")),
    ("reason", of("reason")),
)
NODES: tuple[Column, ...] = (
    ("node", of("node")),
    ("health", of("health")),
    ("kinds", lambda row: ", ".join(row.get("kinds", []))),
    ("allocated", lambda row: resources(row, "allocated")),
    ("capacity", lambda row: resources(row, "capacity")),
    ("GPUs", lambda row: gpus(row)),
    ("in pieces", lambda row: pieces(row)),
    ("labels", lambda row: short(row.get("labels", {}))),
    ("jobs", lambda row: len(row.get("jobs", []))),
    ("heard from", moment("last_heartbeat_at")),
)
QUEUES: tuple[Column, ...] = (
    ("queue", of("queue")),
    ("cohort", of("cohort")),
    ("waiting", of("waiting")),
    ("running", of("running")),
    ("allocated", lambda row: resources(row, "allocated")),
    ("weight", lambda row: row.get("weight") or ""),
    ("share", lambda row: f"{row.get('share', 0) / SHARE_SCALE:.0%}" if row.get("cohort") else ""),
    ("resource", of("resource")),
    ("nominal", of("nominal")),
    ("used", of("used")),
    ("borrowed", of("borrowed")),
    ("lent", of("lent")),
    ("left", of("left")),
    ("owes", of("owes")),
)
REPLICAS: tuple[Column, ...] = (
    *((name, of(name)) for name in ("model", "wanted", "running", "waiting")),
    *((name, of(name)) for name in ("spare", "lent")),
)
ADVICES: tuple[Column, ...] = (("", of("number")), ("would place it next", of("says")))


def gpus(row: Row) -> str:
    """Of each GPU what is free: `A100: 1 1 0.3 0`."""
    free = " ".join(f"{milli / WHOLE:g}" for milli in row.get("gpu_milli_free", []))
    model = row.get("gpu_model", "")
    return f"{model}: {free} free" if free and model else f"{free} free" if free else ""


def pieces(row: Row) -> str:
    """GPUs that are free and of no use to what comes."""
    milli = row.get("gpu_milli_fragmented", 0)
    return f"{milli / WHOLE:g}" if row.get("gpu_milli_free") else ""


def nodes(answer: Row) -> RenderableType:
    rows = answer["nodes"]
    drawn = table("nodes", NODES, rows)
    free = sum(sum(row.get("gpu_milli_free", [])) for row in rows)
    bound = answer.get("gpu_milli_bound", 0)
    if not bound:
        return drawn
    in_pieces = sum(row.get("gpu_milli_fragmented", 0) for row in rows)
    said = f"{free / WHOLE:g} GPUs free, of them {in_pieces / WHOLE:g} in pieces; no policy holds"
    return Group(drawn, Text(f"{said} more than {bound / WHOLE:g} of what comes lately"))


def queue_rows(queues: list[dict[str, Any]]) -> list[Row]:
    """One row a resource, the queue's own words on the first."""
    rows: list[Row] = []
    for queue in queues:
        first, *others = queue.get("quotas") or [{}]
        rows += [{**queue, **first}, *others]
    return rows


def queues(rows: list[dict[str, Any]]) -> RenderableType:
    drawn = table("queues", QUEUES, queue_rows(rows))
    drawn.title = f"queues ({len(rows)})"
    replicas = [one for row in rows for one in row.get("replicas", [])]
    return Group(drawn, table("replicas", REPLICAS, replicas)) if replicas else drawn


def why(row: Row) -> RenderableType:
    """What binds it, and each advice on a line."""
    said = dict(row)
    if row.get("position"):
        said["position"] = f"{row['position']} of {row['waiting']}"
    if row.get("price"):
        said["price"] = f"{row['price']:g} {row['price_unit']}"
    head = fields(
        "job", said, ("job", "state", "queue", "position", "constraint", "reason", "price")
    )
    if row["state"] != "waiting":
        return head
    advices = [{"number": n, **one} for n, one in enumerate(row.get("advices", []), start=1)]
    return Group(head, table("advice, the cheapest first", ADVICES, advices))


def job(row: Row) -> RenderableType:
    names = ("job", "kind", "state", "reason", "queue", "node", "attempt", "workers", "resources")
    head = fields("job", row, (*names, "submitted_at"))
    run = row.get("run") or {}
    epochs = run.get("epochs", [])
    metrics = list(dict.fromkeys(name for one in epochs for name in one["metrics"]))
    columns: list[Column] = [("epoch", of("epoch"))]
    columns += [(name, of(name)) for name in metrics]
    rows = [{"epoch": one["epoch"], **one["metrics"]} for one in epochs]
    return Group(head, table(f"run: {run['state']}", columns, rows)) if run else head


def jobs(value: Any, name: str | None) -> RenderableType:
    return job(value) if name else table("jobs", JOBS, value)


def watch(console: Console, read: Callable[[], Any], name: str | None) -> None:
    """Draws it again until Ctrl-C, or until the one of this name ended."""
    with Live(console=console, auto_refresh=False) as live:
        while True:
            value = read()
            live.update(jobs(value, name), refresh=True)
            if name and value["state"] in ENDED:
                return
            time.sleep(WATCH_S)
