"""The library of operators that `native/ops.cpp` has for onnxruntime, where it was compiled."""

import ctypes
import functools
import importlib.util
from pathlib import Path

import numpy as np

from services.inference.tensors import Array

EXTENSION = "leptonic_ops"
"""`native/build.py` puts it beside the packages."""
DOMAIN = "ai.leptonic"
TILE = 16
DEPTH = 32


def library() -> Path | None:
    """For `SessionOptions.register_custom_ops_library`."""
    found = importlib.util.find_spec(EXTENSION)
    return Path(found.origin) if found and found.origin else None


@functools.cache
def loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))


def have_tiles() -> bool:
    """This processor has tile registers (AMX) that this process may use."""
    path = library()
    return path is not None and bool(loaded(path).leptonic_has_tiles())


def packed(weights: Array) -> Array:
    """float32 [inputs, outputs] -> bfloat16 as bits in uint16, [blocks of 32 outputs, blocks of 32
    inputs, upper and rest, halves of the block, 16 pairs of inputs, 16 outputs * 2]; 0 where there
    is no weight."""
    path, (inputs, outputs) = library(), weights.shape
    assert path is not None
    plain = np.ascontiguousarray(weights, np.float32)
    blocks, depths = -(-outputs // (2 * TILE)), -(-inputs // DEPTH)
    tiles = np.empty((blocks, depths, 2, 2, TILE, DEPTH), np.uint16)
    loaded(path).leptonic_pack(
        plain.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(inputs),
        ctypes.c_int64(outputs),
        tiles.ctypes.data_as(ctypes.c_void_p),
    )
    return tiles
