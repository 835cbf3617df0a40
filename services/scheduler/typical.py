"""Typical shapes: what has been asked for lately, and how often.

FGD keeps room for them (ATC'23, section 3), the planner prices GPUs by them. They are learned from
what arrives and from nothing else; counts are halved now and then, so that what no longer comes is
forgotten, and everything follows from the order of arrivals.
"""

import msgspec

from services.scheduler.shapes import Shape

SHAPES_MAX = 256
"""openb has 91 shapes (249 where pods name GPU models); the rarest make way for new ones."""
ARRIVALS_MAX = 1 << 14
"""Then counts are halved."""
FIRST_ARRIVALS = 16
EVERY_ARRIVALS = 2048
"""A plan is due after the first arrivals, whenever their number has doubled, and so often."""


class Typical(msgspec.Struct):
    """Counts of arrivals; a worker of a gang is one."""

    counts: dict[Shape, int] = {}
    arrivals: int = 0
    """As of the counts, that is halved with them."""
    due_at: int = FIRST_ARRIVALS

    def note(self, shape: Shape, workers: int = 1) -> None:
        if shape not in self.counts and len(self.counts) == SHAPES_MAX:
            self.make_way()
        self.counts[shape] = self.counts.get(shape, 0) + workers
        self.arrivals += workers
        if self.arrivals >= ARRIVALS_MAX:
            self.halve()

    def make_way(self) -> None:
        """For one shape more: the rarest goes, the oldest of those that are equally rare."""
        rarest = min(self.counts, key=self.counts.__getitem__)
        self.arrivals -= self.counts.pop(rarest)

    def halve(self) -> None:
        """The share of what stays is as before; a shape seen once since goes."""
        wait = max(0, self.due_at - self.arrivals)
        self.counts = {shape: count // 2 for shape, count in self.counts.items() if count > 1}
        self.arrivals = sum(self.counts.values())
        self.due_at = self.arrivals + wait

    @property
    def is_due(self) -> bool:
        """Whether enough came since the last plan for another one."""
        return self.arrivals >= self.due_at

    def planned(self) -> None:
        self.due_at = self.arrivals + min(max(self.arrivals, FIRST_ARRIVALS), EVERY_ARRIVALS)

    def shapes(self) -> list[tuple[Shape, int]]:
        """The most frequent first, in the order of shapes where equal."""
        return sorted(self.counts.items(), key=lambda one: (-one[1], one[0]))
