"""Image normalisation in one pass: cast, scale, shift and NHWC -> NCHW.

A byte has 256 values, so a channel has 256 results. They are computed once in float64 and rounded
once, which makes the result the float32 nearest to the reference, and the pass over the pixels a
look-up in a table of 1 KiB a channel instead of three roundings a pixel.
"""

import functools
import os
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

# numba 0.68 crashes in integer loops on some CPUs unless it compiles for a generic one.
os.environ.setdefault("NUMBA_CPU_NAME", "generic")

import numba

ERROR_ULP_MAX = 0.5
"""Against the float64 reference: correctly rounded."""
TABLES_MAX = 64
"""Tables kept, of 1 KiB a channel; making one takes 30 us, as long as 25,000 pixels."""


def normalise(
    images: NDArray[np.uint8], mean: Iterable[float], std: Iterable[float]
) -> NDArray[np.float32]:
    """uint8 [N, H, W, C], any strides -> float32 [N, C, H, W], contiguous.

    `(x / 255 - mean[c]) / std[c]`. Raises `ValueError`, which names the argument.
    """
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"images: uint8 [N, H, W, C], got {images.dtype} {list(images.shape)}")
    count, height, width, channels = images.shape
    table = table_of(tuple(map(float, mean)), tuple(map(float, std)), channels)
    out = np.empty((count, channels, height, width), np.float32)
    look_up(images, table, out)
    return out


@functools.lru_cache(TABLES_MAX)
def table_of(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> NDArray[np.float32]:
    """[C, 256]: what each byte becomes in each channel."""
    shift, scale = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    for name, given in (("mean", shift), ("std", scale)):
        if given.shape != (channels,):
            raise ValueError(f"{name}: one for each of {channels} channels, got {given.shape}")
        if not np.isfinite(given).all():
            raise ValueError(f"{name}: finite numbers, got {given.tolist()}")
    if not (scale > 0).all():
        raise ValueError(f"std: above 0, got {scale.tolist()}")
    values = np.arange(256) / 255.0
    table = ((values - shift[:, None]) / scale[:, None]).astype(np.float32)
    table.flags.writeable = False  # shared by every call with this mean and std
    return table


IMAGES = numba.types.Array(numba.uint8, 4, "A", readonly=True)
TABLE = numba.types.Array(numba.float32, 2, "C", readonly=True)


@numba.njit(numba.void(IMAGES, TABLE, numba.float32[:, :, :, ::1]), nogil=True)
def look_up(images, table, out):  # type: ignore[no-untyped-def]
    """Writes go through memory in order; reads stride over the channels of a row."""
    count, height, width, channels = images.shape
    for n in range(count):
        for h in range(height):
            for c in range(channels):
                line, row, values = out[n, c, h], images[n, h, :, c], table[c]
                for w in range(width):
                    line[w] = values[row[w]]
