"""Why a gang goes nowhere, and where one is that an earlier release placed."""

from collections.abc import Sequence

from services.scheduler.jobs import Ask, Job, Part
from services.scheduler.nodes import HEALTHY, Node
from services.scheduler.pool import Pool
from services.scheduler.shapes import Free, admits, capacity, room

AMOUNTS = ("cpu_milli", "memory_mib", "gpu_milli")


def adopt(pool: Pool, job: Job, node: str) -> list[Part]:
    """The whole gang on a node, which a snapshot without GPU indices names; [] if it is full."""
    pool.open(node, True)
    spots = pool.find_gang(job.ask.shape, job.ask.workers, one_node=True)
    pool.open(node, False)
    return [Part(node, 0, [spot.gpus for spot in spots])] if spots else []


def explain(nodes: Sequence[Node], pool: Pool, ask: Ask) -> str:
    """Why a gang that fits nowhere waits, in one sentence with the numbers."""
    kind = ask.shape.kind
    able = [node for node in nodes if kind in node.kinds]
    if not able:
        kinds = sorted({kind for node in nodes for kind in node.kinds})
        return f"no node runs jobs of kind {kind!r} (announced: {', '.join(kinds) or 'none'})"
    healthy = [node for node in able if node.state == HEALTHY]
    if not healthy:
        states = ", ".join(f"{node.node} is {node.state}" for node in able)
        return f"needs a Healthy node for kind {kind!r}: {states}"
    fitting = [node for node in healthy if admits(node.machine, ask.shape)]
    if not fitting:
        return unfit(healthy, ask)
    return too_little(fitting, pool, ask)


def unfit(nodes: Sequence[Node], ask: Ask) -> str:
    shape = ask.shape
    models = sorted({node.gpu_model for node in nodes if node.gpu_model})
    wanted = [f"{name}={value}" for name, value in shape.labels]
    if shape.gpu_models:
        wanted.insert(0, f"a GPU of {' or '.join(shape.gpu_models)}")
    return f"needs {', '.join(wanted)}; no node has that (GPUs: {', '.join(models) or 'none'})"


def too_little(nodes: Sequence[Node], pool: Pool, ask: Ask) -> str:
    if not ask.one_node and ask.workers > 1:
        free = sum(room(pool.free(node.node), ask.shape) for node in nodes)
        whole = sum(room(capacity(node.machine), ask.shape) for node in nodes)
        return f"needs room for {ask.workers} workers; there is for {free}, of {whole} in all"
    large = [node for node in nodes if room(capacity(node.machine), ask.shape) >= ask.workers]
    frees = {
        node.node: pool.free(node.node) if large else capacity(node.machine)
        for node in large or nodes
    }
    node, dimension = nearest(frees, ask)
    each = amounts_of_shape(ask)[dimension]
    needs = f"needs {ask.workers} x {each} {dimension}"
    has = amounts_of_free(frees[node])[dimension]
    if large:
        return f"{needs}; the largest free node {node} has {has} free"
    return f"{needs}; no node is that large: {node} has {has} in all"


def amounts_of_shape(ask: Ask) -> dict[str, int]:
    shape = ask.shape
    return dict(
        zip(AMOUNTS, (shape.cpu_milli, shape.memory_mib, shape.gpus * shape.gpu_milli), strict=True)
    )


def amounts_of_free(free: Free) -> dict[str, int]:
    return dict(zip(AMOUNTS, (free.cpu_milli, free.memory_mib, sum(free.gpus)), strict=True))


def nearest(frees: dict[str, Free], ask: Ask) -> tuple[str, str]:
    """The node that lacks the fewest dimensions, then the least; and the first it lacks.

    Where no dimension lacks in all, its GPUs are too much in pieces.
    """
    each = amounts_of_shape(ask)

    def lacks(name: str) -> dict[str, int]:
        has = amounts_of_free(frees[name])
        missing = {d: ask.workers * each[d] - has[d] for d in AMOUNTS}
        return {d: amount for d, amount in missing.items() if amount > 0} or {"gpu_milli": 0}

    node = min(frees, key=lambda name: (len(lacks(name)), next(iter(lacks(name).values()))))
    return node, next(iter(lacks(node)))
