"""What is served, and by how many replicas."""

import msgspec

from libs.contracts.autoscaling import Autoscaling
from libs.contracts.events import Resources
from services.scheduler.jobs import Key


class Deployment(msgspec.Struct, kw_only=True):
    """Of one model; its jobs are in the book."""

    project: str
    model: str
    generation: int
    wanted: Autoscaling
    resources: Resources
    traceparent: str
    replicas: int
    """As was decided last."""
    spare: int = 0
    """Of them, what may be lent."""
    number: int = 1
    """Of the last replica that got one."""
    jobs: list[str] = []
    """Its replicas, oldest first."""
    lent: list[Key] = []
    """Jobs that got the room of one."""

    @property
    def key(self) -> Key:
        return self.project, self.model
