"""Convolutions of small images as one matrix product of the whole batch.

onnxruntime convolves image after image. Where an image is of few pixels and the weights are larger
than the L2 cache, they come from further away for each image again: a 3x3 convolution of 512
channels to 512 takes 350 us for every image of 2x2, and 130 us for each of eight as one product
(ResNet-18 at 64x64: 1.37 times as many images/s in batches of 8, 1.07 one by one).
"""

from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.shape_inference
from onnx import helper

from services.inference.graphs import Graph, Values, is_a
from services.inference.windows import Window, windows_of

WEIGHTS_BYTES_MIN = 2 << 20
"""An L2 cache of today. With 1.3 MB both took the same, with 0.6 MB the product was 10 % slower."""
PIXELS_MAX = 16
"""That come out of an image. With 49 the convolution uses its weights often enough itself."""
SMALL_BYTES_MAX = 1 << 10
"""Constants up to this size are sizes and the like, which shapes may depend on."""


class Place(NamedTuple):
    """A convolution, with the rows and columns of its images before and after."""

    node: onnx.NodeProto
    weights: Values
    """[made channels, given channels, rows, columns]"""
    windows: tuple[Window, Window]
    given: tuple[int, int]
    made: tuple[int, int]


def multiply(graph: Graph) -> int:
    """How many convolutions became products."""
    heavy = [
        (node, weights)
        for node in graph.nodes
        if is_a(node, "Conv") and (weights := graph.weights(node)) is not None
        if weights.nbytes >= WEIGHTS_BYTES_MIN and weights.shape[2:] != (1, 1)
    ]
    sizes = sizes_of(graph.model) if heavy else {}
    places = [place for one in heavy if (place := place_of(*one, sizes))]
    for place in places:
        graph.replace([place.node], product(graph, place))
    return len(places)


def sizes_of(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Rows and columns of every tensor of images, as far as the graph leaves them no choice."""
    inferred = onnx.shape_inference.infer_shapes(without_weights(model)).graph
    found = {}
    for one in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = one.type.tensor_type.shape.dim
        if len(dims) == 4 and dims[2].dim_value and dims[3].dim_value:
            found[one.name] = (dims[2].dim_value, dims[3].dim_value)
    return found


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """With them the shapes of ResNet-18 take 460 ms, without 1."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    given = {one.name for one in model.graph.input}
    for one in model.graph.initializer:
        if one.ByteSize() <= SMALL_BYTES_MAX:
            bare.graph.initializer.append(one)
        elif one.name not in given:
            bare.graph.input.append(
                helper.make_tensor_value_info(one.name, one.data_type, one.dims)
            )
    return bare


def place_of(
    node: onnx.NodeProto, weights: Values, sizes: dict[str, tuple[int, int]]
) -> Place | None:
    windows, given = windows_of(node, weights.shape[2:]), sizes.get(node.input[0])
    if windows is None or given is None:
        return None
    rows, columns = (window.places(size) for window, size in zip(windows, given, strict=True))
    if min(rows, columns) < 1 or rows * columns > PIXELS_MAX:
        return None
    return Place(node, weights, windows, given, (rows, columns))


def pixels_of(place: Place) -> Values:
    """[pixels that come out * window]: which pixel each weight meets; around the image is one more
    than it has."""
    (rows, columns), (down, across) = place.given, place.windows
    y, x = (
        np.arange(made)[:, None] * window.stride - window.before + np.arange(window.size)
        for made, window in zip(place.made, place.windows, strict=True)
    )
    inside = ((y >= 0) & (y < rows))[:, None, :, None] & ((x >= 0) & (x < columns))[None, :, None]
    pixel = y[:, None, :, None] * columns + x[None, :, None]
    assert pixel.shape == (*place.made, down.size, across.size)
    return np.where(inside, pixel, rows * columns).reshape(-1)


def product(graph: Graph, place: Place) -> list[onnx.NodeProto]:
    """Channels last, so that each window is a row of the matrix, copied pixel by pixel."""
    node, out = place.node, place.node.output[0]
    made, channels = place.weights.shape[:2]
    window = int(np.prod(place.weights.shape[2:]))
    pixels, size = int(np.prod(place.made)), int(np.prod(place.given))
    matrix = place.weights.transpose(2, 3, 1, 0).reshape(window * channels, made)
    constants = {
        "flat": np.array([0, channels, size]),
        "around": np.array([0, 0, 0, 0, 1, 0]),
        "pixels": pixels_of(place),
        "rows": np.array([-1, window * channels]),
        "matrix": np.ascontiguousarray(matrix),
        "images": np.array([-1, pixels, made]),
        "image": np.array([0, made, *place.made]),
    }
    known = {name: graph.add(f"{out}/{name}", value) for name, value in constants.items()}
    steps: list[tuple[str, list[str], dict[str, Any]]] = [
        ("Reshape", [known["flat"]], {}),
        ("Transpose", [], {"perm": [0, 2, 1]}),
        ("Pad", [known["around"]], {}),
        ("Gather", [known["pixels"]], {"axis": 1}),
        ("Reshape", [known["rows"]], {}),
        ("Gemm", [known["matrix"], *node.input[2:]], {}),
        ("Reshape", [known["images"]], {}),
        ("Transpose", [], {"perm": [0, 2, 1]}),
        ("Reshape", [known["image"]], {}),
    ]
    between = [graph.name(f"{out}/{step}") for step in range(1, len(steps))]
    names = [node.input[0], *between, out]
    return [
        helper.make_node(operator, [given, *rest], [gives], **said)
        for (operator, rest, said), given, gives in zip(steps, names, names[1:], strict=False)
    ]
