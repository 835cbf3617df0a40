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


def choose(percents: Mapping[int, int], position: int) -> int:
    """Version number -> share of traffic; at least one share is above 0.

    Shares that sum to less than 100, as while a target cannot be loaded, are scaled up.
    """
    total = sum(percents.values())
    assert total > 0, percents
    at = slot(position) * total
    for number, percent in sorted(percents.items()):
        at -= percent * SLOTS
        if at < 0:
            return number
    raise AssertionError((percents, position))


def sampled(percent: int, position: int) -> bool:
    return slot(position) < percent
