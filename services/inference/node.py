"""What a process of inference is to the others, and what it says of itself."""

from collections.abc import Sequence

import msgspec

from libs.contracts.autoscaling import NODE_LABEL, REPLICA_KIND
from libs.contracts.events import Resources
from services.inference.loads import Load
from services.inference.peers import Told
from services.inference.store import Assignment


class Node(msgspec.Struct, frozen=True):
    """What this process is to the scheduler, and to whoever counts replicas."""

    name: str
    incarnation: str
    """Of the process: another one after every start."""
    capacity: Resources
    address: str
    """Of its gRPC door, for the other replicas."""
    agent: str = ""
    """Its own name, where others are the node with it."""

    @property
    def speaker(self) -> str:
        return self.agent or self.name

    def heartbeat(self, assignments: Sequence[Assignment], loads: list[Load]) -> bytes:
        """For the scheduler."""
        running = [
            {"project": a.project, "job": a.job, "attempt": a.attempt, "token": a.token}
            for a in assignments
        ]
        return msgspec.json.encode(
            {
                "node": self.name,
                "incarnation": self.incarnation,
                "kinds": [REPLICA_KIND],
                "labels": {NODE_LABEL: self.name},
                "capacity": self.capacity,
                "running": running,
                "health": "Healthy",
                "loads": loads,
                "agent": self.agent,
            }
        )

    def told(self, project: str, loads: list[Load]) -> bytes:
        """For the other replicas. `project`: whose models it knows by their names alone."""
        return msgspec.json.encode(Told(self.name, self.address, loads, self.incarnation, project))
