"""`python -m bench.operators`: graphs as they are served against the same in onnxruntime alone.

One thread each, calls by turns, medians; writes `operators.csv` beside this file. The ratios count:
how many times faster the graph is once it is rewritten, and by what part of the largest the answers
differ.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from bench import tables
from bench.peers.models import SHAPES, module_of
from services.inference.models import OnnxModel
from services.trainer.export import OPSET_MAX, exported

RESULTS = Path(__file__).with_suffix(".csv")
BATCHES = (1, 8, 32, 64)
CALLS_MIN = 11
CALL_S = 1.0
"""A row of the table takes about so long for either side."""


def lenet() -> nn.Module:
    """LeNet-5's layers (LeCun et al. 1998), with ReLU and max-pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (lambda: module_of("cnn"), SHAPES["cnn"]),
    "lenet": (lenet, (1, 28, 28)),
    "mlp 784-1024-10": (wide, (784,)),
    "resnet": (lambda: module_of("resnet"), SHAPES["resnet"]),
}


def measure(name: str) -> list[dict[str, Any]]:
    make, shape = MODULES[name]
    torch.manual_seed(7)
    graph = exported(make(), torch.zeros(2, *shape), OPSET_MAX).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    alone = onnxruntime.InferenceSession(graph, options)
    served = OnnxModel(name, "", graph, batched=True)
    rows = []
    for batch in BATCHES:
        given = {"features": np.random.default_rng(batch).random((batch, *shape), np.float32)}
        calls: dict[str, Callable[[], Any]] = {
            "served": partial(served.run, given),
            "onnxruntime": partial(alone.run, ["scores"], given),
        }
        scores = {
            "served": calls["served"]()["scores"],
            "onnxruntime": calls["onnxruntime"]()[0],
        }
        us = times(calls)
        differs = np.abs(scores["served"] - scores["onnxruntime"]).max()
        rows.append(
            {
                "model": name,
                "rows": batch,
                **{f"{side}_us_a_row": round(value / batch, 2) for side, value in us.items()},
                "times": round(us["onnxruntime"] / us["served"], 2),
                "differs": f"{differs / np.abs(scores['onnxruntime']).max():.1e}",
            }
        )
    served.close()
    return rows


def times(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """us, medians. By turns, a few of one and a few of the other: in a server a model finds its
    weights in the cache as often as it is asked again, and between two models of the same size
    hardly ever."""
    took: dict[str, list[float]] = {side: [] for side in calls}
    ends = perf_counter() + CALL_S * len(calls)
    while perf_counter() < ends or len(took["served"]) < CALLS_MIN:
        for side, call in calls.items():
            call()
            for _ in range(4):
                started = perf_counter()
                call()
                took[side].append(perf_counter() - started)
    return {side: median(seconds) * 1e6 for side, seconds in took.items()}


def main() -> None:
    tables.keep(RESULTS, [row for name in MODULES for row in measure(name)])


if __name__ == "__main__":
    main()
