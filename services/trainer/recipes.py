"""Recipes: the code that builds a module, its loss and its metrics. Built in: mlp and cnn.

A user's own is named `module:Class`: a subclass of `Recipe` with `build`, and `Params` with the
parameters it adds.
"""

import hashlib
import importlib
import inspect
import math
import sys
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from libs.contracts.pipeline import Train
from services.trainer.domain import Unusable, is_own_code

Count = Annotated[int, Meta(ge=1, le=1_000_000)]
Rate = Annotated[float, Meta(gt=0, le=10)]
Share = Annotated[float, Meta(ge=0, lt=1)]
PROBABILITY_MIN = 1e-7


class Params(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every recipe takes; a recipe's own `Params` adds to these."""

    epochs: Count = 10
    batch_size: Count = 64
    """Rows of one optimizer step, over all workers together."""
    learning_rate: Rate = 1e-3


class Recipe:
    """`predicted` is what is served: probabilities [rows, classes], or predictions [rows].
    `targets` are class indices (-1: a label never seen in training), or values."""

    Params: type[Params] = Params

    def __init__(self, params: Any, task: str) -> None:
        self.params = params
        self.task = task

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        """[rows, *input_shape] -> [rows, outputs]; `outputs` is 1 for regression."""
        raise Unusable(f"$.train.recipe: {type(self).__name__} does not define build()")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.task == "classification":
            return nn.functional.cross_entropy(outputs, targets)
        return nn.functional.mse_loss(outputs.squeeze(1), targets)

    def metrics(self, predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        if self.task == "classification":
            return classification(predicted, targets)
        return regression(predicted, targets)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Fused: a small step takes 0.9 ms with it, 1.9 ms without."""
        return torch.optim.Adam(module.parameters(), lr=self.params.learning_rate, fused=True)


class Mlp(Recipe):
    """Dense layers with ReLU between them."""

    class Params(Params, frozen=True, kw_only=True):
        hidden: tuple[Count, ...] = (128,)
        dropout: Share = 0.0

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(input_shape)
        for size in self.params.hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            if self.params.dropout:
                layers.append(nn.Dropout(self.params.dropout))
            width = size
        return nn.Sequential(*layers, nn.Linear(width, outputs))


class Cnn(Recipe):
    """Conv 3x3 / ReLU / MaxPool 2 / Flatten / Dense / ReLU / Dense."""

    class Params(Params, frozen=True, kw_only=True):
        channels: Count = 32
        dense: Count = 128

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        if len(input_shape) != 3 or min(input_shape[1:]) < 4:
            shape = list(input_shape)
            raise Unusable(f"$.train.recipe: cnn needs images of 4x4 or more in CHW, got {shape}")
        colors, height, width = input_shape
        pooled = ((height - 2) // 2) * ((width - 2) // 2)
        return nn.Sequential(
            nn.Conv2d(colors, self.params.channels, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(self.params.channels * pooled, self.params.dense),
            nn.ReLU(),
            nn.Linear(self.params.dense, outputs),
        )


BUILT_IN: dict[str, type[Recipe]] = {"mlp": Mlp, "cnn": Cnn}


def recipe_of(train: Train) -> Recipe:
    """Raises `Unusable`, which names the field."""
    kind = class_of(train.recipe)
    try:
        params = msgspec.convert(train.params, kind.Params)
    except msgspec.ValidationError as error:
        known = ", ".join(sorted(kind.Params.__struct_fields__))
        problem, _, path = str(error).partition(" - at `$")
        raise Unusable(f"$.train.params{path.rstrip('`')}: {problem}; known: {known}") from error
    return kind(params, train.task)


def class_of(name: str) -> type[Recipe]:
    if not is_own_code(name):
        return BUILT_IN[name]
    module_name, _, class_name = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module_name), class_name, None)
    except (ImportError, SyntaxError) as error:
        raise Unusable(f"$.train.recipe: cannot import {module_name!r}: {error}") from error
    if not (inspect.isclass(kind) and issubclass(kind, Recipe)):
        problem = f"{module_name!r} has no class {class_name!r} that is a Recipe"
        raise Unusable(f"$.train.recipe: {problem}")
    return kind


def source_digest(recipe: Recipe) -> str:
    """sha256 of the file that holds a user's recipe: part of what its weights came from."""
    source = inspect.getsource(sys.modules[type(recipe).__module__])
    return hashlib.sha256(source.encode()).hexdigest()


def classification(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    guessed = probabilities.argmax(axis=1)
    known = np.clip(targets, 0, None)
    chance = np.where(targets < 0, 0.0, probabilities[np.arange(len(targets)), known])
    scores = []
    for one in np.union1d(guessed, targets):
        hits = np.sum((guessed == one) & (targets == one))
        scores.append(2 * hits / (np.sum(guessed == one) + np.sum(targets == one)))
    return {
        "accuracy": float(np.mean(guessed == targets)),
        "f1_macro": float(np.mean(scores)),
        "loss": float(-np.mean(np.log(np.clip(chance, PROBABILITY_MIN, None)))),
    }


def regression(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    error = predicted.astype(np.float64) - targets.astype(np.float64)
    mse = float(np.mean(error**2))
    spread = float(np.var(targets.astype(np.float64)))
    r2 = 1 - mse / spread if spread else 0.0
    return {"mae": float(np.mean(np.abs(error))), "mse": mse, "r2": r2, "loss": mse}
