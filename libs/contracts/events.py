"""Every platform event; `envelope.py` has the CloudEvents 1.0 envelope it travels in.

An event class is a fact in the past tense. Its NATS subject is
`events.<project>.<entity>.<verb>` and its CloudEvents type
`ai.leptonic.<entity>.<verb>.v1`; both follow from the class's `entity` and `verb`.
A stored sample of every version lies in `samples/` and is decoded by a test for ever.
"""

from typing import Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, UnsetType

TYPE_PREFIX = "ai.leptonic."


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What every event carries besides its own fields."""

    entity: ClassVar[str]
    verb: ClassVar[str]
    version: ClassVar[int] = 1

    project: str


class Resources(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Integer amounts, for one worker of a gang or the capacity of a node.

    Defaults are left out on the wire, so that a release that knows no `gpus` reads the rest.
    """

    cpu_milli: int = 1000
    memory_mib: int = 512
    gpu_milli: int = 0
    """Of each of its GPUs; a worker takes at most 1000, and exactly 1000 of each of several."""
    gpus: int = 1
    """Without effect where `gpu_milli` is 0; a node with 8 whole GPUs has 1000 of each of 8."""


class PipelineApplied(Event, frozen=True, kw_only=True):
    """A pipeline's new revision is what everybody should now work towards."""

    entity: ClassVar[str] = "pipeline"
    verb: ClassVar[str] = "applied"

    pipeline: str
    revision: int
    spec: dict[str, Any]
    """The whole pipeline file as `libs.contracts.pipeline.Pipeline` builtins."""


class PartLanded(Event, frozen=True, kw_only=True):
    """Records are durable: a Parquet part in object storage and its manifest in Postgres."""

    entity: ClassVar[str] = "part"
    verb: ClassVar[str] = "landed"

    dataset: str
    digest: str
    key: str
    rows: int
    size_bytes: int
    first_sequence: int
    last_sequence: int


class DatasetVersionCreated(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "dataset_version"
    verb: ClassVar[str] = "created"

    dataset: str
    number: int
    digest: str
    """sha256 of the canonical manifest (`libs.contracts.artifacts.DatasetManifest`)."""
    rows: int
    pipeline: str
    revision: int
    reason: str
    """`records`, `drift` or `manual`."""


class DriftDetected(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "drift"
    verb: ClassVar[str] = "detected"

    dataset: str
    pipeline: str
    reference_digest: str
    source: str
    """`records` or `requests`: which stream moved."""
    window_rows: int
    feature: str
    psi: float
    ks: float
    threshold_psi: float


class JobRequested(Event, frozen=True, kw_only=True):
    """Asks the scheduler to place a gang; whoever asks chooses a deterministic `job`."""

    entity: ClassVar[str] = "job"
    verb: ClassVar[str] = "requested"

    job: str
    kind: str
    """`train`, `serve`, ... : only nodes that announce the kind may run it."""
    queue: str = "default"
    priority: int = 0
    workers: int = 1
    resources: Resources = Resources()
    attempts_max: int = 5
    spec: dict[str, Any] = {}
    gpu_models: list[str] = []
    """Any of these; empty for any at all."""
    labels: dict[str, str] = {}
    """Its nodes carry all of them."""
    topology: Literal["node", "any"] = "node"
    """The whole gang on one node, or over the fewest nodes that have room."""
    duration_s: int = 0
    """An upper bound, for backfill; 0 where it is not known."""
    preemptible: bool = True


class JobCancelled(Event, frozen=True, kw_only=True):
    """Asks the scheduler to end a job that is no longer wanted."""

    entity: ClassVar[str] = "job"
    verb: ClassVar[str] = "cancelled"

    job: str
    reason: str = ""


class Share(msgspec.Struct, frozen=True):
    """What one node holds of a gang."""

    node: str
    workers: int
    rank: int = 0
    """Of its first worker; the others follow."""


class AttemptPlaced(Event, frozen=True, kw_only=True):
    """The scheduler's instruction: the named node's agent starts this share of an attempt.

    A gang over several nodes is one attempt under one token, told to each of them.
    """

    entity: ClassVar[str] = "attempt"
    verb: ClassVar[str] = "placed"

    job: str
    attempt: int
    token: int
    """Fencing token: grows with every placement; results under an older one are refused."""
    node: str
    kind: str
    workers: int
    """On this node."""
    spec: dict[str, Any] = {}
    rank: int = 0
    """Of the first worker here."""
    gpus: list[list[int]] = []
    """Of each worker here, the node's GPUs it takes."""
    gang: list[Share] = []
    """All nodes of the attempt, by rank."""
    resources: Resources = Resources(cpu_milli=0, memory_mib=0)
    """Of each worker; 0 where it is not said."""


class AttemptStopped(Event, frozen=True, kw_only=True):
    """The scheduler's instruction: the named node's agent ends this attempt."""

    entity: ClassVar[str] = "attempt"
    verb: ClassVar[str] = "stopped"

    job: str
    attempt: int
    token: int
    node: str
    reason: str = ""


class AttemptStarted(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "attempt"
    verb: ClassVar[str] = "started"

    job: str
    attempt: int
    token: int
    node: str


class AttemptSucceeded(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "attempt"
    verb: ClassVar[str] = "succeeded"

    job: str
    attempt: int
    token: int
    node: str
    result: dict[str, Any] = {}


class AttemptFailed(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "attempt"
    verb: ClassVar[str] = "failed"

    job: str
    attempt: int
    token: int
    node: str
    reason: str
    retryable: bool
    """False for an error of the user's code or data: trying again would end the same."""


class JobProgressed(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "job"
    verb: ClassVar[str] = "progressed"

    job: str
    attempt: int
    epoch: int
    epochs: int
    metrics: dict[str, float]


class JobSucceeded(Event, frozen=True, kw_only=True):
    """The scheduler accepted a result; said exactly once a job."""

    entity: ClassVar[str] = "job"
    verb: ClassVar[str] = "succeeded"

    job: str
    kind: str
    attempt: int
    spec: dict[str, Any]
    result: dict[str, Any]


class JobFailed(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "job"
    verb: ClassVar[str] = "failed"

    job: str
    kind: str
    attempt: int
    spec: dict[str, Any]
    reason: str


class ModelVersionRegistered(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "model_version"
    verb: ClassVar[str] = "registered"

    model: str
    number: int
    digest: str
    job: str
    metrics: dict[str, float]


class ModelVersionGated(Event, frozen=True, kw_only=True):
    """The gate has spoken: every check with its numbers."""

    entity: ClassVar[str] = "model_version"
    verb: ClassVar[str] = "gated"

    model: str
    number: int
    passed: bool
    checks: list[dict[str, Any]]


class ModelVersionPromoted(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "model_version"
    verb: ClassVar[str] = "promoted"

    model: str
    number: int
    previous: int | None
    reason: str


class ModelVersionRejected(Event, frozen=True, kw_only=True):
    """A canary was taken back; the previous version serves all traffic."""

    entity: ClassVar[str] = "model_version"
    verb: ClassVar[str] = "rejected"

    model: str
    number: int
    serving: int
    reason: str


class Target(msgspec.Struct, frozen=True):
    """A version in a deployment and its share of the traffic, in percent."""

    number: int
    percent: int
    digest: str
    """sha256 of the model manifest (`libs.contracts.artifacts.ModelManifest`)."""
    traceparent: str = ""
    """Where the version came from: the trace of its registration."""


class DeploymentUpdated(Event, frozen=True, kw_only=True):
    """Desired state: everything a server needs in order to serve a model."""

    entity: ClassVar[str] = "deployment"
    verb: ClassVar[str] = "updated"

    model: str
    generation: int
    replicas: int
    targets: list[Target]
    batching: dict[str, Any] = {}
    request_log_percent: int = 100
    autoscaling: dict[str, Any] = {}
    """As `libs.contracts.autoscaling.Autoscaling`; empty: there are always `replicas`."""
    resources: Resources = Resources(cpu_milli=200, memory_mib=256)
    """Of one replica."""


class DeploymentReady(Event, frozen=True, kw_only=True):
    """One replica serves this generation."""

    entity: ClassVar[str] = "deployment"
    verb: ClassVar[str] = "ready"

    model: str
    generation: int
    replica: str


class Observation(msgspec.Struct, frozen=True):
    """What one version did since the generation began; counts only grow."""

    number: int
    requests: int
    errors: int
    labelled: int = 0
    correct: int = 0
    quarantined: Literal[True] | UnsetType = UNSET
    """It crashed so often that this replica does not serve it in this generation."""


class DeploymentObserved(Event, frozen=True, kw_only=True):
    entity: ClassVar[str] = "deployment"
    verb: ClassVar[str] = "observed"

    model: str
    generation: int
    replica: str
    observations: list[Observation]


EVENTS: tuple[type[Event], ...] = (
    PipelineApplied,
    PartLanded,
    DatasetVersionCreated,
    DriftDetected,
    JobRequested,
    JobCancelled,
    AttemptPlaced,
    AttemptStopped,
    AttemptStarted,
    AttemptSucceeded,
    AttemptFailed,
    JobProgressed,
    JobSucceeded,
    JobFailed,
    ModelVersionRegistered,
    ModelVersionGated,
    ModelVersionPromoted,
    ModelVersionRejected,
    DeploymentUpdated,
    DeploymentReady,
    DeploymentObserved,
)


def type_of(event: Event | type[Event]) -> str:
    """`ai.leptonic.<entity>.<verb>.v<version>`."""
    return f"{TYPE_PREFIX}{event.entity}.{event.verb}.v{event.version}"


def subject_of(event: Event) -> str:
    """`events.<project>.<entity>.<verb>`."""
    return f"events.{event.project}.{event.entity}.{event.verb}"


BY_TYPE: dict[str, type[Event]] = {type_of(kind): kind for kind in EVENTS}
