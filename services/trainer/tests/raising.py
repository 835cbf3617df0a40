"""Recipes as a user might write them, with their mistakes."""

import torch
from torch import Tensor, nn

from services.trainer.recipes import Mlp


class RaisesInThirdEpoch(Mlp):
    """Its loss counts steps: 960 rows in batches of 64 are 15 an epoch."""

    steps = 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.steps += 1
        if self.steps > 30:
            raise ZeroDivisionError("the temperature is 0")
        return super().loss(outputs, targets)


class Branches(Mlp):
    """Its module looks at values, which a trace cannot follow."""

    def build(self, input_shape: tuple[int, ...], outputs: int) -> nn.Module:
        return Moody(super().build(input_shape, outputs))


class Moody(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features: Tensor) -> Tensor:
        scores: Tensor = self.inner(features)
        return scores if len(features) <= 2 else scores + torch.arange(scores.shape[1])
