"""The loop, alone in this process and without any server."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from libs.contracts.pipeline import Train
from services.trainer import loop
from services.trainer.checkpoint import pack, unpack, weights
from services.trainer.domain import Unusable
from services.trainer.recipes import recipe_of


class InMemory:
    """Checkpoints that stay in this process."""

    def __init__(self) -> None:
        self.kept: dict[int, bytes] = {}
        self.final = b""

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        epoch = max(self.kept, default=0)
        if epoch:
            unpack(self.kept[epoch], module, optimizer)
        return epoch

    def save(self, epoch: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.kept[epoch] = pack(epoch, module, optimizer)
        self.final = weights(module)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def task_of(inverted: bool = False, **params: object) -> loop.Task:
    pixels, label = load_digits(return_X_y=True)
    values = pixels.astype(np.float32) / 16
    values = 1 - values if inverted else values
    train = Train(recipe="mlp", params={"epochs": 4, "dropout": 0.1, **params})
    return loop.Task(
        recipe=recipe_of(train),
        outputs=10,
        features=torch.from_numpy(values[:1000]),
        targets=torch.from_numpy(label[:1000].astype(np.int64)),
        validation_features=torch.from_numpy(values[1000:]),
        validation_targets=label[1000:],
        seed=7,
    )


def test_an_interrupted_run_ends_with_the_bits_of_an_undisturbed_one() -> None:
    undisturbed, interrupted = InMemory(), InMemory()
    for _ in loop.train(task_of(), loop.Alone(), undisturbed):
        pass
    for progress in loop.train(task_of(), loop.Alone(), interrupted):
        if progress.epoch == 2:
            break
    resumed = [progress.epoch for progress in loop.train(task_of(), loop.Alone(), interrupted)]
    assert resumed == [2, 3, 4]
    assert interrupted.final == undisturbed.final


def test_it_learns_and_says_so_after_every_epoch() -> None:
    told = list(loop.train(task_of(epochs=10), loop.Alone(), InMemory()))
    assert [progress.epoch for progress in told] == list(range(11))
    assert told[0].metrics == {}
    assert told[-1].metrics["loss"] < told[1].metrics["loss"] / 2
    assert told[-1].metrics["accuracy"] > 0.85


def test_another_seed_gives_other_weights() -> None:
    first, second = InMemory(), InMemory()
    list(loop.train(task_of(epochs=1), loop.Alone(), first))
    task = task_of(epochs=1)
    other = loop.Task(**{**vars(task), "seed": 8})
    list(loop.train(other, loop.Alone(), second))
    assert first.final != second.final


def test_a_gang_shares_every_step_evenly() -> None:
    order = torch.randperm(103)

    class Half(loop.Alone):
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

    left, right = (list(loop.batches(order, 10, Half(rank))) for rank in (0, 1))
    assert [len(one) for one in left] == [len(one) for one in right] == [5] * 10 + [1]
    assert len(set(torch.cat([*left, *right]).tolist())) == 102


def test_fewer_rows_than_workers_is_refused() -> None:
    class Large(loop.Alone):
        size = 2000

    with pytest.raises(Unusable, match="1000 rows are too few for 2000 workers"):
        list(loop.train(task_of(), Large(), InMemory()))
