"""`python -m bench.normalise`: the kernel against numpy's and torch's plain expressions.

One thread each, rounds alternating, medians; writes `normalise.csv` beside this file. The ratios
count: how many times faster the kernel is.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch

from bench import tables
from kernels.normalise import normalise

RESULTS = Path(__file__).with_suffix(".csv")
SHAPES = ((1, 28, 28, 1), (256, 28, 28, 1), (32, 64, 64, 3), (16, 224, 224, 3))
ROUNDS = 9
ROUND_PIXELS = 4_000_000
"""Small batches repeat until a round has about so many."""


def with_numpy(images: Any, mean: Any, std: Any) -> Any:
    scaled = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def with_torch(images: Any, mean: Any, std: Any) -> Any:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32)
    return ((pixels / 255 - mean) / std).contiguous()


def measure(shape: tuple[int, ...]) -> dict[str, Any]:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    mean = np.linspace(0.4, 0.5, shape[-1], dtype=np.float32)
    std = np.linspace(0.2, 0.3, shape[-1], dtype=np.float32)
    planes = [torch.from_numpy(one).view(1, -1, 1, 1) for one in (mean, std)]
    calls: dict[str, Callable[[], Any]] = {
        "kernel": lambda: normalise(images, mean, std),
        "numpy": lambda: with_numpy(images, mean, std),
        "torch": lambda: with_torch(images, *planes),
    }
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            took[name].append(seconds(call, max(1, ROUND_PIXELS // images.size)))
    us = {name: median(times) * 1e6 for name, times in took.items()}
    return {
        "shape": "x".join(map(str, shape)),
        **{f"{name}_us": round(value, 1) for name, value in us.items()},
        **{f"times_{name}": round(us[name] / us["kernel"], 2) for name in ("numpy", "torch")},
    }


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of one call."""
    started = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - started) / repeats


def main() -> None:
    torch.set_num_threads(1)
    tables.keep(RESULTS, [measure(shape) for shape in SHAPES])


if __name__ == "__main__":
    main()
