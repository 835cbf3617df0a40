"""A version is quarantined at its third crash within the window, and not for older ones."""

from services.inference.quarantine import CRASHES_MAX, WINDOW_S, Crashes


def test_the_third_crash_is_one_too_many() -> None:
    crashes = Crashes()
    assert [crashes.add(float(n)) for n in range(CRASHES_MAX)] == [False, False, True]


def test_crashes_far_apart_are_forgiven() -> None:
    crashes = Crashes()
    assert not any(crashes.add(n * WINDOW_S / (CRASHES_MAX - 1)) for n in range(20))


def test_a_forgiven_crash_is_not_counted_again() -> None:
    crashes = Crashes()
    assert not any(crashes.add(now_s) for now_s in (0.0, WINDOW_S - 2, WINDOW_S + 1))
    assert crashes.add(WINDOW_S + 2)
