"""Recipes against numbers worked out by hand, and checkpoints against the tensors they hold."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from libs.contracts.pipeline import Train
from services.trainer import domain
from services.trainer.checkpoint import last, pack, unpack, weights
from services.trainer.recipes import classification, recipe_of, regression
from services.trainer.tests.conftest import spec_of


def test_the_cnn_is_the_articles() -> None:
    module = recipe_of(Train(recipe="cnn")).build((1, 28, 28), 10)
    kinds = [type(layer).__name__ for layer in module.children()]
    assert kinds == ["Conv2d", "ReLU", "MaxPool2d", "Flatten", "Linear", "ReLU", "Linear"]
    assert sum(one.numel() for one in module.parameters()) == 693_962
    assert module(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_metrics_of_a_classifier() -> None:
    probabilities = np.array([[0.8, 0.2], [0.4, 0.6], [0.7, 0.3], [0.5, 0.5]])
    measured = classification(probabilities, np.array([0, 1, 1, -1]))
    assert measured["accuracy"] == 0.5
    # f1 of class 0: 2*1/(3+1), of class 1: 2*1/(1+2), of the label nobody knows: 0
    assert measured["f1_macro"] == pytest.approx((0.5 + 2 / 3 + 0) / 3)
    assert measured["loss"] == pytest.approx(-np.mean(np.log([0.8, 0.6, 0.3, 1e-7])))


def test_metrics_of_a_regression() -> None:
    measured = regression(np.array([1.0, 2.0, 5.0]), np.array([1.0, 3.0, 5.0]))
    expected = {"mae": 1 / 3, "mse": 1 / 3, "r2": 1 - (1 / 3) / (8 / 3), "loss": 1 / 3}
    assert measured == pytest.approx(expected)


def test_a_regression_learns_what_it_is_shown() -> None:
    recipe = recipe_of(Train(recipe="mlp", task="regression", params={"hidden": []}))
    module = recipe.build((2,), 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert recipe.loss(module(torch.ones(2, 2)), torch.tensor([1.0, 3.0])).item() == 5.0


def test_a_checkpoint_holds_all_that_the_next_step_needs() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        module = nn.Linear(3, 2)
        return module, torch.optim.Adam(module.parameters(), lr=0.1, amsgrad=True)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    module, optimizer = fresh()
    step(module, optimizer)
    payload = pack(3, module, optimizer)
    assert pack(3, module, optimizer) == payload
    restored, its_optimizer = fresh()
    unpack(payload, restored, its_optimizer)
    for one in ((module, optimizer), (restored, its_optimizer)):
        step(*one)
    assert weights(module) == weights(restored)


def test_the_last_checkpoint_is_the_one_of_the_highest_epoch() -> None:
    keys = [f"checkpoints/p/j/epoch-{epoch:04d}.safetensors" for epoch in (9, 10, 9999, 10000)]
    assert last(keys) == 10000
    assert last(["checkpoints/p/j/other"]) == 0


@pytest.mark.parametrize(
    ("train", "engine"),
    [
        ({"params": {"epochs": 10}}, "pool"),
        ({"params": {"epochs": 100_000}}, "ray_train"),
        ({"params": {"epochs": 100_000}, "engine": "pool"}, "pool"),
        ({"engine": "ray_train"}, "ray_train"),
    ],
)
def test_small_jobs_take_the_pool(train: dict[str, Any], engine: str) -> None:
    assert domain.engine_of(spec_of("ab" * 32, **train)) == engine
