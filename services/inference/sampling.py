"""Which requests are traced and which are logged, decided as they arrive.

A bucket holds the tokens of one second, at least one, and is full at first.
"""

import os
import re

from services.inference import router
from services.inference.front import Sampling

NS = 1e9
ID_HEX = 32
PARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?P<trace>(?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-(?P<flags>[0-9a-f]{2})"
)
SAMPLED = 1


class Bucket:
    """Tokens as time: a token costs `cost_ns`, and what is owed is at most a bucketful."""

    def __init__(self, per_s: float) -> None:
        self.cost_ns = NS / per_s if per_s > 0 else 0.0
        self.credit_ns = max(NS, self.cost_ns) - self.cost_ns
        self.paid_ns = float("-inf")
        """Until when everything that was taken is paid for."""

    def take(self, now_ns: int) -> bool:
        owed_from_ns = max(self.paid_ns, now_ns)
        if not self.cost_ns or owed_from_ns - now_ns > self.credit_ns:
            return False
        self.paid_ns = owed_from_ns + self.cost_ns
        return True


class Sampler:
    def __init__(self) -> None:
        self.position = 0
        """Requests that have arrived; it goes on when the sampling changes."""
        self.sampling = Sampling(0.0, 0, 0.0)
        self.traces = self.logs = Bucket(0.0)

    def configure(self, sampling: Sampling) -> None:
        """Said again, the same sampling fills no bucket."""
        if sampling != self.sampling:
            self.sampling = sampling
            self.traces = Bucket(sampling.traces_per_s)
            self.logs = Bucket(sampling.log_per_s)

    def arrived(self, parent: str, now_ns: int) -> tuple[bool, bool]:
        """(traced, logged) of the next request; `parent` is its traceparent."""
        self.position += 1
        traced = (parent and is_traced(parent)) or self.traces.take(now_ns)
        percent = self.sampling.log_percent
        return traced, router.sampled(percent, self.position) and self.logs.take(now_ns)


def is_traced(parent: str) -> bool:
    found = PARENT.fullmatch(parent)
    return found is not None and bool(int(found["flags"], 16) & SAMPLED)


def place_under(parent: str) -> str:
    """The traceparent of a new span: in the trace of `parent`, in a new one when that is none."""
    found = PARENT.fullmatch(parent)
    trace = found["trace"] if found else os.urandom(16).hex()
    return f"00-{trace}-{os.urandom(8).hex()}-01"


def ids(count: int) -> list[str]:
    """As many new ids, for the price of one."""
    digits = os.urandom(count * ID_HEX // 2).hex()
    return [digits[start : start + ID_HEX] for start in range(0, len(digits), ID_HEX)]
