"""A recipe of one's own: `recipe: examples.custom_recipe:Residual` in a pipeline's `train`.

The trainer imports it from the folder it runs in, or from LEPTONIC_TRAINER_RECIPES_PATH.
"""

import math

import numpy as np
from torch import Tensor, nn

from services.trainer.recipes import Params, Recipe


class Block(nn.Module):
    """x + f(x): what a layer adds, it need not relearn."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, features: Tensor) -> Tensor:
        added: Tensor = self.inner(features)
        return features + added


class Residual(Recipe):
    """A few residual blocks; measures, besides the usual, whether the label is in the best two."""

    class Params(Params, frozen=True, kw_only=True):
        width: int = 64
        blocks: int = 2

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        width = self.params.width
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(input_shape), width),
            *(Block(width) for _ in range(self.params.blocks)),
            nn.Linear(width, outputs),
        )

    def metrics(self, predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        best = np.argsort(predicted, axis=1)[:, -2:]
        top_two = float(np.mean((best == targets[:, None]).any(axis=1)))
        return {**super().metrics(predicted, targets), "top_two": top_two}
