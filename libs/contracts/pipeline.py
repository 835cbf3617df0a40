"""The one YAML file a user writes, as typed structs.

`parse` refuses what it does not know, and says at which field.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import yaml
from msgspec import UNSET, UnsetType

from libs.contracts import autoscaling
from libs.contracts.autoscaling import Autoscaling

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
VALUES_MAX = 10_000
DEPTH_MAX = 16
UNKNOWN_KEY = re.compile(r"Object contains unknown field `(.*)`")
MISSING_KEY = re.compile(r"Object missing required field `(.*)`")


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
    preferred_batch_size: tuple[int, ...] = ()
    """A batch of one of these sizes does not wait for more."""
    max_queue_delay_microseconds: int = 0
    """How long the first of a batch may wait for others; 0: not at all."""
    max_queue_size: int = 1024
    priority_levels: int = 0
    """1 is served first; 0: no priorities."""
    default_priority_level: int = 0
    """Of requests that name none; 0: the last."""
    default_timeout_microseconds: int = 0
    """In the queue; 0: none."""
    allow_timeout_override: bool = True
    """Whether a request may ask for a shorter one."""
    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"
    """DELAY: behind everybody else."""


class Deployment(Strict, frozen=True):
    model: str
    replicas: int = 1
    canary: Canary = Canary()
    batching: Batching = Batching()
    request_log_percent: int = 100
    autoscaling: Autoscaling | UnsetType = UNSET
    """Instead of `replicas`."""


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
    except RecursionError as error:
        raise Invalid("$", f"nested deeper than {DEPTH_MAX}") from error
    return convert(document)


def convert(document: Any) -> Pipeline:
    """Builtins -> Pipeline. Raises `Invalid`."""
    check_plain(document)
    try:
        pipeline = msgspec.convert(document, Pipeline)
    except msgspec.ValidationError as error:
        raise located(document, str(error)) from error
    check(pipeline)
    return pipeline


def check_plain(document: Any) -> None:
    """Only what JSON can say, and only so much of it: a few aliases can mean billions of values."""
    for count, (path, value, depth) in enumerate(walk("$", document, 0)):
        if count > VALUES_MAX or depth > DEPTH_MAX:
            bounds = f"more than {VALUES_MAX} values or nested deeper than {DEPTH_MAX}"
            raise Invalid("$", bounds)
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise Invalid(path, f"keys are text, got {key!r}")
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise Invalid(path, f"a finite number, got {value}")
        elif isinstance(value, int):
            if not -(1 << 63) <= value < 1 << 63:
                raise Invalid(path, f"a 64-bit integer, got one of {value.bit_length()} bits")
        elif not (value is None or isinstance(value, str | list)):
            raise Invalid(path, f"a {type(value).__name__} is no value here: quote it to mean text")


def walk(path: str, value: Any, depth: int) -> Iterator[tuple[str, Any, int]]:
    """(path, value, depth) of a document and everything in it, each before what it holds."""
    yield path, value, depth
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from walk(f"{path}.{key}", inner, depth + 1)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from walk(f"{path}[{index}]", inner, depth + 1)


def located(document: Any, text: str) -> Invalid:
    """msgspec's words -> the field. Where it writes `[...]` for a key, the key is looked up."""
    problem, _, path = text.partition(" - at `")
    path = path.rstrip("`") or "$"
    parent, _, _ = path.partition("[...]")
    if parent != path:
        for inner, value, _ in walk("$", document, 0):
            if inner == parent:
                return culprit(parent, value, Field if "schema" in parent else dict[str, Any])
    if found := UNKNOWN_KEY.fullmatch(problem):
        return Invalid(f"{path}.{found[1]}", "unknown key")
    if found := MISSING_KEY.fullmatch(problem):
        return Invalid(f"{path}.{found[1]}", "is required")
    return Invalid(path, problem)


def culprit(parent: str, mapping: dict[str, Any], kind: Any) -> Invalid:
    """The first entry of a mapping that is not of this kind, by its name."""
    for key, value in mapping.items():
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            found = located(value, str(error))
            return Invalid(f"{parent}.{key}{found.field[1:]}", found.problem)
    raise AssertionError(f"{parent} was refused, and every entry of it is fine")


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
    check_triggers(pipeline.triggers)


def check_names(pipeline: Pipeline) -> None:
    for path, name in (
        ("$.pipeline", pipeline.pipeline),
        ("$.dataset.name", pipeline.dataset.name),
        ("$.deployment.model", pipeline.deployment.model),
    ):
        if not is_name(name):
            raise Invalid(path, f"{name!r} is not a name: use 1-63 letters, digits, '_' and '-'")


def is_name(name: str) -> bool:
    """A name fits a NATS subject token, an S3 key and a URL path as it is."""
    return 0 < len(name) < 64 and all(c.isascii() and (c.isalnum() or c in "_-") for c in name)


def check_schema(dataset: Dataset) -> None:
    for name, field in dataset.schema.items():
        path = f"$.dataset.schema.{name}"
        if name.startswith("_"):
            raise Invalid(path, "names that begin with '_' are the platform's own")
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
    for option, value in options.items():
        check_option(f"{path}.{name}.{option}", option, value, pipeline.dataset.schema)
    low, high = options.get("min"), options.get("max")
    if low is not None and high is not None and low > high:
        raise Invalid(f"{path}.{name}.min", f"{low} is more than max, {high}")


def check_option(path: str, option: str, value: Any, schema: dict[str, Field]) -> None:
    if option == "columns":
        if not isinstance(value, list) or not value:
            raise Invalid(path, f"a list of columns, got {value!r}")
        for column in value:
            if column not in list(schema):
                raise Invalid(path, f"no column {column!r} in the schema")
    elif option == "to":
        if value not in TYPES:
            raise Invalid(path, f"unknown type {value!r}: one of {', '.join(TYPES)}")
    elif option == "seed":
        if not isinstance(value, int) or isinstance(value, bool):
            raise Invalid(path, f"a whole number, got {value!r}")
    elif option == "test":
        if not is_number(value) or not 0 <= value < 1:
            raise Invalid(path, f"0 or more and less than 1, got {value!r}")
    elif option in ("min", "max"):
        if value is not None and not is_number(value):
            raise Invalid(path, f"a number, got {value!r}")
    else:
        check_channels(path, option, value)


def check_channels(path: str, option: str, value: Any) -> None:
    """`mean` or `std` of an image: one number, or one for each channel."""
    numbers = value if isinstance(value, list) else [value]
    if not numbers or not all(is_number(one) for one in numbers):
        raise Invalid(path, f"a number, or a list of one for each channel, got {value!r}")
    if option == "std" and any(one <= 0 for one in numbers):
        raise Invalid(path, f"more than 0, got {value!r}")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_train(train: Train) -> None:
    if train.recipe not in RECIPES and ":" not in train.recipe:
        known = ", ".join(RECIPES)
        problem = f"unknown recipe {train.recipe!r}: one of {known}, or module:Class"
        raise Invalid("$.train.recipe", problem)
    if train.task not in METRICS:
        raise Invalid("$.train.task", f"unknown task {train.task!r}: one of {', '.join(METRICS)}")
    if train.engine not in ("auto", "pool", "ray_train"):
        raise Invalid("$.train.engine", f"unknown engine {train.engine!r}: auto, pool or ray_train")
    for name, low, high in (
        ("workers", 1, 1024),
        ("seed", 0, (1 << 32) - 1),
        ("cpu_milli", 1, 1 << 31),
        ("memory_mib", 1, 1 << 31),
    ):
        check_range(f"$.train.{name}", getattr(train, name), low, high)
    if not is_name(train.queue):
        raise Invalid("$.train.queue", f"{train.queue!r} is not a name")


def check_gate(path: str, gate: Gate, known: tuple[str, ...], recipe: str) -> None:
    if ":" not in recipe and gate.metric not in known:
        problem = f"no metric {gate.metric!r} is measured: one of {', '.join(known)}"
        raise Invalid(f"{path}.metric", problem)
    if gate.min is None and gate.max is None and gate.max_drop is None:
        raise Invalid(path, "a gate needs min, max or max_drop")


def check_deployment(deployment: Deployment) -> None:
    canary, batching = deployment.canary, deployment.batching
    path = "$.deployment"
    check_range(f"{path}.replicas", deployment.replicas, 0, 1024)
    check_autoscaling(path, deployment)
    check_range(f"{path}.request_log_percent", deployment.request_log_percent, 0, 100)
    check_range(f"{path}.canary.trafficPercent", canary.traffic_percent, 1, 99)
    check_range(f"{path}.canary.min_requests", canary.min_requests, 1, 1 << 31)
    check_range(f"{path}.canary.min_labelled", canary.min_labelled, 1, 1 << 31)
    check_range(f"{path}.canary.max_error_rate", canary.max_error_rate, 0, 1)
    check_range(f"{path}.canary.max_accuracy_drop", canary.max_accuracy_drop, 0, 1)
    check_range(f"{path}.batching.max_batch_size", batching.max_batch_size, 1, 1 << 16)
    check_range(f"{path}.batching.max_queue_size", batching.max_queue_size, 1, 1 << 20)
    for name in ("max_queue_delay_microseconds", "default_timeout_microseconds"):
        check_range(f"{path}.batching.{name}", getattr(batching, name), 0, 600_000_000)
    check_range(f"{path}.batching.priority_levels", batching.priority_levels, 0, 64)
    check_range(
        f"{path}.batching.default_priority_level",
        batching.default_priority_level,
        0,
        batching.priority_levels,
    )
    for size in batching.preferred_batch_size:
        check_range(f"{path}.batching.preferred_batch_size", size, 1, batching.max_batch_size)


def check_autoscaling(path: str, deployment: Deployment) -> None:
    if deployment.autoscaling is UNSET:
        return
    if deployment.replicas != 1:
        raise Invalid(f"{path}.replicas", "deployment.autoscaling says how many there are")
    if problem := autoscaling.problem_of(deployment.autoscaling):
        raise Invalid(f"{path}.autoscaling.{problem[0]}", problem[1])


def check_triggers(triggers: Triggers) -> None:
    if triggers.records is not None:
        check_range("$.triggers.records", triggers.records, 1, 1 << 40)
    if triggers.drift is not None:
        check_range("$.triggers.drift.psi", triggers.drift.psi, 0, 1000)
        check_range("$.triggers.drift.min_records", triggers.drift.min_records, 1, 1 << 40)


def check_range(path: str, value: float, low: int, high: int) -> None:
    if not low <= value <= high:
        raise Invalid(path, f"{low} to {high}, got {value}")
