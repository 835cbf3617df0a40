"""What the trainer decides: which job a dataset version asks for, on which engine, and what it is.

Pure: time, ids and everything read from outside come in as arguments.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from libs.contracts.events import AttemptPlaced, JobRequested, Resources
from libs.contracts.pipeline import Pipeline, Train, convert

KIND = "train"
LOOPBACK = "127.0.0.1"
WORKERS_MAX = 16
"""Workers of one gang."""
POOL_SAMPLES_MAX = 10_000_000
"""Rows times epochs up to which `auto` takes the warm pool. Ray Train's set-up costs about 23 s
even on a warm cluster; past this size that is a few percent of the run."""
DIGEST_DIGITS = 12
ATTEMPTS_MAX = 5


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A dataset version that some pipeline revision should be trained on."""

    project: str
    pipeline: str
    revision: int
    dataset: str
    number: int
    digest: str
    rows: int


class TrainSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`JobRequested.spec` of a train job: all that an attempt needs to know."""

    pipeline: str
    revision: int
    model: str
    dataset: str
    dataset_version: int
    dataset_digest: str
    rows: int
    train: Train
    metrics: list[str] = []
    """What the gates look at: the recipe must measure these."""
    traceparent: str = ""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt as the engine gets it."""

    project: str
    job: str
    attempt: int
    token: int
    workers: int
    spec: TrainSpec

    @property
    def checkpoints(self) -> str:
        return checkpoints_of(self.project, self.job)


class Progress(msgspec.Struct, frozen=True):
    """`epoch` epochs are done. The first one of a fit has no metrics: where it resumed."""

    epoch: int
    epochs: int
    metrics: dict[str, float] = {}
    samples: int = 0
    """Rows the gang trained on in this epoch."""


class Champion(msgspec.Struct, frozen=True):
    """The version that serves now, to be measured on the candidate's rows."""

    number: int
    graph: str
    """sha256 of its served graph."""


class Outcome(msgspec.Struct, frozen=True):
    """What the service adds to a result."""

    champion: Champion | None
    seconds: float
    resumed_from_epoch: int


class Storage(msgspec.Struct, frozen=True):
    """Where objects lie, as it travels to a worker."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str
    secure: bool = False


class Setup(msgspec.Struct, frozen=True):
    """What every worker process needs to know."""

    storage: Storage
    otlp_endpoint: str = ""
    log_level: str = "INFO"
    recipes_path: str = ""
    """Folder with users' recipe modules; empty: only what is importable anyway."""


class Node(msgspec.Struct, frozen=True):
    """One of Ray's nodes, as a place for workers."""

    id: str
    is_head: bool
    offers: Resources


class Meeting(msgspec.Struct, frozen=True):
    """Where a gang meets: rank 0's store."""

    address: str
    port: int


class Unusable(ValueError):
    """The user's pipeline, recipe or data cannot be trained; trying again would end the same."""


class Lost(RuntimeError):
    """Workers or what they need went away; trying again may do."""


def checkpoints_of(project: str, job: str) -> str:
    """The key prefix of a job's checkpoints, which its attempts share."""
    return f"checkpoints/{project}/{job}/"


def job_of(version: Version) -> str:
    """The same version of the same revision is always the same job."""
    return f"train-{version.pipeline}-{version.revision}-{version.digest[:DIGEST_DIGITS]}"


def job_requested(version: Version, pipeline: Pipeline, traceparent: str) -> JobRequested:
    train = pipeline.train
    spec = TrainSpec(
        pipeline=version.pipeline,
        revision=version.revision,
        model=pipeline.deployment.model,
        dataset=version.dataset,
        dataset_version=version.number,
        dataset_digest=version.digest,
        rows=version.rows,
        train=train,
        metrics=sorted({gate.metric for gate in pipeline.gates}),
        traceparent=traceparent,
    )
    return JobRequested(
        project=version.project,
        job=job_of(version),
        kind=KIND,
        queue=train.queue,
        workers=train.workers,
        resources=Resources(cpu_milli=train.cpu_milli, memory_mib=train.memory_mib),
        attempts_max=ATTEMPTS_MAX,
        spec=msgspec.to_builtins(spec),
    )


def pipeline_of(spec: dict[str, Any]) -> Pipeline:
    """`PipelineApplied.spec` as the typed file it was made from."""
    return convert(spec)


def assignment_of(placed: AttemptPlaced) -> Assignment:
    """Raises `Unusable` for a spec that no trainer wrote, or a gang that is too large."""
    try:
        spec = msgspec.convert(placed.spec, TrainSpec)
    except msgspec.ValidationError as error:
        raise Unusable(f"spec of {placed.job}: {error}") from error
    if not 1 <= placed.workers <= WORKERS_MAX:
        raise Unusable(f"$.train.workers: 1 to {WORKERS_MAX}, got {placed.workers}")
    return Assignment(
        project=placed.project,
        job=placed.job,
        attempt=placed.attempt,
        token=placed.token,
        workers=placed.workers,
        spec=spec,
    )


def engine_of(spec: TrainSpec) -> str:
    """`pool` or `ray_train`."""
    if spec.train.engine != "auto":
        return spec.train.engine
    epochs = spec.train.params.get("epochs", 1)
    samples = spec.rows * epochs if isinstance(epochs, int) else spec.rows
    return "pool" if samples <= POOL_SAMPLES_MAX else "ray_train"


def spread(count: int, nodes: Sequence[Node], busy: Mapping[str, int]) -> list[Node]:
    """Where each of a gang goes: one by one to where the fewest are for the CPU it offers, first
    the head. `busy`: workers by node id."""
    here = dict(busy)
    chosen = []
    for _ in range(count):
        node = min(nodes, key=lambda one: (here.get(one.id, 0) + 1) / one.offers.cpu_milli)
        here[node.id] = here.get(node.id, 0) + 1
        chosen.append(node)
    return chosen


def is_own_code(recipe: str) -> bool:
    """Whether it is the user's `module:Class`, which no later job should find in its process."""
    return ":" in recipe
