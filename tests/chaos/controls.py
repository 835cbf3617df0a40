"""How a fault is done to a stack, whatever the stack is made of."""

from typing import NamedTuple, Protocol

from libs.objectstore import ObjectStore
from tests.running import Stack


class Controls(Protocol):
    """Victims are named as in `schedule.VICTIMS`."""

    kind: str
    """`embedded` or `compose`."""

    @property
    def can_fill(self) -> bool:
        """Whether the S3 volume has a bound that one may reach."""
        ...

    async def kill(self, victim: str) -> None:
        """SIGKILL; whoever watches over the victim starts it again."""
        ...

    async def pause(self, victim: str) -> None:
        """Stops every process of the victim where it is; its sockets stay open."""
        ...

    async def resume(self, victim: str) -> None: ...

    async def disconnect(self, victim: str) -> None:
        """Nothing arrives from it or at it, and nobody is told."""
        ...

    async def connect(self, victim: str) -> None: ...

    async def restart(self, victim: str) -> None:
        """Asks it to end; returns once it was told."""
        ...

    async def fill(self) -> None:
        """Leaves no byte free on the S3 volume."""
        ...

    async def unfill(self) -> None: ...

    async def back(self, victim: str) -> None:
        """Returns once the victim runs and says that it is ready."""
        ...


class Ground(NamedTuple):
    """A stack to break, and how it is reached."""

    stack: Stack
    controls: Controls
    objects: ObjectStore
    nats: str
    """For the publisher: cut when `schedule` says so."""
    inference: str
    """host:port of its gRPC door, for the predictor."""
