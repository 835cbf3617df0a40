"""When a version has crashed too often to be tried again. Pure: the caller has the clock."""

CRASHES_MAX = 3
WINDOW_S = 600.0


class Crashes:
    """Of one version."""

    def __init__(self) -> None:
        self.recent_s: list[float] = []

    def add(self, now_s: float) -> bool:
        """Whether that was one too many."""
        self.recent_s = [then_s for then_s in self.recent_s if now_s - then_s < WINDOW_S]
        self.recent_s.append(now_s)
        return len(self.recent_s) >= CRASHES_MAX
