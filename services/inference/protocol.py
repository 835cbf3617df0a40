"""Messages of the Open Inference Protocol over gRPC <-> what the service knows."""

from collections.abc import Mapping, Sequence
from time import monotonic_ns
from typing import Any, NamedTuple

import msgspec

from libs.bus import TRACE_HEADER
from libs.contracts.artifacts import Tensor
from libs.contracts.protos import open_inference_pb2 as oip
from libs.doors import Invalid
from services.inference import tensors
from services.inference.aside import aside
from services.inference.calls import Answer, Call, Parameter
from services.inference.classification import classes_of, classified
from services.inference.front import Counts
from services.inference.responses import Taken
from services.inference.served import Served
from services.inference.sharedmemory import SharedMemory, Window
from services.inference.tensors import CONTENTS, Array, Given

NS = 1e9
RESERVED = "triton_"
EMPTY_FINAL = "triton_enable_empty_final_response"
"""Whether a decoupled model's stream ends with an empty answer that says so."""
FINAL = "triton_final_response"
FILE_PREFIX = "file:"
FORWARDED = "leptonic-forwarded"
"""Metadata of a request that another replica could not answer itself: its name."""


class Wish(NamedTuple):
    """How a client wants one output."""

    classes: int = 0
    window: Window | None = None
    binary: bool = False
    """Behind the JSON; gRPC has no such choice."""


class Wanted(NamedTuple):
    """How a client wants its answer."""

    wishes: Mapping[str, Wish]
    typed: bool
    """As values, for that is how the inputs came."""
    empty_final: bool


def call_of(
    request: oip.ModelInferRequest, memory: SharedMemory, context: Any
) -> tuple[Call, Wanted]:
    """Raises `Refused`."""
    said = parameters_of(request.parameters)
    wishes = {}
    for output in request.outputs:
        own = parameters_of(output.parameters)
        window = memory.window(output.name, own)
        wishes[output.name] = Wish(classes_of(output.name, own), window)
    typed = any(tensor.HasField("contents") for tensor in request.inputs)
    wanted = Wanted(wishes, typed, empty_final_of(said))
    metadata = dict(context.invocation_metadata() or ())
    call = Call(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        given=given_of(request, memory),
        outputs=[output.name for output in request.outputs],
        deadline_ns=deadline_of(context),
        traceparent=str(metadata.get(TRACE_HEADER, "")),
        parameters={n: value for n, value in said.items() if not n.startswith(RESERVED)},
        classes={name: wish.classes for name, wish in wishes.items() if wish.classes},
        forwarded=FORWARDED in metadata,
    )
    return call, wanted


def deadline_of(context: Any) -> int:
    """Of a call; 0 for none."""
    left_s = context.time_remaining()
    return 0 if left_s is None else monotonic_ns() + int(left_s * NS)


def parameters_of(said: Mapping[str, oip.InferParameter]) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    for name, value in said.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise Invalid(
                f"invalid value type for '{name}' parameter, expected "
                "int64_param, bool_param, or string_param."
            )
        found[name] = getattr(value, kind)
    return found


def empty_final_of(said: Mapping[str, Parameter]) -> bool:
    for name in said:
        if name.startswith(RESERVED) and name != EMPTY_FINAL:
            raise Invalid(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the "
                f"following keys starting with 'triton_' are allowed: {EMPTY_FINAL}"
            )
    value = said.get(EMPTY_FINAL, False)
    if not isinstance(value, bool):
        raise Invalid(f"invalid value type for '{EMPTY_FINAL}' parameter, expected bool_param.")
    return value


def given_of(request: oip.ModelInferRequest, memory: SharedMemory) -> list[Given]:
    """Each input from where its values are: shared memory, its own contents, or the raw buffers,
    which come in the order of the inputs that have neither."""
    buffers = iter(request.raw_input_contents)
    given = [given_one(request, tensor, memory, buffers) for tensor in request.inputs]
    left = sum(1 for _ in buffers)
    if left:
        count = len(request.raw_input_contents)
        raise Invalid(
            f"got {count} buffers for {count - left} inputs that need one", "raw_input_contents"
        )
    return given


def given_one(request: oip.ModelInferRequest, tensor: Any, memory: SharedMemory, raw: Any) -> Given:
    window = memory.window(tensor.name, parameters_of(tensor.parameters))
    place = f"input tensor '{tensor.name}' for model '{request.model_name}'"
    if tensor.HasField("contents"):
        if window is not None:
            raise Invalid(f"unexpected 'content' provided when using shared memory for {place}")
        if request.raw_input_contents:
            raise Invalid(
                "contents field must not be specified when using raw_input_contents "
                f"for '{tensor.name}' for model '{request.model_name}'"
            )
        return with_values(tensor, place)
    buffer: bytes | None
    if window is not None:
        buffer = window.read(tensor.name, tensor.datatype, tensor.shape)
    elif (buffer := next(raw, None)) is None:
        raise Invalid(f"unable to find data for {place} in request.")
    return Given(tensor.name, tensor.datatype, tensor.shape, raw=buffer)


def with_values(tensor: Any, place: str) -> Given:
    """The values must stand in the field of their datatype, and in no other."""
    own = CONTENTS.get(tensor.datatype)
    for field, _ in tensor.contents.ListFields():
        if own is not None and field.name != own:
            raise Invalid(
                f"unexpected explicit tensor data for {place}: {tensor.datatype} values belong "
                f"into {own}, not into {field.name}"
            )
    values = getattr(tensor.contents, own) if own else ()
    return Given(tensor.name, tensor.datatype, tensor.shape, values=values)


async def response_of(answer: Answer, wanted: Wanted) -> oip.ModelInferResponse:
    """Raises `Refused`."""
    return await aside(bytes_by_value(answer, wanted), written, answer, wanted)


def bytes_by_value(answer: Answer, wanted: Wanted) -> int:
    """Of the outputs that are no numbers lying in a row."""
    return sum(
        array.nbytes
        for tensor, array in answer.outputs
        if wanted.typed or tensor.datatype == "BYTES"
    )


def written(answer: Answer, wanted: Wanted) -> oip.ModelInferResponse:
    """Raw, or as values when the request came so and every output can."""
    response = oip.ModelInferResponse(
        model_name=answer.model, model_version=answer.version, id=answer.id
    )
    if answer.traceparent:
        response.parameters[TRACE_HEADER].string_param = answer.traceparent
    typed = wanted.typed and all(tensor.datatype in CONTENTS for tensor, _ in answer.outputs)
    for tensor, array in answer.outputs:
        wish = wanted.wishes.get(tensor.name, Wish())
        if wish.classes and not answer.classified:
            own = answer.labels.get(tensor.name, ())
            tensor, array = classified(tensor, array, wish.classes, own)
        add_output(response, tensor, array, wish.window, typed)
    return response


def add_output(response: Any, tensor: Tensor, array: Array, window: Any, typed: bool) -> None:
    output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
    if window is not None:
        raw = tensors.to_raw(tensor.datatype, array)
        window.write(tensor.name, raw)
        for name, value in window.parameters(raw).items():
            set_parameter(output.parameters[name], value)
        if not typed:  # clients find a tensor's buffer by its position
            response.raw_output_contents.append(b"")
    elif typed:
        values = getattr(output.contents, CONTENTS[tensor.datatype])
        for part in tensors.parts(array):
            values.extend(tensors.to_values(tensor.datatype, part))
    else:
        response.raw_output_contents.append(tensors.to_raw(tensor.datatype, array))


def set_parameter(parameter: oip.InferParameter, value: Parameter) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def metadata_of(name: str, versions: Sequence[str], served: Served) -> Any:
    kind = oip.ModelMetadataResponse.TensorMetadata
    signature = served.signature
    return oip.ModelMetadataResponse(
        name=name,
        versions=versions,
        platform=served.model.platform,
        inputs=[kind(**msgspec.structs.asdict(tensor)) for tensor in signature.inputs],
        outputs=[kind(**msgspec.structs.asdict(tensor)) for tensor in signature.outputs],
    )


def statistics_of(served: Served) -> oip.ModelStatistics:
    counts = served.counts()
    return oip.ModelStatistics(
        name=served.name,
        version=served.version,
        last_inference=counts.last_inference_ms,
        inference_count=counts.inference_count,
        execution_count=sum(runs for runs, *_ in counts.batches.values()),
        inference_stats=inference_stats_of(counts),
        batch_stats=[
            oip.InferBatchStatistics(
                batch_size=rows,
                compute_input=duration(runs, input_ns),
                compute_infer=duration(runs, infer_ns),
                compute_output=duration(runs, output_ns),
            )
            for rows, (runs, input_ns, infer_ns, output_ns) in sorted(counts.batches.items())
        ],
        response_stats={
            str(place): response_stats_of(taken)
            for place, taken in sorted(served.responses.by_place.items())
        },
    )


def response_stats_of(taken: Taken) -> oip.InferResponseStatistics:
    return oip.InferResponseStatistics(
        compute_infer=duration(taken.success, taken.success_ns),
        compute_output=duration(0, 0),
        success=duration(taken.success, taken.success_ns),
        fail=duration(taken.fail, taken.fail_ns),
        empty_response=duration(0, 0),
        cancel=duration(0, 0),
    )


def inference_stats_of(counts: Counts) -> oip.InferStatistics:
    """A cache there is none, and so neither hits nor misses."""
    count = counts.success_count
    failed = counts.failures.values()
    return oip.InferStatistics(
        success=duration(count, counts.success_ns),
        fail=duration(sum(n for n, _ in failed), sum(ns for _, ns in failed)),
        queue=duration(count, counts.queue_ns),
        compute_input=duration(count, counts.compute_input_ns),
        compute_infer=duration(count, counts.compute_infer_ns),
        compute_output=duration(count, counts.compute_output_ns),
        cache_hit=duration(0, 0),
        cache_miss=duration(0, 0),
    )


def duration(count: int, ns: int) -> oip.StatisticDuration:
    return oip.StatisticDuration(count=count, ns=ns)


def load_of(said: Mapping[str, oip.ModelRepositoryParameter]) -> tuple[str, dict[str, bytes]]:
    """(config, files) of a load request. Raises `Invalid`."""
    config, files = "", {}
    for name, value in said.items():
        if name == "config":
            config = chosen(name, value, "string_param")
        elif name.startswith(FILE_PREFIX):
            files[name] = chosen(name, value, "bytes_param")
        else:
            raise Invalid(f"unrecognized load parameter '{name}': 'config' and 'file:...' are")
    return config, files


def chosen(name: str, value: oip.ModelRepositoryParameter, kind: str) -> Any:
    if value.WhichOneof("parameter_choice") != kind:
        raise Invalid(f"invalid value type for '{name}' parameter, expected {kind}.")
    return getattr(value, kind)


def log_value(name: str, value: oip.LogSettingsRequest.SettingValue) -> bool | int | str:
    kind = value.WhichOneof("parameter_choice")
    if kind is None:
        raise Invalid(f"log setting '{name}' has no value")
    found: bool | int | str = getattr(value, kind)
    return found


def log_setting(value: bool | int | str) -> oip.LogSettingsResponse.SettingValue:
    kind = oip.LogSettingsResponse.SettingValue
    if isinstance(value, bool):
        return kind(bool_param=value)
    return kind(uint32_param=value) if isinstance(value, int) else kind(string_param=value)
