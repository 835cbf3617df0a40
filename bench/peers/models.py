"""The four models with seeded weights, exported once by the trainer's own code; their floor."""

import os
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from time import perf_counter

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from libs.contracts.pipeline import Train
from services.trainer.export import OPSET_MAX, exported
from services.trainer.recipes import recipe_of

SHAPES: dict[str, tuple[int, ...]] = {
    "identity": (64,),
    "mlp": (64,),
    "cnn": (1, 28, 28),
    "resnet": (3, 64, 64),
}
SEED = 7
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, given: int, made: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(given, made, 3, stride, 1, bias=False),
            nn.BatchNorm2d(made),
            nn.ReLU(),
            nn.Conv2d(made, made, 3, 1, 1, bias=False),
            nn.BatchNorm2d(made),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(nn.Conv2d(given, made, 1, stride, bias=False), nn.BatchNorm2d(made))
        )

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.path(image) + self.shortcut(image))


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2015), 1000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    width = 64
    for made, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(width, made, stride), Block(made, made, 1)]
        width = made
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))


def module_of(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    if name == "identity":
        return nn.Identity()
    if name == "resnet":
        return resnet18()
    return recipe_of(Train(recipe=name, task="classification")).build(SHAPES[name], 10)


def export_missing(folder: Path) -> None:
    """`<folder>/<name>.onnx`: features [batch, *shape] -> scores [batch, n], float32."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shape in SHAPES.items():
        path = folder / f"{name}.onnx"
        if not path.exists():
            model = exported(module_of(name), torch.zeros(2, *shape), OPSET_MAX)
            path.write_bytes(model.SerializeToString())


def rows_of(name: str, count: int, seed: int = SEED) -> Floats:
    return np.random.default_rng(seed).random((count, *SHAPES[name]), dtype=np.float32)


class Reference:
    """onnxruntime in this process, one thread."""

    def __init__(self, folder: Path, name: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.name = name
        self.session = onnxruntime.InferenceSession(folder / f"{name}.onnx", options)

    def run(self, features: Floats) -> Floats:
        scores: Floats = self.session.run(["scores"], {"features": features})[0]
        return scores

    def seconds(self, rows: int, budget_s: float) -> float:
        """Mean time of one batch of so many rows: a server's rate is a mean too."""
        features = rows_of(self.name, rows)
        return fmean(self.times(features, budget_s))

    def times(self, features: Floats, budget_s: float) -> Iterator[float]:
        self.run(features)
        ends = perf_counter() + budget_s
        while True:
            started = perf_counter()
            self.run(features)
            ended = perf_counter()
            yield ended - started
            if ended > ends:
                return


def on_core(core: int, reference: Reference, rows: int, budget_s: float) -> float:
    """`seconds`, on the core where the servers run too."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        return reference.seconds(rows, budget_s)
    finally:
        os.sched_setaffinity(0, before)
