"""A gang over torch.distributed's gloo: what the loop sees of the other workers."""

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.nn.parallel import DistributedDataParallel

from services.trainer.domain import Lost, Meeting

TIMEOUT = timedelta(minutes=5)
"""A peer that lives but says nothing for so long is lost."""
STORE_TIMEOUT = timedelta(seconds=30)
SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


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


def store_of(size: int, address: str) -> TCPStore:
    """Rank 0's meeting point, on a free port of its own choice (`.port`)."""
    return TCPStore(address, 0, size, is_master=True, timeout=STORE_TIMEOUT, wait_for_workers=False)


@contextlib.contextmanager
def joined(rank: int, size: int, store: TCPStore | Meeting, address: str) -> Iterator[Gloo]:
    """In the gang for as long as the block lasts. `store`: rank 0's own, or where it is;
    `address`: this worker's own."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(address))
    if isinstance(store, Meeting):
        store = TCPStore(store.address, store.port, size, is_master=False, timeout=STORE_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Gloo()
    finally:
        dist.destroy_process_group()


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address. All of 127.0.0.0/8 is the loopback's."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):
                if socket.inet_ntoa(fcntl.ioctl(one, SIOCGIFADDR, request)[20:24]) == address:
                    return name
    raise Lost(f"no network interface has the address {address}")


def is_peer_lost(error: BaseException) -> bool:
    """Whether it only says that another worker's connection broke: gloo has no class for it."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "tcpstore" in text)
