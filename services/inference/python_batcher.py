"""The batcher of the Python front: the queue of one served version, between threads.

`PythonBatcher(lane, delivery)` is a `front.Batcher`. The front's own requests join by `join_raw`
with their bytes, and come back by `Delivery`, once a batch: so that the front is woken once a
batch, not once a request.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

Reply = Any
"""The front's own object of a request; handed back as it is."""
Raw = bytes | memoryview


class Answered(NamedTuple):
    """One request that joined by `join_raw`."""

    reply: Reply
    id: str
    """The client's own, else 32 hex digits."""
    place: str
    """The traceparent of its own span; "" when it is not traced."""
    rows: int
    raws: tuple[bytes, ...]
    """Its rows of each output, in the order of the signature."""


class Delivery(Protocol):
    """Where a batch's answers go. Called on a runner's thread."""

    def answered(self, answers: Sequence[Answered], shapes: Sequence[tuple[int, ...]]) -> None:
        """`shapes`: of each output in the order of the signature; where the lane is batched the
        shape of one row, to be led by the request's rows, else the whole shape."""

    def failed(self, replies: Sequence[Reply], code: int, text: str) -> None:
        """All with the same error: a batch that failed, or whose time was over."""
