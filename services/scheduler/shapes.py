"""What a worker needs, what a node has, and where on it a worker is: integers and names only."""

import msgspec

GPU_MILLI = 1000
"""A whole GPU."""
GPUS_MAX = 64
"""Of one node; a bit mask of its GPUs fits a word."""
WORKERS_MAX = 1 << 20
"""Of one node: of those that need nothing there is room for that many."""


class Shape(msgspec.Struct, frozen=True, order=True, cache_hash=True):
    """What one worker needs of one node."""

    cpu_milli: int
    memory_mib: int
    gpus: int = 0
    gpu_milli: int = 0
    """Of each of its GPUs: 1 to 1000; 1000 when it has more than one; 0 without GPUs."""
    gpu_models: tuple[str, ...] = ()
    """Sorted; () is any."""
    kind: str = ""
    """The node must announce it; "" is any."""
    labels: tuple[tuple[str, str], ...] = ()
    """The node must carry all of them."""
    spread: bool = False
    """Where most is free, whatever the policy; else as the policy says."""


class Machine(msgspec.Struct, frozen=True):
    """A node as it would be with nothing on it."""

    node: str
    cpu_milli: int
    memory_mib: int
    gpus: int = 0
    gpu_model: str = ""
    kinds: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()


class Free(msgspec.Struct, frozen=True):
    """What is left of a node; of each GPU its milli."""

    cpu_milli: int
    memory_mib: int
    gpus: tuple[int, ...]


class Spot(msgspec.Struct, frozen=True):
    """A worker's place: GPUs by their index on the node."""

    node: str
    gpus: tuple[int, ...] = ()


def admits(machine: Machine, shape: Shape) -> bool:
    """Whether it is the right sort of node, however much is free there."""
    if shape.gpus and shape.gpu_models and machine.gpu_model not in shape.gpu_models:
        return False
    if shape.kind and shape.kind not in machine.kinds:
        return False
    return all(label in machine.labels for label in shape.labels)


def capacity(machine: Machine) -> Free:
    return Free(machine.cpu_milli, machine.memory_mib, (GPU_MILLI,) * machine.gpus)


def room(free: Free, shape: Shape) -> int:
    """How many such workers fit into it.

    A worker is either of whole GPUs or of a part of one, so every GPU holds `free // gpu_milli` of
    them wherever the others go, and counting is exact.
    """
    bounds = [WORKERS_MAX]
    if shape.cpu_milli:
        bounds.append(free.cpu_milli // shape.cpu_milli)
    if shape.memory_mib:
        bounds.append(free.memory_mib // shape.memory_mib)
    if shape.gpus:
        bounds.append(sum(left // shape.gpu_milli for left in free.gpus) // shape.gpus)
    return min(bounds)


def merged(shape: Shape, workers: int) -> Shape:
    """All workers as one, for those without a part of a GPU: what fits one fits the other."""
    assert shape.gpus == 0 or shape.gpu_milli == GPU_MILLI
    return msgspec.structs.replace(
        shape,
        cpu_milli=workers * shape.cpu_milli,
        memory_mib=workers * shape.memory_mib,
        gpus=workers * shape.gpus,
    )
