"""The one YAML file a user writes, as typed structs.

`parse` refuses what it does not know, and says at which field.
"""

from typing import Any

import msgspec
import yaml

TYPES = ("bool", "int32", "int64", "uint8", "float32", "float64", "string")
ROLES = ("feature", "label", "ignore")
METRICS = {
    "classification": ("accuracy", "f1_macro", "loss"),
    "regression": ("mae", "mse", "r2", "loss"),
}
STEPS: dict[str, frozenset[str]] = {
    "cast": frozenset({"columns", "to"}),
    "drop_nulls": frozenset({"columns"}),
    "drop_duplicates": frozenset({"columns"}),
    "clip": frozenset({"columns", "min", "max"}),
    "standardize": frozenset({"columns"}),
    "minmax": frozenset({"columns"}),
    "one_hot": frozenset({"columns"}),
    "image_scale": frozenset({"columns", "mean", "std"}),
    "split": frozenset({"test", "seed"}),
}
RECIPES = ("mlp", "cnn")


class Invalid(ValueError):
    """A pipeline file that cannot be used; `field` is where, as `$.train.recipe`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Unknown keys are errors."""


class Field(Strict, frozen=True):
    """One column of a dataset's schema."""

    type: str
    shape: list[int] = []
    """Of one record; [] is a scalar, [28, 28, 1] an image in HWC."""
    role: str = "feature"
    nullable: bool = False


class Dataset(Strict, frozen=True):
    name: str
    schema: dict[str, Field]


class Train(Strict, frozen=True):
    recipe: str
    """`mlp`, `cnn`, or the user's own `module:Class`."""
    task: str = "classification"
    params: dict[str, Any] = {}
    """Passed to the recipe: `epochs`, `batch_size`, `learning_rate`, and what it defines."""
    workers: int = 1
    seed: int = 0
    engine: str = "auto"
    """`pool` (warm Ray actors), `ray_train`, or `auto`: by size."""
    cpu_milli: int = 500
    memory_mib: int = 512
    queue: str = "default"


class Gate(Strict, frozen=True):
    """`min`/`max` bound the candidate's metric; `max_drop` compares it with the champion's."""

    metric: str
    min: float | None = None
    max: float | None = None
    max_drop: float | None = None


class Canary(Strict, frozen=True):
    traffic_percent: int = msgspec.field(default=20, name="trafficPercent")
    min_requests: int = 50
    """Requests the canary must have answered before it is promoted."""
    max_error_rate: float = 0.0
    max_accuracy_drop: float = 0.05
    """By feedback, once both versions have `min_labelled` labels."""
    min_labelled: int = 20


class Batching(Strict, frozen=True):
    """Triton's names."""

    max_batch_size: int = 64
    max_queue_delay_microseconds: int = 0
    max_queue_size: int = 1024


class Deployment(Strict, frozen=True):
    model: str
    replicas: int = 1
    canary: Canary = Canary()
    batching: Batching = Batching()
    request_log_percent: int = 100


class DriftTrigger(Strict, frozen=True):
    psi: float = 0.25
    """0.25 is the usual bound for a major shift (Siddiqi, Credit Risk Scorecards, 2006)."""
    min_records: int = 200


class Triggers(Strict, frozen=True):
    records: int | None = None
    """Build a version and train when so many records landed since the last one."""
    drift: DriftTrigger | None = None


class Pipeline(Strict, frozen=True):
    pipeline: str
    dataset: Dataset
    preprocess: list[dict[str, dict[str, Any]]]
    """One step an item: `{standardize: {columns: [pixels]}}`."""
    train: Train
    deployment: Deployment
    gates: list[Gate] = []
    triggers: Triggers = Triggers()

    @property
    def label(self) -> str:
        return next(name for name, field in self.dataset.schema.items() if field.role == "label")

    @property
    def features(self) -> list[str]:
        """Feature columns in schema order."""
        return [name for name, field in self.dataset.schema.items() if field.role == "feature"]


def parse(text: str) -> Pipeline:
    """YAML -> Pipeline. Raises `Invalid`, which names the field."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Invalid("$", f"not YAML: {error}") from error
    return convert(document)


def convert(document: Any) -> Pipeline:
    """Builtins -> Pipeline. Raises `Invalid`."""
    try:
        pipeline = msgspec.convert(document, Pipeline)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `")
        raise Invalid(path.rstrip("`") or "$", problem) from error
    check(pipeline)
    return pipeline


def check(pipeline: Pipeline) -> None:
    """What types alone cannot say. Raises `Invalid`."""
    check_names(pipeline)
    check_schema(pipeline.dataset)
    for index, step in enumerate(pipeline.preprocess):
        check_step(f"$.preprocess[{index}]", step, pipeline)
    check_train(pipeline.train)
    known = METRICS[pipeline.train.task]
    for index, gate in enumerate(pipeline.gates):
        check_gate(f"$.gates[{index}]", gate, known, pipeline.train.recipe)
    check_deployment(pipeline.deployment)


def check_names(pipeline: Pipeline) -> None:
    for path, name in (
        ("$.pipeline", pipeline.pipeline),
        ("$.dataset.name", pipeline.dataset.name),
        ("$.deployment.model", pipeline.deployment.model),
    ):
        if not is_name(name):
            raise Invalid(path, f"{name!r} is not a name: use 1-63 of a-z, 0-9, '_' and '-'")


def is_name(name: str) -> bool:
    """A name fits a NATS subject token, an S3 key and a URL path as it is."""
    return 0 < len(name) < 64 and all(c.isascii() and (c.isalnum() or c in "_-") for c in name)


def check_schema(dataset: Dataset) -> None:
    for name, field in dataset.schema.items():
        path = f"$.dataset.schema.{name}"
        if field.type not in TYPES:
            raise Invalid(f"{path}.type", f"unknown type {field.type!r}: one of {', '.join(TYPES)}")
        if field.role not in ROLES:
            raise Invalid(f"{path}.role", f"unknown role {field.role!r}: one of {', '.join(ROLES)}")
        if any(size < 1 for size in field.shape):
            raise Invalid(f"{path}.shape", f"every size must be at least 1, got {field.shape}")
    labels = [name for name, field in dataset.schema.items() if field.role == "label"]
    if len(labels) != 1:
        raise Invalid("$.dataset.schema", f"exactly one field has role 'label', got {labels}")
    if not any(field.role == "feature" for field in dataset.schema.values()):
        raise Invalid("$.dataset.schema", "no field has role 'feature'")


def check_step(path: str, step: dict[str, dict[str, Any]], pipeline: Pipeline) -> None:
    if len(step) != 1:
        raise Invalid(path, f"one step an item, got {sorted(step)}")
    ((name, options),) = step.items()
    if name not in STEPS:
        raise Invalid(f"{path}.{name}", f"unknown step {name!r}: one of {', '.join(sorted(STEPS))}")
    for option in options:
        if option not in STEPS[name]:
            known = ", ".join(sorted(STEPS[name]))
            raise Invalid(f"{path}.{name}.{option}", f"unknown option: one of {known}")
    for column in options.get("columns", []):
        if column not in pipeline.dataset.schema:
            raise Invalid(f"{path}.{name}.columns", f"no column {column!r} in the schema")


def check_train(train: Train) -> None:
    if train.recipe not in RECIPES and ":" not in train.recipe:
        known = ", ".join(RECIPES)
        problem = f"unknown recipe {train.recipe!r}: one of {known}, or module:Class"
        raise Invalid("$.train.recipe", problem)
    if train.task not in METRICS:
        raise Invalid("$.train.task", f"unknown task {train.task!r}: one of {', '.join(METRICS)}")
    if train.engine not in ("auto", "pool", "ray_train"):
        raise Invalid("$.train.engine", f"unknown engine {train.engine!r}: auto, pool or ray_train")
    if not 1 <= train.workers <= 1024:
        raise Invalid("$.train.workers", f"1 to 1024, got {train.workers}")


def check_gate(path: str, gate: Gate, known: tuple[str, ...], recipe: str) -> None:
    if ":" not in recipe and gate.metric not in known:
        problem = f"no metric {gate.metric!r} is measured: one of {', '.join(known)}"
        raise Invalid(f"{path}.metric", problem)
    if gate.min is None and gate.max is None and gate.max_drop is None:
        raise Invalid(path, "a gate needs min, max or max_drop")


def check_deployment(deployment: Deployment) -> None:
    percent = deployment.canary.traffic_percent
    if not 1 <= percent <= 99:
        raise Invalid("$.deployment.canary.trafficPercent", f"1 to 99, got {percent}")
    if deployment.replicas < 0:
        raise Invalid("$.deployment.replicas", f"0 or more, got {deployment.replicas}")
    for name in ("max_batch_size", "max_queue_size"):
        size = getattr(deployment.batching, name)
        if size < 1:
            raise Invalid(f"$.deployment.batching.{name}", f"1 or more, got {size}")
