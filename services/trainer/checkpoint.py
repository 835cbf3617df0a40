"""Checkpoints in object storage: one safetensors file an epoch, never a pickle.

The file holds the module's and the optimizer's tensors; what is no tensor (the optimizer's
settings, the epoch) is JSON in its header.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from libs.objectstore import ObjectStore

KEPT = 2
NAME = re.compile(r"epoch-(\d{4,})\.safetensors$")
MODULE, OPTIMIZER = "module/", "optimizer/"
STATE = "state"
"""The one key of the header: several would be written in random order."""


class S3Checkpoints:
    """The checkpoints of one job. `agree` gives every worker rank 0's answer, so that a gang
    resumes from one epoch."""

    def __init__(self, objects: ObjectStore, prefix: str, agree: Callable[[int], int]) -> None:
        self.objects = objects
        self.prefix = prefix
        self.agree = agree

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        epoch = self.agree(last(asyncio.run(self.objects.list(self.prefix))))
        if epoch:
            unpack(asyncio.run(self.objects.get(self.key(epoch))), module, optimizer)
        return epoch

    def save(self, epoch: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        payload = pack(epoch, module, optimizer)
        asyncio.run(self.replace(epoch, payload))

    async def replace(self, epoch: int, payload: bytes) -> None:
        await self.objects.put(self.key(epoch), payload)
        if epoch > KEPT:
            await self.objects.delete(self.key(epoch - KEPT))

    def key(self, epoch: int) -> str:
        return f"{self.prefix}epoch-{epoch:04d}.safetensors"


def last(keys: list[str]) -> int:
    """The last epoch among these keys; 0 for none."""
    return max((int(found[1]) for key in keys if (found := NAME.search(key))), default=0)


def weights(module: nn.Module) -> bytes:
    """The module's state as safetensors: the same tensors are the same bytes."""
    return safetensors.torch.save(contiguous(module.state_dict()))


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}


def pack(epoch: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    state = optimizer.state_dict()
    tensors = {MODULE + name: tensor for name, tensor in module.state_dict().items()}
    others: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{OPTIMIZER}{index}/{name}"] = value
            else:
                others.setdefault(str(index), {})[name] = value
    header = {"epoch": epoch, "groups": state["param_groups"], "state": others}
    metadata = {STATE: msgspec.json.encode(header, order="sorted").decode()}
    return safetensors.torch.save(contiguous(tensors), metadata=metadata)


def unpack(payload: bytes, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = safetensors.torch.load(payload)
    header = header_of(payload)
    module.load_state_dict(
        {name.removeprefix(MODULE): t for name, t in tensors.items() if name.startswith(MODULE)}
    )
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in header["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER):
            index, _, key = name.removeprefix(OPTIMIZER).partition("/")
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": header["groups"]})


def header_of(payload: bytes) -> dict[str, Any]:
    """safetensors: 8 bytes of length (little endian), then JSON with `__metadata__`."""
    size = int.from_bytes(payload[:8], "little")
    metadata = msgspec.json.decode(payload[8 : 8 + size])["__metadata__"]
    header: dict[str, Any] = msgspec.json.decode(metadata[STATE])
    return header
