"""A gang over torch.distributed's gloo: what the loop sees of the other workers."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.nn.parallel import DistributedDataParallel

from services.trainer.domain import LOOPBACK

TIMEOUT = timedelta(minutes=5)
"""A peer that lives but says nothing for so long is lost."""
STORE_TIMEOUT = timedelta(seconds=30)


class Gloo:
    """The process group this process has joined."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def wrap(self, module: nn.Module) -> nn.Module:
        """`find_unused_parameters` keeps the gradient buckets as they are: otherwise they are laid
        out anew after the first step, also the first after a resume, and a ring of three or more
        adds in another order then: other bits."""
        if not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        return DistributedDataParallel(module, find_unused_parameters=True)

    def mean(self, value: float) -> float:
        shared = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(shared)
        return float(shared) / self.size

    def agree(self, value: int) -> int:
        """Rank 0's value."""
        shared = torch.tensor(value)
        dist.broadcast(shared, src=0)
        return int(shared)


def store_of(size: int) -> TCPStore:
    """Rank 0's meeting point, on a free port of its own choice (`.port`)."""
    return TCPStore(
        LOOPBACK, 0, size, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False
    )


@contextlib.contextmanager
def joined(rank: int, size: int, store: TCPStore | int) -> Iterator[Gloo]:
    """In the gang for as long as the block lasts. `store`: rank 0's own, or its port."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if isinstance(store, int):
        store = TCPStore(LOOPBACK, store, size, is_master=False, timeout=STORE_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Gloo()
    finally:
        dist.destroy_process_group()


def is_peer_lost(error: BaseException) -> bool:
    """Whether it only says that another worker's connection broke: gloo has no class for it."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "tcpstore" in text)
