"""The other replicas: who serves what, and who has the least to do. Pure: the caller has the clock.

What a replica says of itself is up to half a second old; what was sent there meanwhile is known
here, so that a burst does not all go to whoever had nothing to do.
"""

from collections import Counter
from hashlib import sha256

import msgspec

from services.inference.loads import Load

FRESH_S = 3.0
"""A replica that said nothing for longer is asked nothing."""
MILLI = 1000
Key = tuple[str, str]


class Told(msgspec.Struct, frozen=True):
    """What a replica says of itself to the others, as often as it beats."""

    node: str
    address: str
    """Of its gRPC door."""
    loads: list[Load]
    incarnation: str = ""
    """Of the process: a node may have several."""
    project: str = ""
    """Whose models it knows by their names alone."""


class Peers:
    def __init__(self) -> None:
        self.told: dict[str, tuple[float, Told]] = {}
        self.work: dict[Key, dict[str, int]] = {}
        """Node -> what it has to do for a model that it serves, in thousandths of a request."""
        self.sent: Counter[tuple[str, Key]] = Counter()
        """Requests that this replica sent there and that are not answered."""

    def heard(self, told: Told, now_s: float) -> None:
        for node in [node for node, (at_s, _) in self.told.items() if now_s - at_s > FRESH_S]:
            self.lost(node)
        self.lost(told.node)
        self.told[told.node] = now_s, told
        for load in told.loads:
            if load.ready:
                self.work.setdefault((load.project, load.model), {})[told.node] = (
                    load.concurrency_milli
                )

    def lost(self, node: str) -> None:
        """It did not answer: asked nothing until it speaks again."""
        _, told = self.told.pop(node, (0.0, None))
        for load in told.loads if told else ():
            self.left(node, (load.project, load.model))

    def left(self, node: str, key: Key) -> None:
        """It does not serve the model: not asked for that until it speaks again."""
        nodes = self.work.get(key, {})
        nodes.pop(node, None)
        if not nodes:
            self.work.pop(key, None)

    def serving(self, key: Key, now_s: float) -> dict[str, int]:
        """Node -> what it has to do for the model, in thousandths of a request."""
        return {
            node: milli + self.sent[node, key] * MILLI
            for node, milli in self.work.get(key, {}).items()
            if now_s - self.told[node][0] <= FRESH_S
        }

    def least(self, key: Key, now_s: float) -> tuple[str, int] | None:
        """(node, its work), of all that serve it."""
        work = self.serving(key, now_s)
        return min(work.items(), key=lambda one: (one[1], one[0]), default=None)

    def home(self, key: Key, sequence: str, now_s: float) -> str | None:
        """Where requests of a sequence go, as long as the same replicas serve the model."""

        def lot(node: str) -> bytes:
            return sha256(f"{node}/{sequence}".encode()).digest()

        return max(self.serving(key, now_s), key=lot, default=None)

    def address(self, node: str) -> str:
        return self.told[node][1].address

    def addresses(self) -> set[str]:
        return {told.address for _, told in self.told.values()}

    def name_at(self, node: str, key: Key) -> str:
        """Of the model, on the node's door."""
        project, model = key
        return model if self.told[node][1].project == project else f"{project}.{model}"
