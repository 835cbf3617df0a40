"""Matrix products with weights that stay, on a processor's tile registers (`native/dense.h`).

Weights become two bfloat16 each, laid out as the registers take them, and so do the rows that meet
them: what is lost is 2^-16 of a product. The articles' CNN, 5408 by 128, takes 4.4 us a row in
batches of 32 instead of 9 in onnxruntime's float32.
"""

from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper

from services.inference import operators
from services.inference.graphs import Graph, Values, attributes, is_a

WEIGHTS_BYTES_MIN = 256 << 10
"""Smaller ones cost less than what is around them."""


class Product(NamedTuple):
    nodes: list[onnx.NodeProto]
    """`Gemm`, or `MatMul` and `Add` or not; ReLU or not."""
    weights: Values
    """[inputs, outputs]"""
    bias: Values


def spread(graph: Graph) -> int:
    """How many products go to the tile registers."""
    products = [product for node in graph.nodes if (product := product_at(graph, node))]
    for product in products:
        graph.replace(product.nodes, [operator_of(graph, product)])
    if products:
        graph.use(operators.DOMAIN)
    return len(products)


def product_at(graph: Graph, node: onnx.NodeProto) -> Product | None:
    weights = weights_of(graph, node)
    if weights is None or weights.nbytes < WEIGHTS_BYTES_MIN or not np.isfinite(weights).all():
        return None
    nodes = [node]
    bias: Values | None = np.zeros(weights.shape[1], np.float32)
    if is_a(node, "Gemm") and node.input[2:]:
        bias = graph.value(node.input[2])
    elif is_a(following := graph.only_reader(node), "Add"):
        other = next((name for name in following.input if name != node.output[0]), "")
        if (added := graph.value(other)) is not None and added.shape == weights.shape[1:]:
            bias = added
            nodes.append(following)
    if bias is None or bias.shape not in {weights.shape[1:], (1, weights.shape[1])}:
        return None
    following = graph.only_reader(nodes[-1])
    if is_a(following, "Relu"):
        nodes.append(following)
    return Product(nodes, weights, bias.reshape(-1))


def weights_of(graph: Graph, node: onnx.NodeProto) -> Values | None:
    """[inputs, outputs]"""
    said = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0} | attributes(node)
    is_plain = (said["alpha"], said["beta"], said["transA"]) == (1.0, 1.0, 0)
    if not (is_a(node, "Gemm") or is_a(node, "MatMul")) or not is_plain:
        return None
    weights = graph.value(node.input[1])
    if weights is None or weights.ndim != 2:
        return None
    return weights.T if said["transB"] else weights


def operator_of(graph: Graph, product: Product) -> onnx.NodeProto:
    name = product.nodes[-1].output[0]
    inputs, outputs = product.weights.shape
    return helper.make_node(
        "Dense",
        [
            product.nodes[0].input[0],
            graph.add(f"{name}/tiles", operators.packed(product.weights)),
            graph.add(f"{name}/bias", product.bias),
        ],
        [name],
        domain=operators.DOMAIN,
        given=inputs,
        made=outputs,
        relu=int(is_a(product.nodes[-1], "Relu")),
    )
