"""So many a second are so many a second, and a span's place is in its caller's trace."""

import re

import pytest

from services.inference import router
from services.inference.front import Sampling
from services.inference.sampling import Bucket, Sampler, ids, is_traced, place_under

S = 1_000_000_000
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"
PLACE = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01")


def test_a_bucket_gives_a_seconds_tokens_at_once_and_then_one_whenever_it_is_due() -> None:
    bucket = Bucket(4)
    assert [bucket.take(7) for _ in range(6)] == [True] * 4 + [False] * 2
    assert [bucket.take(7 + S // 4 - 1), bucket.take(7 + S // 4)] == [False, True]
    assert [bucket.take(9 * S) for _ in range(5)] == [True] * 4 + [False]


@pytest.mark.parametrize("per_s", [0.5, 1, 3, 250])
def test_over_a_minute_no_more_than_the_rate_and_one_bucketful_is_given(per_s: float) -> None:
    bucket = Bucket(per_s)
    given = sum(bucket.take(ms * S // 1000) for ms in range(60_000))
    assert 60 * per_s <= given <= 61 * per_s + 1


def test_a_rate_below_one_still_gives_the_first() -> None:
    bucket = Bucket(0.5)
    assert [bucket.take(at * S) for at in (0, 1, 2, 3)] == [True, False, True, False]


def test_no_rate_no_token() -> None:
    assert not Bucket(0).take(S)


@pytest.mark.parametrize("percent", [0, 1, 20, 99, 100])
def test_of_any_hundred_arrivals_exactly_the_percentage_is_logged(percent: int) -> None:
    sampler = Sampler()
    sampler.configure(Sampling(0, percent, 1e9))
    logged = [sampler.arrived("", S + n)[1] for n in range(300)]
    assert logged == [router.sampled(percent, n) for n in range(1, 301)]
    assert [sum(logged[at : at + 100]) for at in (0, 37, 200)] == [percent] * 3


def test_what_the_caller_traces_is_traced_and_costs_no_token() -> None:
    sampler = Sampler()
    sampler.configure(Sampling(2, 0, 0))
    parents = [PARENT + "01", PARENT + "00", PARENT + "03", "", "", PARENT + "01"]
    traced = [sampler.arrived(parent, S)[0] for parent in parents]
    assert traced == [True, True, True, True, False, True]


def test_the_same_sampling_again_fills_no_bucket_and_starts_no_count_anew() -> None:
    sampler = Sampler()
    for _ in range(2):
        sampler.configure(Sampling(1, 50, 1))
        traced, _ = sampler.arrived("", S)
    assert not traced
    sampler.configure(Sampling(1, 50, 2))
    assert sampler.arrived("", S)[0]
    assert sampler.position == 3


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "x",
        PARENT + "1",
        PARENT + "01-more",
        PARENT.upper() + "01",
        "ff" + PARENT[2:] + "01",
        "00-" + "0" * 32 + "-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01",
    ],
)
def test_what_is_no_traceparent_traces_nothing_and_is_nobodys_parent(parent: str) -> None:
    assert not is_traced(parent)
    places = {place_under(parent) for _ in range(9)}
    assert len({place[3:35] for place in places}) == 9
    assert all(PLACE.fullmatch(place) for place in places)


def test_a_place_is_a_new_one_in_the_callers_trace() -> None:
    one, other = place_under(PARENT + "00"), place_under(PARENT + "00")
    assert one[:36] == other[:36] == PARENT[:36]
    assert one != other
    assert PLACE.fullmatch(one)


def test_ids_are_32_hex_digits_and_their_own() -> None:
    made = ids(50)
    assert len(set(made)) == 50
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)
