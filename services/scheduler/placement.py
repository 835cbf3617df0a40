"""Where a gang goes, and why it goes nowhere.

A gang is placed whole on one node or not at all: its workers share a host, which is what the
agents of today can start. Any node that announces the job's kind and is Healthy may take it.
"""

from collections.abc import Iterable

from libs.contracts.events import Resources
from services.scheduler.nodes import HEALTHY, Node, lacking, times


def first_fit(nodes: Iterable[Node], kind: str, need: Resources) -> Node | None:
    """The first node, by name, that can take the whole need now."""
    for node in nodes:
        if node.state == HEALTHY and kind in node.kinds and not lacking(need, node.free):
            return node
    return None


def explain(nodes: list[Node], kind: str, workers: int, each: Resources) -> str:
    """Why a gang that fits nowhere waits, in one sentence with the numbers."""
    able = [node for node in nodes if kind in node.kinds]
    if not able:
        kinds = sorted({kind for node in nodes for kind in node.kinds})
        return f"no node runs jobs of kind {kind!r} (announced: {', '.join(kinds) or 'none'})"
    healthy = [node for node in able if node.state == HEALTHY]
    if not healthy:
        states = ", ".join(f"{node.node} is {node.state}" for node in able)
        return f"needs a Healthy node for kind {kind!r}: {states}"
    need = times(workers, each)
    large = [node for node in healthy if not lacking(need, node.capacity)]
    node, dimension = nearest(large, need, "free") if large else nearest(healthy, need, "capacity")
    needs = f"needs {workers} x {getattr(each, dimension)} {dimension}"
    if large:
        free = getattr(node.free, dimension)
        return f"{needs}; the largest free node {node.node} has {free} free"
    capacity = getattr(node.capacity, dimension)
    return f"{needs}; no node is that large: {node.node} has {capacity} in all"


def nearest(nodes: list[Node], need: Resources, amount: str) -> tuple[Node, str]:
    """The node that lacks the fewest dimensions, then the least; and the first it lacks."""

    def distance(node: Node) -> tuple[int, int]:
        lacks = lacking(need, getattr(node, amount))
        first = lacks[0]
        return len(lacks), getattr(need, first) - getattr(getattr(node, amount), first)

    node = min(nodes, key=distance)
    return node, lacking(need, getattr(node, amount))[0]
