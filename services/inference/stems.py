"""An image's first layers - a convolution of few channels, ReLU, max-pooling - as one operator of
ours, `ConvPool` (`native/conv_pool.h`).

onnxruntime runs them one after the other and writes to memory what comes between: of the articles'
CNN that is 10 us a row and half of the model; as one it is 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper

from services.inference.graphs import Graph, Values, attributes, is_a
from services.inference.operators import DOMAIN
from services.inference.windows import Window, windows_of

CHANNELS_MAX = 15
"""Of the image; onnxruntime keeps 16 and more in blocks, and does well."""
TAPS_MAX = 192
"""Weights of 32 channels that come out, 24 KiB, stay in the L1 cache."""
POOL_MAX = 8
BLOCK = 16
"""The channels that come out are padded to a multiple."""


class Stem(NamedTuple):
    nodes: list[onnx.NodeProto]
    """The convolution, ReLU or not, the pool."""
    weights: Values
    """[made channels, given channels, rows, columns]"""
    bias: Values
    conv: tuple[Window, Window]
    """Rows, columns."""
    pool: tuple[Window, Window]


def fuse(graph: Graph) -> int:
    """How many there were."""
    stems: dict[str, Stem] = {}
    """By the name of what the convolution makes."""
    for node in reversed(graph.nodes):
        if (stem := stem_at(graph, node)) and not is_convolved(graph, stem, stems):
            stems[node.output[0]] = stem
    for stem in stems.values():
        flat, product = flattened(graph, stem)
        graph.replace([*stem.nodes, *flat], [operator_of(graph, stem, flat)])
        for node in product:
            graph.replace([node], [reordered(graph, stem, node)])
    if stems:
        graph.use(DOMAIN)
    return len(stems)


def is_convolved(graph: Graph, stem: Stem, fused: dict[str, Stem]) -> bool:
    """Between two convolutions of its own onnxruntime keeps images in blocks of channels; to take
    them out of these costs what is won."""
    readers = graph.readers.get(stem.nodes[-1].output[0], [])
    return any(is_a(reader, "Conv") and reader.output[0] not in fused for reader in readers)


def stem_at(graph: Graph, node: onnx.NodeProto) -> Stem | None:
    nodes = [node]
    for operator in ("Relu", "MaxPool"):
        following = graph.only_reader(nodes[-1])
        if is_a(following, operator):
            nodes.append(following)
    pool = nodes[-1]
    if not (is_a(node, "Conv") and is_a(pool, "MaxPool")) or len(pool.output) > 1:
        return None
    weights = graph.weights(node)
    if weights is None:
        return None
    bias = graph.value(node.input[2]) if node.input[2:] else np.zeros(len(weights), np.float32)
    sizes, pooled = windows_of(node, weights.shape[2:]), windows_of(pool)
    given, taps = weights.shape[1], int(np.prod(weights.shape[1:]))
    if bias is None or sizes is None or pooled is None or given > CHANNELS_MAX or taps > TAPS_MAX:
        return None
    if max(one.size for one in pooled) > POOL_MAX:
        return None
    return Stem(nodes, weights, bias, sizes, pooled)


def flattened(
    graph: Graph, stem: Stem
) -> tuple[Sequence[onnx.NodeProto], Sequence[onnx.NodeProto]]:
    """`Flatten` and `Gemm` where they are all that follows: then channels may come last, as they
    are computed, and nothing has to be turned round."""
    flat = graph.only_reader(stem.nodes[-1])
    if not is_a(flat, "Flatten") or len(stem.weights) % BLOCK:
        return (), ()
    product = graph.only_reader(flat)
    if not is_a(product, "Gemm") or attributes(flat).get("axis", 1) != 1:
        return (), ()
    weights, said = graph.value(product.input[1]), attributes(product)
    is_plain = product.input[0] == flat.output[0] and not said.get("transA", 0)
    if weights is None or weights.ndim != 2 or not is_plain:
        return (), ()
    inputs = weights.shape[said.get("transB", 0)]
    return ((flat,), (product,)) if inputs % len(stem.weights) == 0 else ((), ())


def reordered(graph: Graph, stem: Stem, product: onnx.NodeProto) -> onnx.NodeProto:
    """The `Gemm`, its weights for channels that come last."""
    said = attributes(product)
    weights = graph.value(product.input[1])
    assert weights is not None
    rows = weights.T if said.pop("transB", 0) else weights
    channels = len(stem.weights)
    turned = rows.reshape(channels, -1, rows.shape[1]).transpose(1, 0, 2).reshape(rows.shape)
    name = product.output[0]
    given = [product.input[0], graph.add(f"{name}/weights", np.ascontiguousarray(turned))]
    return helper.make_node("Gemm", [*given, *product.input[2:]], [name], **said)


def operator_of(graph: Graph, stem: Stem, flat: Sequence[onnx.NodeProto]) -> onnx.NodeProto:
    name = (*stem.nodes, *flat)[-1].output[0]
    made = len(stem.weights)
    room = -made % BLOCK
    packed = np.pad(stem.weights.transpose(1, 2, 3, 0), [(0, 0)] * 3 + [(0, room)])
    sizes = {
        f"{what}_{part}_{axis}": value
        for what, pair in (("conv", stem.conv), ("pool", stem.pool))
        for axis, window in zip("yx", pair, strict=True)
        for part, value in window._asdict().items()
    }
    return helper.make_node(
        "ConvPool",
        [
            stem.nodes[0].input[0],
            graph.add(f"{name}/weights", np.ascontiguousarray(packed)),
            graph.add(f"{name}/bias", np.pad(stem.bias, (0, room))),
        ],
        [name],
        domain=DOMAIN,
        channels=made,
        relu=int(len(stem.nodes) > 2),
        flat=len(flat),
        **sizes,
    )
