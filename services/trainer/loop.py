"""The training loop: plain PyTorch that knows neither Ray nor NATS.

The same data, recipe, seed and number of workers give the same weights, bit for bit on CPU,
also when the run was interrupted between two epochs and resumed from a checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from services.trainer.domain import Progress, Unusable
from services.trainer.recipes import Recipe

SEED_STRIDE = 1_000_003
VALIDATION_ROWS_MAX = 2048
"""Rows that are looked at after every epoch; the evaluation at the end takes the whole split."""


class World(Protocol):
    """The gang as one worker sees it."""

    rank: int
    size: int

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with its gradients averaged over the gang."""
        ...

    def mean(self, value: float) -> float:
        """The mean over the gang."""
        ...

    def agree(self, value: int) -> int:
        """Rank 0's value."""
        ...


class Checkpoints(Protocol):
    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Loads the last checkpoint, if there is one; returns how many epochs it had done."""
        ...

    def save(self, epoch: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None: ...


@dataclass(frozen=True)
class Task:
    """What to train. Features are [rows, *shape] float32; targets class indices or values."""

    recipe: Recipe
    outputs: int
    features: Tensor
    targets: Tensor
    validation_features: Tensor
    validation_targets: np.ndarray
    seed: int


class Alone:
    """A gang of one."""

    rank = 0
    size = 1

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def mean(self, value: float) -> float:
        return value

    def agree(self, value: int) -> int:
        return value


def build(task: Task) -> nn.Module:
    torch.manual_seed(task.seed)
    return task.recipe.build(tuple(task.features.shape[1:]), task.outputs)


def train(task: Task, world: World, checkpoints: Checkpoints) -> Iterator[Progress]:
    """Yields where it starts, then after every epoch, once its checkpoint is durable."""
    if len(task.features) < world.size:
        raise Unusable(f"{len(task.features)} rows are too few for {world.size} workers")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    device = fastest()
    module = build(task).to(device)
    task = replace(task, features=task.features.to(device), targets=task.targets.to(device))
    optimizer = task.recipe.optimizer(module)
    done = checkpoints.restore(module, optimizer)
    epochs = task.recipe.params.epochs
    yield Progress(done, epochs)
    shared = world.wrap(module)
    for epoch in range(done + 1, epochs + 1):
        loss = world.mean(train_epoch(task, shared, optimizer, epoch, world))
        metrics = {"loss": loss}
        if world.rank == 0:
            metrics = {**validate(task, module), "loss": loss}
            checkpoints.save(epoch, module, optimizer)
        yield Progress(epoch, epochs, metrics, len(task.features))


def fastest() -> torch.device:
    """The GPU that this process may use, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_epoch(
    task: Task, module: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, world: World
) -> float:
    """The mean loss of this worker's rows."""
    order = shuffled(len(task.features), task.seed, epoch)
    torch.manual_seed(task.seed * SEED_STRIDE + epoch * world.size + world.rank)
    module.train()
    total, rows = torch.zeros((), device=task.features.device), 0
    for batch in batches(order, task.recipe.params.batch_size, world):
        optimizer.zero_grad()
        loss = task.recipe.loss(module(task.features[batch]), task.targets[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(batch)
        rows += len(batch)
    return float(total) / rows


def shuffled(rows: int, seed: int, epoch: int) -> Tensor:
    """The epoch's order of rows, the same on every worker."""
    generator = torch.Generator().manual_seed(seed * SEED_STRIDE + epoch)
    return torch.randperm(rows, generator=generator)


def batches(order: Tensor, size: int, world: World) -> Iterator[Tensor]:
    """This worker's share of every step, as large as every other worker's."""
    for start in range(0, len(order), max(size, world.size)):
        step = order[start : start + max(size, world.size)]
        share = len(step) // world.size
        if share:
            yield step[world.rank * share : (world.rank + 1) * share]


def validate(task: Task, module: nn.Module) -> dict[str, float]:
    module.eval()
    with torch.no_grad():
        some = task.validation_features[:VALIDATION_ROWS_MAX].to(task.features.device)
        outputs = module(some).cpu()
    predicted = torch.softmax(outputs, 1) if task.recipe.task == "classification" else outputs[:, 0]
    return task.recipe.metrics(predicted.numpy(), task.validation_targets[:VALIDATION_ROWS_MAX])
