"""Which version answers, and which requests are sampled. Pure and exact.

The position of a request walks over 100 slots in steps of 61, which is coprime to 100 and close to
100 divided by the golden ratio: every 100 requests meet every slot once, and any short run of them
is spread evenly. So 20 % is 20 of every 100, not 20 on average.
"""

from collections.abc import Mapping

SLOTS = 100
STEP = 61


def slot(position: int) -> int:
    return position * STEP % SLOTS


def choose(shares: Mapping[str, int], position: int) -> str:
    """Version -> share of traffic, oldest version first; at least one share is above 0.

    Shares that sum to less than 100, as while a target cannot be loaded, are scaled up.
    """
    total = sum(shares.values())
    assert total > 0, shares
    at = slot(position) * total
    for version, percent in shares.items():
        at -= percent * SLOTS
        if at < 0:
            return version
    raise AssertionError((shares, position))


def age(version: str) -> tuple[int, str]:
    """Sorts versions: 9 before 10, and those that are no numbers by their text."""
    return (len(version), version) if version.isdigit() else (1 << 30, version)


def sampled(percent: int, position: int) -> bool:
    return slot(position) < percent
