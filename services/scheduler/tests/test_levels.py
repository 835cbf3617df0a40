"""Who got less goes first, equals keep their turn, and no wait goes on for ever."""

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.levels import (
    LEVELS_GPU_S,
    OVERDUE,
    WAIT_MAX_S,
    Standing,
    level,
    loss,
    may_rotate,
    rank,
)

STANDINGS = st.builds(
    Standing,
    number=st.integers(0, 1 << 40),
    gpus=st.integers(1, 1 << 20),
    attained_gpu_s=st.floats(0, 1e9),
    waited_s=st.floats(0, 2 * WAIT_MAX_S),
)


def standing(number: int = 0, gpus: int = 1000, attained: float = 0, waited: float = 0) -> Standing:
    return Standing(number, gpus, attained, waited)


def test_a_job_sinks_as_it_is_served() -> None:
    assert [level(served) for served in (0, 3_599, *LEVELS_GPU_S, 1e9)] == [0, 0, 1, 2, 3, 3]


@given(STANDINGS, STANDINGS, STANDINGS)
def test_nobody_takes_a_place_back_from_who_took_it(a: Standing, b: Standing, c: Standing) -> None:
    assert not may_rotate(a, a)
    assert not (may_rotate(a, b) and may_rotate(b, a))
    if may_rotate(a, b) and may_rotate(b, c):
        assert may_rotate(a, c)


def test_who_waited_too_long_goes_first_and_stays() -> None:
    late = standing(number=9, attained=1e9, waited=WAIT_MAX_S)
    fresh = standing(number=1)
    assert rank(late) == OVERDUE < rank(fresh)
    assert may_rotate(late, fresh)
    assert not may_rotate(fresh, late)


def test_victims_are_few_then_large_then_new() -> None:
    old, new, large = standing(1), standing(2), standing(3, gpus=8000)
    assert loss([large]) < loss([new]) < loss([old]) < loss([old, large])
