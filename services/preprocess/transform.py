"""The feature steps: fitted on the train split, compiled to one ONNX graph.

Inputs are the raw feature columns in schema order, [batch] for a scalar and [batch, *shape] for a
tensor; the output `features` is float32. An image alone ([batch, H, W, C]) comes out as
[batch, C, H, W]; anything else as [batch, n], the columns flattened and side by side.

`standardize` and `minmax` are fitted for a scalar as one number, for an image per channel, for
another tensor per element; where nothing varies the scale is 1. Arithmetic is float32 for uint8,
bool and float32 columns, float64 for the others, whose values float32 might not hold.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from libs.contracts.pipeline import Field
from services.preprocess.steps import Steps, cast_type, named, number
from services.preprocess.table import DTYPES, Array, Table, Unusable

OPSET = 20
IR_VERSION = 10
OUTPUT = "features"
CATEGORIES_MAX = 4096
IMAGE_RANK = 3
PIXEL_MAX = 255.0
ONNX_TYPES = {
    "bool": TensorProto.BOOL,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "string": TensorProto.STRING,
}


class Cast(msgspec.Struct, frozen=True, tag_field="op", tag="cast"):
    to: str


class Clip(msgspec.Struct, frozen=True, tag_field="op", tag="clip"):
    min: float | None
    max: float | None


class Affine(msgspec.Struct, frozen=True, tag_field="op", tag="affine"):
    """(x - offset) / scale; 1 value, one a channel, or one an element."""

    step: str
    offset: list[float]
    scale: list[float]


class OneHot(msgspec.Struct, frozen=True, tag_field="op", tag="one_hot"):
    """One column a category; a value not among them is all zeros."""

    categories: list[str | int]


Op = Cast | Clip | Affine | OneHot
Fitted = dict[str, list[Op]]
"""Feature column -> what is done to it, in order."""


def fit(train: Table, schema: Mapping[str, Field], steps: Steps) -> Fitted:
    """Each step sees the train split as the steps before it left it. Raises `Unusable`."""
    fields = {name: field for name, field in schema.items() if field.role == "feature"}
    fitted: Fitted = {name: [] for name in fields}
    values = {name: train.columns[name].values for name in fields}
    ordered = sorted(named(steps), key=lambda step: step[1] != "cast")
    for path, step, options in ordered:
        for name in options.get("columns", applicable(step, fields)):
            if step in FITTERS and name not in fields:
                raise Unusable(f"{path}.columns", f"{name!r} is not a feature")
            if step == "cast" and name in fields:
                op: Op = Cast(cast_type(path, options))
            elif step in FITTERS:
                forbid_after_one_hot(path, name, fitted[name])
                op = FITTERS[step](path, name, values[name], fields[name], options)
            else:
                continue
            fitted[name].append(op)
            values[name] = apply(op, values[name], fields[name])
    return fitted


def applicable(step: str, fields: Mapping[str, Field]) -> list[str]:
    """The columns a step without `columns` is for."""
    if step == "one_hot":
        return [name for name, field in fields.items() if field.type == "string"]
    if step == "image_scale":
        return [name for name, field in fields.items() if len(field.shape) == IMAGE_RANK]
    return [name for name, field in fields.items() if step == "cast" or field.type != "string"]


def forbid_after_one_hot(path: str, name: str, before: list[Op]) -> None:
    if any(isinstance(op, OneHot) for op in before):
        raise Unusable(f"{path}.columns", f"{name!r} is already one_hot")


def as_numbers(path: str, name: str, values: Array) -> Array:
    if values.dtype == np.object_:
        raise Unusable(f"{path}.columns", f"{name!r} is string: cast it or use one_hot")
    return values.astype(np.float64)


def fit_clip(path: str, name: str, values: Array, field: Field, options: dict[str, Any]) -> Op:
    as_numbers(path, name, values)
    low, high = (
        None if options.get(key) is None else number(path, key, options[key])
        for key in ("min", "max")
    )
    if low is None and high is None:
        raise Unusable(path, "clip needs min or max")
    if low is not None and high is not None and low > high:
        raise Unusable(path, f"min {low} is above max {high}")
    return Clip(low, high)


def axes_of(field: Field) -> tuple[int, ...]:
    """What is averaged over: the batch, and for an image its height and width too."""
    return (0, 1, 2) if len(field.shape) == IMAGE_RANK else (0,)


def fit_standardize(
    path: str, name: str, values: Array, field: Field, options: dict[str, Any]
) -> Op:
    numbers = as_numbers(path, name, values)
    mean, std = numbers.mean(axis=axes_of(field)), numbers.std(axis=axes_of(field))
    return affine("standardize", mean, std)


def fit_minmax(path: str, name: str, values: Array, field: Field, options: dict[str, Any]) -> Op:
    numbers = as_numbers(path, name, values)
    low, high = numbers.min(axis=axes_of(field)), numbers.max(axis=axes_of(field))
    return affine("minmax", low, high - low)


def affine(step: str, offset: Array, scale: Array) -> Affine:
    varies = np.where(scale > 0, scale, 1.0)
    return Affine(step, np.ravel(offset).tolist(), np.ravel(varies).tolist())


def fit_image_scale(
    path: str, name: str, values: Array, field: Field, options: dict[str, Any]
) -> Op:
    """x / 255, then (x - mean) / std where they are given: one number, or one a channel."""
    as_numbers(path, name, values)
    if len(field.shape) != IMAGE_RANK:
        raise Unusable(
            f"{path}.columns", f"{name!r} has shape {field.shape}: not height, width, channels"
        )
    mean = per_channel(path, "mean", options.get("mean", 0.0), field.shape[-1])
    std = per_channel(path, "std", options.get("std", 1.0), field.shape[-1])
    if min(std) <= 0:
        raise Unusable(f"{path}.std", f"above 0, got {options['std']}")
    return Affine("image_scale", [PIXEL_MAX * m for m in mean], [PIXEL_MAX * s for s in std])


def per_channel(path: str, option: str, value: Any, channels: int) -> list[float]:
    if not isinstance(value, list):
        return [number(path, option, value)] * channels
    if len(value) != channels:
        raise Unusable(f"{path}.{option}", f"{len(value)} numbers for {channels} channels")
    return [number(path, option, one) for one in value]


def fit_one_hot(path: str, name: str, values: Array, field: Field, options: dict[str, Any]) -> Op:
    if field.shape or values.dtype.kind not in "Obiu":
        raise Unusable(f"{path}.columns", f"{name!r} must be a scalar string, integer or bool")
    text = values.dtype == np.object_
    categories: list[str | int] = [
        *(sorted(set(values)) if text else sorted({int(v) for v in values}))
    ]
    if len(categories) > CATEGORIES_MAX:
        problem = f"{name!r} has {len(categories)} values; at most {CATEGORIES_MAX}"
        raise Unusable(f"{path}.columns", problem)
    return OneHot(categories)


FITTERS = {
    "clip": fit_clip,
    "standardize": fit_standardize,
    "minmax": fit_minmax,
    "image_scale": fit_image_scale,
    "one_hot": fit_one_hot,
}


def apply(op: Op, values: Array, field: Field) -> Array:
    """In float64, for fitting the next step."""
    match op:
        case Cast(to="string"):
            return np.array([str(one) for one in values.ravel()], np.object_).reshape(values.shape)
        case Cast(to=to):
            numbers = values.astype(np.float64) if values.dtype == np.object_ else values
            return numbers.astype(DTYPES[to])
        case Clip(min=low, max=high):
            return np.clip(values.astype(np.float64), low, high)
        case Affine(offset=offset, scale=scale):
            shape = constant_shape(len(offset), field)
            numbers = values.astype(np.float64) - np.reshape(offset, shape)
            return np.asarray(numbers / np.reshape(scale, shape))
        case OneHot():
            return values


def constant_shape(size: int, field: Field) -> list[int]:
    """How `size` fitted numbers lie against [*shape]: alone, along the channels, or in full."""
    return field.shape if len(field.shape) != IMAGE_RANK else [size]


class Graph:
    """An ONNX graph being written; names follow from the order, so equal graphs are equal bytes."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"transform/{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def constant(self, values: Array) -> str:
        name = f"transform/constant/{len(self.constants)}"
        if values.dtype == np.object_:
            texts = [str(text).encode() for text in values.ravel()]
            tensor = helper.make_tensor(name, TensorProto.STRING, values.shape, np.array(texts))
        else:
            tensor = numpy_helper.from_array(values, name)
        self.constants.append(tensor)
        return name


def compile_graph(schema: Mapping[str, Field], fitted: Fitted) -> bytes:
    """ONNX bytes, the same for the same fit. Raises `Unusable`."""
    fields = {name: field for name, field in schema.items() if field.role == "feature"}
    if OUTPUT in fields:
        raise Unusable(f"$.dataset.schema.{OUTPUT}", "the transform's output has this name")
    graph = Graph()
    ends = {
        name: compile_column(graph, name, field, fitted[name]) for name, field in fields.items()
    }
    if len(fields) == 1 and len(next(iter(fields.values())).shape) == IMAGE_RANK:
        (joined,) = (graph.add("Transpose", end, perm=[0, 3, 1, 2]) for end in ends.values())
    else:
        flat = [graph.add("Flatten", end, axis=1) for end in ends.values()]
        joined = graph.add("Concat", *flat, axis=1)
    graph.nodes.append(helper.make_node("Identity", [joined], [OUTPUT], name=OUTPUT))
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "transform",
            [input_of(name, field) for name, field in fields.items()],
            [
                helper.make_tensor_value_info(
                    OUTPUT, TensorProto.FLOAT, output_shape(fields, fitted)
                )
            ],
            graph.constants,
        ),
        producer_name="leptonic",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


def input_of(name: str, field: Field) -> Any:
    return helper.make_tensor_value_info(name, ONNX_TYPES[field.type], ["batch", *field.shape])


def output_shape(fields: Mapping[str, Field], fitted: Fitted) -> list[str | int]:
    if len(fields) == 1:
        (field,) = fields.values()
        if len(field.shape) == IMAGE_RANK:
            height, width, channels = field.shape
            return ["batch", channels, height, width]
    return ["batch", sum(width_of(field, fitted[name]) for name, field in fields.items())]


def width_of(field: Field, ops: list[Op]) -> int:
    for op in ops:
        if isinstance(op, OneHot):
            return len(op.categories)
    return int(np.prod(field.shape, dtype=np.int64))


def compile_column(graph: Graph, name: str, field: Field, ops: list[Op]) -> str:
    """The column as float32 of at least two dimensions; returns its name in the graph."""
    end, kind = name, field.type
    for op in ops:
        match op:
            case Cast(to=to):
                end, kind = converted(graph, end, kind, to), to
            case OneHot(categories=categories):
                return compile_one_hot(graph, end, kind, categories)
            case Clip(min=low, max=high):
                end, kind = floating(graph, end, kind)
                bounds = [
                    ("" if b is None else graph.constant(DTYPES[kind](b))) for b in (low, high)
                ]
                end = graph.add("Clip", end, *bounds)
            case Affine(offset=offset, scale=scale):
                end, kind = floating(graph, end, kind)
                shape = constant_shape(len(offset), field)
                away, by = (np.reshape(np.array(v, DTYPES[kind]), shape) for v in (offset, scale))
                end = graph.add("Sub", end, graph.constant(away))
                end = graph.add("Div", end, graph.constant(by))
    if kind == "string":
        problem = "is string: a model takes numbers; add it to one_hot, or cast it"
        raise Unusable(f"$.dataset.schema.{name}", problem)
    end = converted(graph, end, kind, "float32")
    return end if field.shape else unsqueezed(graph, end)


def floating(graph: Graph, end: str, kind: str) -> tuple[str, str]:
    wide = "float64" if kind in ("int32", "int64", "float64") else "float32"
    return converted(graph, end, kind, wide), wide


def converted(graph: Graph, end: str, kind: str, to: str) -> str:
    return end if kind == to else graph.add("Cast", end, to=ONNX_TYPES[to])


def unsqueezed(graph: Graph, end: str) -> str:
    return graph.add("Unsqueeze", end, graph.constant(np.array([1], np.int64)))


def compile_one_hot(graph: Graph, end: str, kind: str, categories: list[str | int]) -> str:
    if kind != "string":
        end = converted(graph, end, kind, "int64")
    known = np.array([categories], np.object_ if kind == "string" else np.int64)
    same = graph.add("Equal", unsqueezed(graph, end), graph.constant(known))
    return graph.add("Cast", same, to=TensorProto.FLOAT)
