"""One round of the loop, followed: landed records -> version -> job -> model -> deployment."""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leptonic import show
from leptonic.client import Client
from leptonic.watch import Stalled, Watch, at, is_kind, sentence_of

VERSION_S = 60.0
PLACED_S = 60.0
"""The trainer may still be importing torch."""
REGISTERED_S = 30.0
DEPLOYED_S = 30.0
PROMOTED_S = 60.0
KNOWN_S = 15.0
KNOWN_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A model version that takes traffic, and the dataset version it was trained on."""

    dataset_version: int
    number: int
    percent: int
    metrics: dict[str, float]


def follow(watch: Watch, dataset: str, model: str, training_s: float) -> Deployed:
    """From the next version of the dataset until what was trained on it takes traffic."""
    version = watch.event(
        "dataset_version.created",
        lambda data: bool(data["dataset"] == dataset),
        VERSION_S,
        "waiting for the pipeline's trigger to build a dataset version",
    )
    made = version["data"]
    detail = f"version {made['number']}, {made['rows']} rows, because of {made['reason']}"
    watch.mark("dataset version", detail, at(version))
    job = train(watch, made["digest"], training_s)
    registered = watch.event(
        "model_version.registered",
        lambda data: bool(data["job"] == job),
        REGISTERED_S,
        "waiting for the registry",
    )
    number = registered["data"]["number"]
    metrics = registered["data"]["metrics"]
    watch.mark("registered", f"models:/{model}/{number}  {show.short(metrics)}", at(registered))
    return deploy(watch, model, number, made["number"], metrics)


def train(watch: Watch, digest: str, training_s: float) -> str:
    """Until the job on this dataset version succeeded; returns its name."""
    requested = watch.event(
        "job.requested",
        lambda data: data["kind"] == "train" and digest[:12] in data["job"],
        PLACED_S,
        "waiting for the training job",
    )
    job = str(requested["data"]["job"])
    placed = watch.event(
        "attempt.placed",
        lambda data: bool(data["job"] == job),
        PLACED_S,
        f"waiting for the scheduler to place {job}",
    )
    where = f"{placed['data']['workers']} workers on node {placed['data']['node']}"
    watch.mark("placed by the scheduler", where, at(placed))
    done = watch.event(
        "job.succeeded",
        lambda data: bool(data["job"] == job),
        training_s,
        f"training {job} on Ray",
    )
    epochs = [e["data"] for e in watch.seen if is_kind(e, "job.progressed")]
    epochs = [data for data in epochs if data["job"] == job]
    last = f"{len(epochs)} epochs, {show.short(epochs[-1]['metrics'])}" if epochs else job
    watch.mark("trained and evaluated", last, at(done))
    return job


def deploy(
    watch: Watch, model: str, number: int, dataset_version: int, metrics: dict[str, float]
) -> Deployed:
    """Until a replica serves the version; a gate it fails is `Stalled`."""
    gated = watch.event(
        "model_version.gated",
        lambda data: data["model"] == model and data["number"] == number,
        REGISTERED_S,
        "waiting for the gate",
    )
    checks = "; ".join(sentence_of(check) for check in gated["data"]["checks"])
    watch.mark("gate passed", checks, at(gated))
    updated = watch.event(
        "deployment.updated",
        lambda data: data["model"] == model and number in shares(data),
        DEPLOYED_S,
        "waiting for the deployment",
    )["data"]
    ready = watch.event(
        "deployment.ready",
        lambda data: data["model"] == model and data["generation"] >= updated["generation"],
        DEPLOYED_S,
        f"waiting for a replica to serve generation {updated['generation']}",
    )
    percent = shares(updated)[number]
    how = "all traffic" if percent == show.CHAMPION_PERCENT else f"canary, {percent} % of traffic"
    watch.mark("deployed", f"version {number}: {how}", at(ready))
    return Deployed(dataset_version, number, percent, metrics)


def shares(deployment: Mapping[str, Any]) -> dict[int, int]:
    """Version -> percent of the traffic."""
    return {target["number"]: target["percent"] for target in deployment["targets"]}


def promote(watch: Watch, deployed: Deployed, model: str, send: Callable[[], None]) -> None:
    """Sends traffic until the canary is promoted; one that is taken back is `Stalled`."""
    if deployed.percent == show.CHAMPION_PERCENT:
        return

    def meanwhile() -> None:
        for one in watch.seen:
            is_ours = one["data"].get("number") == deployed.number
            if is_kind(one, "model_version.rejected") and is_ours:
                raise Stalled(f"the canary was taken back: {one['data']['reason']}")
        send()

    promoted = watch.event(
        "model_version.promoted",
        lambda data: data["model"] == model and data["number"] == deployed.number,
        PROMOTED_S,
        f"sending traffic until version {deployed.number} is promoted",
        meanwhile,
    )
    watch.mark("canary promoted", promoted["data"]["reason"], at(promoted))
    watch.event(
        "deployment.ready",
        lambda data: data["model"] == model and serves_alone(watch, data, deployed.number),
        DEPLOYED_S,
        f"waiting for a replica to serve version {deployed.number} alone",
    )


def serves_alone(watch: Watch, ready: Any, number: int) -> bool:
    """Whether the generation that is ready gives this version all traffic."""
    updates = [one["data"] for one in watch.seen if is_kind(one, "deployment.updated")]
    alone = {number: show.CHAMPION_PERCENT}
    return any(one["generation"] == ready["generation"] and shares(one) == alone for one in updates)


def until_known(client: Client, dataset: str) -> None:
    """Applying is done when ingest knows the schema: what comes earlier is dead-lettered."""
    deadline = time.monotonic() + KNOWN_S
    while dataset not in [one["dataset"] for one in client.datasets()]:
        if time.monotonic() > deadline:
            raise Stalled(f"ingest does not know {dataset!r} {KNOWN_S:.0f} s after the apply")
        time.sleep(KNOWN_POLL_S)


def output_of(arguments: Sequence[str], timeout_s: float) -> str:
    """Runs a stranger's Python program; returns what it printed."""
    line = [sys.executable, *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise Stalled(f"{arguments[0]} took longer than {timeout_s:.0f} s") from error
    if done.returncode:
        raise Stalled(f"{arguments[0]} ended with {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout
