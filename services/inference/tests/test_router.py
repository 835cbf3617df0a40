"""The split is exact over every hundred requests, and even over fewer."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.inference import router


@given(st.integers(0, 100), st.integers(0, 10_000))
def test_a_share_is_met_by_any_hundred_requests_in_a_row(percent: int, start: int) -> None:
    split = {"1": 100 - percent, "2": percent}
    chosen = Counter(router.choose(split, at) for at in range(start, start + 100))
    assert chosen["2"] == percent


def test_a_fifth_is_spread_evenly() -> None:
    chosen = [router.choose({"1": 80, "2": 20}, at) for at in range(100)]
    at = [i for i, number in enumerate(chosen) if number == "2"]
    assert max(b - a for a, b in pairwise(at)) <= 8


def test_shares_of_what_is_left_are_scaled_up() -> None:
    assert {router.choose({"1": 80}, at) for at in range(100)} == {"1"}
    halves = Counter(router.choose({"1": 10, "2": 10}, at) for at in range(100))
    assert halves == {"1": 50, "2": 50}


def test_a_sample_is_as_large_as_said() -> None:
    assert sum(router.sampled(30, at) for at in range(100)) == 30
    assert not any(router.sampled(0, at) for at in range(100))
    assert all(router.sampled(100, at) for at in range(100))


def test_versions_are_sorted_by_number_where_they_are_numbers() -> None:
    assert sorted(["10", "b", "9", "a"], key=router.age) == ["9", "10", "a", "b"]
