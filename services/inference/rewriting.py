"""What a graph becomes before onnxruntime gets it: the same numbers, up to rounding, sooner."""

import importlib.util
import logging
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.shape_inference import InferenceError

from services.inference import gemms, stems
from services.inference.graphs import Graph

log = logging.getLogger(__name__)
OPERATORS = "leptonic_ops"
"""Compiled from `native/`; where it is missing, graphs go without it."""
MARK = b"Conv"
"""The bytes of a graph hold the names of its operators."""
BROKEN = (DecodeError, InferenceError, IndexError, KeyError, TypeError, ValueError)
"""What reading a graph raises that is none, or not a valid one."""
GRAPH_BYTES_MAX = 512 << 20
"""A larger one is not held twice."""


def library() -> Path | None:
    """Of our operators, for `SessionOptions.register_custom_ops_library`."""
    found = importlib.util.find_spec(OPERATORS)
    return Path(found.origin) if found and found.origin else None


def rewritten(name: str, graph: bytes | Path) -> bytes | Path:
    """The graph itself where there is nothing to do. What is wrong with it is for onnxruntime to
    say."""
    payload = payload_of(graph)
    if payload is None or MARK not in payload:
        return graph
    try:
        found = Graph(onnx.ModelProto.FromString(payload))
        if not found.is_plain:
            return graph
        products, fused = gemms.multiply(found), stems.fuse(found) if library() else 0
    except BROKEN as error:
        log.debug("model %s: its graph is no good: %s", name, error)
        return graph
    if not products + fused:
        return graph
    log.info("model %s: %s convolutions as products, %s fused with pools", name, products, fused)
    return found.rewritten().SerializeToString()


def payload_of(graph: bytes | Path) -> bytes | None:
    if isinstance(graph, bytes):
        return graph if len(graph) <= GRAPH_BYTES_MAX else None
    if not graph.is_file() or graph.stat().st_size > GRAPH_BYTES_MAX:
        return None
    return graph.read_bytes()
