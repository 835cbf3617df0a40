"""Triton's `ModelConfig`: read, completed from the graph, checked, and what follows from it.

Pure. A configuration that cannot be served is a `Misconfigured`, which names the line or field.
"""

from collections.abc import Collection, Iterator, Sequence

from google.protobuf import json_format, text_format

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.contracts.protos import model_config_pb2 as pb
from services.inference.models import Model

ONNX, PYTHON = "onnxruntime", "python"
PLATFORMS = {ONNX: "onnxruntime_onnx", PYTHON: "python"}
"""Backend -> platform."""
MODEL_FILES = {ONNX: "model.onnx", PYTHON: "model.py"}
BYTES_TYPE = pb.DataType.TYPE_STRING
Described = pb.ModelInput | pb.ModelOutput


class Misconfigured(ValueError):
    """What a model's files say cannot be served."""


def parse(text: str, where: str) -> pb.ModelConfig:
    """The text of a config.pbtxt. Raises `Misconfigured`, which names the line."""
    try:
        return text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        _, _, problem = str(error).rpartition(" : ")
        raise Misconfigured(f"{where}, line {error.GetLine()}: {problem}") from error


def parse_json(text: str) -> pb.ModelConfig:
    """The `config` of a load request. Raises `Misconfigured`."""
    try:
        return json_format.Parse(text, pb.ModelConfig())
    except (json_format.ParseError, RecursionError) as error:
        raise Misconfigured(f"the config given is not a ModelConfig in JSON: {error}") from error


def backend_of(config: pb.ModelConfig, files: Collection[str]) -> str:
    """`onnxruntime` or `python`: as said, else by the file of the version. Raises `Misconfigured`.

    `files`: names in the version's folder.
    """
    said = config.backend or config.platform
    for backend, platform in PLATFORMS.items():
        if said in (backend, platform):
            return backend
    if said:
        field = "backend" if config.backend else "platform"
        raise Misconfigured(f"{field} '{said}' is not served here, `onnxruntime` and `python` are")
    named = config.default_model_filename
    for backend, file in MODEL_FILES.items():
        if named.endswith(file[5:]) if named else file in files:
            return backend
    wanted = named or " or ".join(MODEL_FILES.values())
    raise Misconfigured(f"no backend is named, and there is no {wanted} to tell it by")


def file_of(config: pb.ModelConfig, backend: str) -> str:
    return config.default_model_filename or MODEL_FILES[backend]


def controls_of(config: pb.ModelConfig) -> set[str]:
    """Inputs of the graph that tell it where it is in a sequence: no client sends them."""
    return {one.name for one in config.sequence_batching.control_input}


def states_of(config: pb.ModelConfig) -> tuple[set[str], set[str]]:
    """Tensors of the graph that carry a sequence's state: (inputs, outputs)."""
    states = config.sequence_batching.state
    return {one.input_name for one in states}, {one.output_name for one in states}


def completed(config: pb.ModelConfig, graph: Signature) -> pb.ModelConfig:
    """With what the graph knows and the configuration leaves out. Raises `Misconfigured`.

    A graph whose every tensor begins with a free dimension is batched, unless the configuration
    lists tensors and no max_batch_size.
    """
    full = pb.ModelConfig()
    full.CopyFrom(config)
    held_in, held_out = states_of(config)
    inputs = [t for t in graph.inputs if t.name not in controls_of(config) | held_in]
    outputs = [t for t in graph.outputs if t.name not in held_out]
    if not (full.max_batch_size or full.input or full.output):
        free = all(tensor.shape[:1] == [-1] for tensor in (*inputs, *outputs))
        full.max_batch_size = Batching().max_batch_size if free else 0
    complete("input", full.input, inputs, full.max_batch_size)
    complete("output", full.output, outputs, full.max_batch_size)
    return full


def complete(kind: str, listed: "Sequence[Described]", graph: list[Tensor], rows_max: int) -> None:
    """Missing tensors are added, and each must be the graph's."""
    said = {one.name: one for one in listed}
    unknown = said.keys() - {tensor.name for tensor in graph}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise Misconfigured(f"{kind} {names}: the graph has {', '.join(t.name for t in graph)}")
    for tensor in graph:
        one = said.get(tensor.name)
        if one is None:
            one = listed.add(name=tensor.name)  # type: ignore[attr-defined]
        if one.data_type == pb.DataType.TYPE_INVALID:
            one.data_type = type_of(tensor.datatype)
        if not one.dims:
            one.dims.extend(tensor.shape[1:] if rows_max else tensor.shape)
        check_against(f"{kind} '{tensor.name}'", one, tensor, rows_max)


def check_against(what: str, said: Described, tensor: Tensor, rows_max: int) -> None:
    if datatype_of(said.data_type) != tensor.datatype:
        told = pb.DataType.Name(said.data_type)
        raise Misconfigured(f"{what}: data_type {told}, the graph has {tensor.datatype}")
    dims = list(said.reshape.shape if said.HasField("reshape") else said.dims)
    expected = [-1, *dims] if rows_max else dims
    fits = len(expected) == len(tensor.shape) and all(
        -1 in (want, has) or want == has for want, has in zip(expected, tensor.shape, strict=True)
    )
    if not fits or (rows_max > 1 and tensor.shape[0] != -1):
        raise Misconfigured(
            f"{what}: dims {dims} with max_batch_size {rows_max} mean the shape {expected}, "
            f"the graph has {tensor.shape}"
        )


def check(config: pb.ModelConfig, folder: str, graph: bool = False) -> None:
    """What can be served, of what can be said. Raises `Misconfigured`.

    `graph`: one has completed it, so that a tensor without dims has none beside its rows.
    """
    for problem in problems(config, folder, graph):
        raise Misconfigured(problem)


def problems(config: pb.ModelConfig, folder: str, graph: bool) -> Iterator[str]:
    if config.name != folder:
        yield f"name '{config.name}' must be the name of the model's folder, '{folder}'"
    if config.max_batch_size < 0:
        yield f"max_batch_size {config.max_batch_size} is negative"
    for field in ("batch_input", "batch_output", "ensemble_scheduling"):
        if is_set(config, field):
            yield f"{field} is not served here"
    if not (config.input and config.output):
        yield "input and output must be listed: only an ONNX graph tells them by itself"
    for listed in (config.input, config.output):
        for one in listed:
            yield from tensor_problems(one)
            if not (one.dims or graph):
                yield f"{kind_of(one)} '{one.name}': dims are missing"
    for preferred in config.dynamic_batching.preferred_batch_size:
        if not 0 < preferred <= config.max_batch_size:
            yield (
                f"dynamic_batching.preferred_batch_size {preferred} must lie between 1 and "
                f"max_batch_size, {config.max_batch_size}"
            )
    if config.sequence_batching.control_input and config.model_transaction_policy.decoupled:
        yield "sequence_batching and model_transaction_policy.decoupled exclude each other here"


def is_set(config: pb.ModelConfig, field: str) -> bool:
    return any(descriptor.name == field for descriptor, _ in config.ListFields())


def kind_of(one: Described) -> str:
    return "input" if isinstance(one, pb.ModelInput) else "output"


def tensor_problems(one: Described) -> Iterator[str]:
    what = f"{kind_of(one)} '{one.name}'"
    if one.data_type == pb.DataType.TYPE_INVALID:
        yield f"{what}: data_type is missing"
    if any(size < 1 and size != -1 for size in one.dims):
        yield f"{what}: dims {list(one.dims)} must be at least 1, or -1"
    if one.is_shape_tensor:
        yield f"{what}: is_shape_tensor is not served here"
    if isinstance(one, pb.ModelInput) and one.allow_ragged_batch:
        yield f"{what}: allow_ragged_batch is not served here"
    if isinstance(one, pb.ModelInput) and one.optional:
        yield f"{what}: optional is not served here"


def signature_of(config: pb.ModelConfig) -> Signature:
    """What clients send and get: with the rows first where there are any."""
    rows = [-1] if config.max_batch_size else []
    return Signature(
        *(
            [Tensor(one.name, datatype_of(one.data_type), rows + list(one.dims)) for one in listed]
            for listed in (config.input, config.output)
        )
    )


def batching_of(config: pb.ModelConfig) -> Batching:
    """Requests share batches whether `dynamic_batching` is said or not: nobody waits for it."""
    said, known = config.dynamic_batching, Batching()
    policy = said.default_queue_policy
    return Batching(
        max_batch_size=max(config.max_batch_size, 1),
        preferred_batch_size=tuple(sorted(said.preferred_batch_size)),
        max_queue_delay_microseconds=said.max_queue_delay_microseconds,
        max_queue_size=policy.max_queue_size or known.max_queue_size,
        priority_levels=said.priority_levels,
        default_priority_level=said.default_priority_level,
        default_timeout_microseconds=policy.default_timeout_microseconds,
        allow_timeout_override=policy.allow_timeout_override or not policy.ByteSize(),
        timeout_action="DELAY" if policy.timeout_action else "REJECT",
    )


def instances_of(config: pb.ModelConfig) -> int:
    """Batches that run at the same time; of several groups, all. 0: it does not say."""
    return sum(max(group.count, 1) for group in config.instance_group)


def datatype_of(number: "pb.DataType.ValueType") -> str:
    """`FP32` of `TYPE_FP32`."""
    return "BYTES" if number == BYTES_TYPE else pb.DataType.Name(number).removeprefix("TYPE_")


def type_of(datatype: str) -> "pb.DataType.ValueType":
    return BYTES_TYPE if datatype == "BYTES" else pb.DataType.Value(f"TYPE_{datatype}")


def chosen_versions(policy: pb.ModelVersionPolicy, found: Collection[int]) -> list[int]:
    """Which of the folder's versions are served, in order. Raises `Misconfigured`."""
    which = policy.WhichOneof("policy_choice")
    if which == "all":
        return sorted(found)
    if which == "specific":
        missing = set(policy.specific.versions) - set(found)
        if missing:
            raise Misconfigured(
                f"version_policy.specific asks for {sorted(missing)}, there are {sorted(found)}"
            )
        return sorted(policy.specific.versions)
    return sorted(found)[-(policy.latest.num_versions or 1) :]


def made(name: str, model: Model, limits: Batching) -> pb.ModelConfig:
    """Of a version that came without one."""
    config = pb.ModelConfig(
        name=name,
        platform=model.platform,
        backend=next((b for b, platform in PLATFORMS.items() if platform == model.platform), ""),
        max_batch_size=limits.max_batch_size if model.batched else 0,
        model_transaction_policy=pb.ModelTransactionPolicy(decoupled=model.decoupled),
        dynamic_batching=pb.ModelDynamicBatching(
            preferred_batch_size=limits.preferred_batch_size,
            max_queue_delay_microseconds=limits.max_queue_delay_microseconds,
            priority_levels=limits.priority_levels,
            default_priority_level=limits.default_priority_level,
            default_queue_policy=pb.ModelQueuePolicy(
                timeout_action=int(limits.timeout_action == "DELAY"),  # type: ignore[arg-type]
                default_timeout_microseconds=limits.default_timeout_microseconds,
                allow_timeout_override=limits.allow_timeout_override,
                max_queue_size=limits.max_queue_size,
            ),
        ),
    )
    rows = int(model.batched)
    for tensor in model.signature.inputs:
        config.input.add(
            name=tensor.name, data_type=type_of(tensor.datatype), dims=tensor.shape[rows:]
        )
    for tensor in model.signature.outputs:
        config.output.add(
            name=tensor.name, data_type=type_of(tensor.datatype), dims=tensor.shape[rows:]
        )
    return config
