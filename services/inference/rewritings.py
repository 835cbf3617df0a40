"""What is done to a graph, one after the other: see `rewriting`, which loads this when it must."""

import logging
from collections.abc import Callable

import onnx
from google.protobuf.message import DecodeError
from onnx.shape_inference import InferenceError

from services.inference import dense, gemms, operators, stems
from services.inference.graphs import Graph

log = logging.getLogger(__name__)
BROKEN = (DecodeError, InferenceError, ArithmeticError, LookupError, TypeError, ValueError)
"""What reading a graph raises that is none, or not a valid one."""


def applied(name: str, graph: bytes) -> bytes | None:
    """None where there was nothing to do. What is wrong with it is for onnxruntime to say."""
    done = {}
    try:
        found = Graph(onnx.ModelProto.FromString(graph))
        for what, rewrite in rewritings().items() if found.is_plain else ():
            if count := rewrite(found):
                done[what] = count
                found.settle()
    except BROKEN as error:
        log.warning("model %s: its graph stays as it is: %s", name, error)
        return None
    if not done:
        return None
    log.info("model %s: %s", name, ", ".join(f"{what}: {count}" for what, count in done.items()))
    return found.rewritten().SerializeToString()


def rewritings() -> dict[str, Callable[[Graph], int]]:
    """What to tell of each -> what does it. In this order."""
    found: dict[str, Callable[[Graph], int]] = {"convolutions as products": gemms.multiply}
    if operators.library():
        found["convolutions with their pools"] = stems.fuse
    if operators.have_tiles():
        found["products on tile registers"] = dense.spread
    return found
