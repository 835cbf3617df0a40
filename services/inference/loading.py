"""A version of a model repository, loaded: its model, its full configuration, its limits."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from google.protobuf import json_format

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.contracts.protos.model_config_pb2 import ModelConfig, ModelInput, ModelOutput
from services.inference import layout, mlserver, modelconfig, models, sequences, warmup
from services.inference.instances import Instances
from services.inference.isolated import Isolated
from services.inference.layout import Plan, Version
from services.inference.modelconfig import Misconfigured
from services.inference.models import Model, OnnxModel, Unloadable
from services.inference.tensors import Array, Arrays
from services.inference.worker import Spec


class Built(NamedTuple):
    """A version in memory, not served yet."""

    version: str
    model: Model
    config: ModelConfig
    """With everything that the graph or the settings told."""
    limits: Batching


def build(plan: Plan, version: Version) -> Built:
    """Raises `Misconfigured`, `Unloadable`."""
    build_one = build_python if plan.backend == modelconfig.PYTHON else build_onnx
    sequences.plan_of(plan.config)  # refused before anything is loaded
    try:
        model, config = build_one(plan, version)
    except OSError as error:
        raise Misconfigured(f"{error.filename or version.file}: {error.strerror}") from error
    try:
        warmup.warm_up(model, config, plan.folder)
    except (Misconfigured, Unloadable):
        model.close()
        raise
    if not config.backend:
        config.backend = plan.backend
    if not config.platform and plan.backend != modelconfig.PYTHON:
        config.platform = modelconfig.PLATFORMS[plan.backend]
    if not config.default_model_filename:
        config.default_model_filename = version.file.name
    return Built(str(version.number), model, config, modelconfig.batching_of(config))


def build_onnx(plan: Plan, version: Version) -> tuple[Model, ModelConfig]:
    model, graph = with_ops(plan, version) if ops_of(plan) else in_process(plan, version)
    try:
        config = completed(plan, graph)
        model.labels = layout.labels_of(config, plan.folder)
    except Misconfigured:
        model.close()
        raise
    model.batched = config.max_batch_size > 0
    model.signature = with_hidden(graph_signature(config), graph)
    if isinstance(model, OnnxModel):
        model.outputs = [tensor.name for tensor in model.signature.outputs]
    return reshaped(model, config), config


def completed(plan: Plan, graph: Signature) -> ModelConfig:
    """Raises `Misconfigured`."""
    config = modelconfig.completed(plan.config, graph)
    modelconfig.check(config, plan.name, graph=True)
    if plan.promised is not None:
        mlserver.check(plan.promised, graph)
    return config


def in_process(plan: Plan, version: Version) -> tuple[Model, Signature]:
    """A graph whose tensors are all listed is warmed up with the sizes that are listed."""
    listed = bool(plan.config.input and plan.config.output)
    listed = listed and not plan.config.HasField("sequence_batching")
    model = OnnxModel(
        plan.name,
        digest_of(version.file),
        version.file,
        batched=False,
        signature=graph_signature(plan.config) if listed else None,
    )
    return model, models.signature_of(plan.name, model.session)


def with_ops(plan: Plan, version: Version) -> tuple[Model, Signature]:
    """In a process of its own: a library of ops is somebody's code."""
    spec = Spec(
        name=plan.name,
        version=str(version.number),
        kind="onnx",
        file=str(version.file.resolve()),
        folder=str(plan.folder.resolve()),
        libraries=ops_of(plan),
        batched=False,
    )
    model = Isolated(spec, digest_of(version.file), keeps=plan.keeps)
    return model, model.signature


def ops_of(plan: Plan) -> list[str]:
    """Beside the versions, as in Triton, where the path is not absolute."""
    named = plan.config.model_operations.op_library_filename
    return [str(plan.folder.resolve() / one) for one in named]


def build_python(plan: Plan, version: Version) -> tuple[Model, ModelConfig]:
    """In processes of its own: it is somebody's code. A sequence's state lies in one of them."""
    config = ModelConfig()
    config.CopyFrom(plan.config)
    config.default_model_filename = version.file.name
    modelconfig.check(config, plan.name)
    count = 1 if config.HasField("sequence_batching") else modelconfig.instances_of(config) or 1
    workers: list[Isolated] = []
    try:
        workers.extend(worker_of(config, plan, version, number) for number in range(count))
    except (Misconfigured, OSError, Unloadable):
        for worker in workers:
            worker.close()
        raise
    model: Model = Instances(workers) if count > 1 else workers[0]
    return model, config


def worker_of(config: ModelConfig, plan: Plan, version: Version, number: int) -> Isolated:
    spec = Spec(
        name=config.name,
        version=str(version.number),
        kind="python",
        instance=number,
        file=str(version.file.resolve()),
        folder=str(plan.folder.resolve()),
        config=told(config),
        outputs=[one.name for one in config.output],
        batched=config.max_batch_size > 0,
    )
    return Isolated(
        spec,
        digest_of(version.file),
        signature=modelconfig.signature_of(config),
        decoupled=config.model_transaction_policy.decoupled,
        labels=layout.labels_of(config, plan.folder),
        keeps=plan.keeps,
    )


def told(config: ModelConfig) -> str:
    """As Triton tells it to the code: every field, and sizes as numbers."""
    fields = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    for one in (*fields["input"], *fields["output"]):
        one["dims"] = [int(size) for size in one["dims"]]
    return json.dumps(fields)


def graph_signature(config: ModelConfig) -> Signature:
    """What the graph takes and gives, where that differs from what clients see."""
    known = modelconfig.signature_of(config)
    rows = [-1] if config.max_batch_size else []

    def inner(said: ModelInput | ModelOutput, tensor: Tensor) -> Tensor:
        if not said.HasField("reshape"):
            return tensor
        return Tensor(tensor.name, tensor.datatype, rows + list(said.reshape.shape))

    return Signature(
        [inner(s, t) for s, t in zip(config.input, known.inputs, strict=True)],
        [inner(s, t) for s, t in zip(config.output, known.outputs, strict=True)],
    )


def with_hidden(listed: Signature, graph: Signature) -> Signature:
    """And what only the server sends and gets: a sequence's controls and states."""
    inputs, outputs = (
        [*known, *(t for t in own if t.name not in {one.name for one in known})]
        for known, own in ((listed.inputs, graph.inputs), (listed.outputs, graph.outputs))
    )
    return Signature(inputs, outputs)


def digest_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def reshaped(model: Model, config: ModelConfig) -> Model:
    """As clients see it, where the configuration reshapes any tensor."""
    if any(one.HasField("reshape") for one in described(config)):
        return Reshaped(model, config)
    return model


def described(config: ModelConfig) -> Iterator[ModelInput | ModelOutput]:
    yield from config.input
    yield from config.output


class Reshaped:
    """A model behind tensors of other shapes, as `reshape` says: the rows stay as they are."""

    def __init__(self, model: Model, config: ModelConfig) -> None:
        self.model = model
        self.digest = model.digest
        self.batched = model.batched
        self.decoupled = model.decoupled
        self.parallel = model.parallel
        self.platform = model.platform
        self.labels = model.labels
        self.signature = modelconfig.signature_of(config)
        self.inner = {
            one.name: list(one.reshape.shape) for one in config.input if one.HasField("reshape")
        }
        self.outer = {one.name: list(one.dims) for one in config.output if one.HasField("reshape")}

    @property
    def on_crash(self) -> Callable[[str], None] | None:
        return self.model.on_crash

    @on_crash.setter
    def on_crash(self, told: Callable[[str], None] | None) -> None:
        self.model.on_crash = told

    def run(self, inputs: Arrays) -> Arrays:
        outputs = self.model.run(self.to(self.inner, inputs))
        return self.to(self.outer, outputs)

    def stream(self, inputs: Arrays) -> Iterator[Arrays]:
        for outputs in self.model.stream(self.to(self.inner, inputs)):
            yield self.to(self.outer, outputs)

    def to(self, shapes: dict[str, list[int]], arrays: Arrays) -> Arrays:
        return {
            name: self.shaped(array, shapes[name]) if name in shapes else array
            for name, array in arrays.items()
        }

    def shaped(self, array: Array, shape: list[int]) -> Array:
        return array.reshape([len(array), *shape] if self.batched else shape)

    def close(self) -> None:
        self.model.close()
