"""Nodes that come in any order, between looks at them, are looked through by name."""

import random
from collections.abc import Callable, Iterable

import pytest

from libs.contracts.events import Resources
from services.scheduler.domain import Scheduler, restore
from services.scheduler.fleet import ByName
from services.scheduler.stimuli import Heartbeat

NODES = 60
LOOKS: dict[str, Callable[[ByName], Iterable[str]]] = {
    "iter": iter,
    "keys": lambda nodes: nodes.keys(),
    "items": lambda nodes: (name for name, _ in nodes.items()),
    "values": lambda nodes: (node.node for node in nodes.values()),
}


@pytest.mark.parametrize("look", LOOKS)
def test_nodes_are_looked_through_by_name_however_they_came(look: str) -> None:
    draw = random.Random(look)
    names = [f"node-{number}" for number in range(NODES)]
    draw.shuffle(names)
    scheduler = Scheduler()
    assert isinstance(scheduler.nodes, ByName)
    for at, name in enumerate(names, start=1):
        for one, incarnation in ((name, 1), (draw.choice(names[:at]), 1 + at)):
            heartbeat = Heartbeat(one, incarnation, ["train"], Resources(1000, 1000, 0))
            scheduler.handle(heartbeat, float(at))
        if draw.random() < 0.3:
            assert list(LOOKS[look](scheduler.nodes)) == sorted(names[:at])
    scheduler.validate()
    assert list(restore(scheduler.snapshot()).nodes) == sorted(names)
