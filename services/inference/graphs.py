"""An ONNX graph while it is rewritten: who reads what, and which values are known.

A rewriting leaves the names of all tensors that others read, and so the signature, as they are.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np
import onnx
from onnx import helper, numpy_helper

Values = np.ndarray[Any, Any]
STANDARD = ("", "ai.onnx")
OPSET_MIN = 13


class Graph:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.known = {one.name: one for one in model.graph.initializer}
        for one in model.graph.input:  # a caller may give another value
            self.known.pop(one.name, None)
        self.added: dict[str, Values] = {}
        self.given_back = {one.name for one in model.graph.output}
        self.names = {one.name for one in model.graph.input}
        self.names.update(one.name for one in model.graph.initializer)
        self.names.update(name for node in model.graph.node for name in (*node.input, *node.output))
        self.take(model.graph.node)

    def take(self, nodes: Iterable[onnx.NodeProto]) -> None:
        self.nodes = list(nodes)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.instead: dict[str, Sequence[onnx.NodeProto]] = {}
        """First output of a node -> what takes its place once the rewriting is through."""

    @property
    def is_plain(self) -> bool:
        """No branches and loops, whose bodies read tensors of the graph around them; no weights in
        files beside it; operators as of ONNX 1.8 or later."""
        kinds = {one.type for node in self.nodes for one in node.attribute}
        opsets = [one.version for one in self.model.opset_import if one.domain in STANDARD]
        is_flat = not kinds & {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}
        is_whole = not any(one.external_data for one in self.known.values())
        return is_flat and is_whole and min(opsets, default=0) >= OPSET_MIN

    def value(self, name: str) -> Values | None:
        """float32 that is the same in every run."""
        for _ in self.nodes:
            maker = self.makers.get(name)
            if not is_a(maker, "Identity"):
                break
            name = maker.input[0]
        values = self.added.get(name)
        if values is None and name in self.known:
            values = numpy_helper.to_array(self.known[name])
        return values if values is not None and values.dtype == np.float32 else None

    def weights(self, node: onnx.NodeProto) -> Values | None:
        """Of a convolution over images: [made channels, given channels, rows, columns]."""
        values = self.value(node.input[1]) if node.input[1:] else None
        return values if values is not None and values.ndim == 4 else None

    def only_reader(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """Of the node's one output, when nobody else sees it."""
        readers = self.readers.get(node.output[0], [])
        is_seen = node.output[0] in self.given_back or len(node.output) > 1
        return readers[0] if len(readers) == 1 and not is_seen else None

    def name(self, wanted: str) -> str:
        """One that no other tensor has."""
        while wanted in self.names:
            wanted += "/"
        self.names.add(wanted)
        return wanted

    def add(self, wanted: str, values: Values) -> str:
        """A constant of any datatype; the name it got."""
        name = self.name(wanted)
        self.added[name] = values
        return name

    def use(self, domain: str) -> None:
        """Operators of this one too."""
        if all(one.domain != domain for one in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(domain, 1))

    def replace(self, old: Sequence[onnx.NodeProto], new: Sequence[onnx.NodeProto]) -> None:
        """`new` stands where the last of `old` stood."""
        for node in old[:-1]:
            self.instead[node.output[0]] = ()
        self.instead[old[-1].output[0]] = new

    def settle(self) -> None:
        """What was replaced is gone; the next rewriting sees what is there now."""
        found = [self.instead.get("".join(node.output[:1]), (node,)) for node in self.nodes]
        self.take(itertools.chain.from_iterable(found))

    def rewritten(self) -> onnx.ModelProto:
        """Without the constants that nobody reads any more."""
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        read = self.readers.keys() | self.given_back
        for place in reversed(range(len(graph.initializer))):
            if graph.initializer[place].name not in read:
                del graph.initializer[place]
        for name in sorted(self.added.keys() & read):
            values = self.added[name]
            graph.initializer.add(
                name=name,
                dims=values.shape,
                data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
                raw_data=values.tobytes(),
            )
        return self.model


def is_a(node: onnx.NodeProto | None, operator: str) -> TypeGuard[onnx.NodeProto]:
    return node is not None and node.op_type == operator and node.domain in STANDARD


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}
