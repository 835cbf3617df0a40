"""Whatever comes and whenever: nobody in line is lost, doubled, overtaken by an equal or served too
late; batches stay within bounds and wait no longer than they may. Python's and C++'s line alike."""

import pytest
from hypothesis import given, settings

from libs.contracts.pipeline import Batching
from services.inference.line import BACK_NS_MIN, BACK_SHARE, SLOW_NS_MIN, STALE_MAX, Line, Turn
from services.inference.tests.lines import (
    LINES,
    US,
    Answer,
    AnyLine,
    Configure,
    Join,
    Leave,
    Make,
    Over,
    Pass,
    Step,
    Take,
    limits,
    native,
    steps,
)
from services.inference.tests.watched import Watched

both = pytest.mark.parametrize("make", LINES)


@both
@given(given_limits=limits(), walk=steps)
@settings(max_examples=400)
def test_every_step_of_any_walk_keeps_every_rule(
    make: Make, given_limits: Batching, walk: list[Step]
) -> None:
    watched = Watched(make(given_limits), given_limits)
    for step in walk:
        watched.step(step)
    watched.drain()
    assert watched.line.waiting == 0
    assert sorted(watched.over) == list(range(1, watched.joined + 1))


@given(given_limits=limits(), walk=steps)
@settings(max_examples=400)
def test_both_lines_decide_the_same_at_every_step(given_limits: Batching, walk: list[Step]) -> None:
    lines: list[AnyLine] = [Line(given_limits), native(given_limits)]
    now_ns = joined = 0
    running: list[int] = []
    current = given_limits
    for step in walk:
        match step:
            case Join() if step.rows <= current.max_batch_size:
                joined += 1
                deadline_ns = now_ns + step.deadline_us * US if step.deadline_us else 0
                rest = (step.rows, step.kind, now_ns, deadline_ns, step.timeout_us, step.priority)
                took = [line.join(joined, *rest) for line in lines]
                assert took[0] == took[1]
            case Leave(which):
                for line in lines:
                    line.leave(which)
            case Take(runners):
                turns = [line.take(now_ns, runners) for line in lines]
                assert turns[0] == turns[1]
                running += [len(turns[0].batch)] if turns[0].batch else []
            case Over(which) if running:
                requests = running.pop(which % len(running))
                for line in lines:
                    line.over(requests)
            case Answer(requests, took_us):
                for line in lines:
                    line.answered(requests, took_us * US, now_ns)
            case Pass(us):
                now_ns += us * US
            case Configure(current):
                for line in lines:
                    line.configure(current)
            case _:
                pass
        assert lines[0].waiting == lines[1].waiting


def joined(make: Make, given: Batching, *asked: Join) -> AnyLine:
    """A line in which these joined at 0, 1, 2... ns, with keys from 1 on."""
    line = make(given)
    for index, one in enumerate(asked):
        deadline_ns = one.deadline_us * US
        rest = (deadline_ns, one.timeout_us, one.priority)
        assert line.join(index + 1, one.rows, one.kind, index, *rest)
    return line


@both
def test_nobody_is_in_an_empty_line(make: Make) -> None:
    assert make(Batching()).take(5) == Turn([], [], 0)


@both
def test_without_a_delay_whoever_is_there_is_served_at_once(make: Make) -> None:
    line = joined(make, Batching(), Join(1), Join(2))
    assert line.take(1) == Turn([1, 2], [], 0)


@both
def test_runners_that_have_nothing_to_do_share_what_waits(make: Make) -> None:
    """And no request is torn."""
    line = joined(make, Batching(), *[Join(1)] * 7)
    assert [line.take(9, left).batch for left in (3, 2, 1)] == [[1, 2, 3], [4, 5], [6, 7]]
    line = joined(make, Batching(), Join(5), Join(1))
    assert [line.take(9, 2).batch for _ in range(2)] == [[1], [2]]


@both
def test_while_others_are_at_slow_batches_as_much_is_left_for_the_next(make: Make) -> None:
    line = joined(make, Batching(), *[Join(1)] * 64)
    line.answered(1, SLOW_NS_MIN, 64)
    assert [len(line.take(64, runners).batch) for runners in (2, 1)] == [32, 16]
    line.over(32)
    line.answered(32, SLOW_NS_MIN, 64)
    assert len(line.take(64).batch) == 8
    assert len(line.take(64).batch) == 8


@both
@pytest.mark.parametrize(
    ("given", "waiting", "took_ns", "taken"),
    [
        (Batching(), 40, SLOW_NS_MIN - 1, 40),
        (Batching(), 8, SLOW_NS_MIN, 8),
        (Batching(preferred_batch_size=(32,)), 40, SLOW_NS_MIN, 32),
        (Batching(), 40, SLOW_NS_MIN, 11),
    ],
    ids=["too quick a batch", "few", "a size is asked for", "else"],
)
def test_what_costs_more_in_parts_is_taken_whole_while_others_run(
    make: Make, given: Batching, waiting: int, took_ns: int, taken: int
) -> None:
    line = joined(make, given, Join(1))
    assert line.take(1).batch == [1]
    line.answered(1, took_ns, 2)
    for key in range(waiting):
        assert line.join(2 + key, 1, 0, 3)
    assert len(line.take(3).batch) == taken


@both
def test_a_batch_in_parts_runs_until_the_last_is_over(make: Make) -> None:
    line = joined(make, Batching(), *[Join(1)] * 40)
    line.answered(1, SLOW_NS_MIN, 40)
    assert len(line.take(40, 4).batch) == 10
    line.parted(10)
    for _ in range(9):
        line.over(1)
    assert len(line.take(41).batch) == 8
    line.over(1)
    assert len(line.take(41).batch) == 8


@both
@pytest.mark.parametrize(("took_ns", "taken"), [(SLOW_NS_MIN - 1, 6), (SLOW_NS_MIN, 3)])
def test_what_is_done_before_another_runner_has_woken_up_is_not_shared(
    make: Make, took_ns: int, taken: int
) -> None:
    line = joined(make, Batching(), *[Join(1)] * 6)
    line.answered(1, took_ns, 6)
    assert len(line.take(6, 2).batch) == taken


@both
@pytest.mark.parametrize(
    ("given", "first"),
    [
        (Batching(max_queue_delay_microseconds=1, max_batch_size=4), [1, 2, 3, 4]),
        (Batching(preferred_batch_size=(4,)), [1, 2, 3, 4]),
        (Batching(max_batch_size=3), [1, 2, 3]),
    ],
    ids=["worth a wait", "preferred", "more than a batch waits"],
)
def test_what_is_worth_a_wait_or_more_than_a_batch_is_not_shared(
    make: Make, given: Batching, first: list[int]
) -> None:
    assert joined(make, given, *[Join(1)] * 4).take(3, 2).batch == first


@both
def test_the_next_that_does_not_fit_is_not_passed_over_for_a_smaller_one(make: Make) -> None:
    line = joined(make, Batching(max_batch_size=4), Join(3), Join(2), Join(1))
    assert [line.take(9).batch for _ in range(2)] == [[1], [2, 3]]


@both
def test_a_batch_that_the_next_does_not_fit_waits_for_nobody(make: Make) -> None:
    given = Batching(max_batch_size=4, max_queue_delay_microseconds=1000)
    line = joined(make, given, Join(3), Join(2))
    assert line.take(9).batch == [1]
    assert line.take(9) == Turn([], [], 1000 * US + 1 - 9)


@both
def test_other_shapes_wait_for_their_own_turn_in_order_of_their_first(make: Make) -> None:
    line = joined(make, Batching(), Join(1, 7), Join(1, 0), Join(1, 7), Join(1, 1), Join(1, 0))
    assert [line.take(9).batch for _ in range(4)] == [[1, 3], [2, 5], [4], []]


@both
def test_a_delay_ends_when_it_is_over_or_the_batch_is_full(make: Make) -> None:
    given = Batching(max_batch_size=3, max_queue_delay_microseconds=2)
    line = joined(make, given, Join(1))
    assert line.take(500) == Turn([], [], 1500)
    assert line.take(1999) == Turn([], [], 1)
    assert line.take(2000) == Turn([1], [], 0)
    line = joined(make, given, Join(1), Join(1), Join(1))
    assert line.take(2) == Turn([1, 2, 3], [], 0)


@both
def test_a_preferred_size_does_not_wait_and_cuts(make: Make) -> None:
    given = Batching(preferred_batch_size=(4, 2), max_queue_delay_microseconds=2)
    line = joined(make, given, *[Join(1)] * 7)
    assert line.take(6).batch == [1, 2, 3, 4]
    assert line.take(6).batch == [5, 6]
    assert line.take(6) == Turn([], [], 2 * US + 6 - 6)
    assert line.take(2006).batch == [7]


@both
def test_a_request_larger_than_the_preferred_size_is_served_whole(make: Make) -> None:
    line = joined(make, Batching(preferred_batch_size=(2,)), Join(5), Join(1))
    assert [line.take(9).batch for _ in range(2)] == [[1], [2]]


@both
def test_who_was_just_answered_is_waited_for_as_long_as_the_batch_was_slow(make: Make) -> None:
    line = joined(make, Batching(), Join(1), Join(1))
    line.answered(2, 3_200_000, 1000)
    assert line.take(1500) == Turn([], [], 200_000 + 1000 - 1500)
    assert line.join(3, 1, 0, 2000)
    assert line.take(2000) == Turn([], [], 199_000)
    assert line.join(4, 1, 0, 3000)
    assert line.take(3000) == Turn([1, 2, 3, 4], [], 0)
    line.answered(4, 3_200_000, 10_000)
    assert line.join(5, 1, 0, 11_000)
    assert line.take(210_000) == Turn([5], [], 0)


@both
def test_a_caller_alone_waits_for_nobody(make: Make) -> None:
    line = joined(make, Batching(), Join(1))
    assert line.take(1).batch == [1]
    line.answered(1, 1_000_000_000, 5)
    assert line.join(2, 1, 0, 6)
    assert line.take(6) == Turn([2], [], 0)


@both
@pytest.mark.parametrize(
    ("given", "took_ns"),
    [
        (Batching(), BACK_SHARE * BACK_NS_MIN - 1),
        (Batching(preferred_batch_size=(1,)), 1_000_000_000),
        (Batching(max_batch_size=1), 1_000_000_000),
    ],
    ids=["too quick a batch", "a size is asked for", "full"],
)
def test_what_is_not_worth_it_does_not_wait_for_who_was_answered(
    make: Make, given: Batching, took_ns: int
) -> None:
    line = joined(make, given, Join(1))
    line.answered(3, took_ns, 5)
    assert line.take(6) == Turn([1], [], 0)


@both
def test_priority_1_comes_first_and_0_is_the_last_unless_a_default_says_otherwise(
    make: Make,
) -> None:
    asked = [Join(1, priority=priority) for priority in (0, 3, 2, 1, 4, 2)]
    one = Batching(max_batch_size=1, priority_levels=3)
    line = joined(make, one, *asked)
    assert [line.take(9).batch[0] for _ in asked] == [4, 3, 6, 1, 2, 5]
    default = Batching(max_batch_size=1, priority_levels=3, default_priority_level=1)
    line = joined(make, default, *asked)
    assert [line.take(9).batch[0] for _ in asked] == [1, 4, 5, 3, 6, 2]


@both
def test_a_timeout_of_its_own_may_only_be_shorter_and_only_where_that_is_allowed(
    make: Make,
) -> None:
    asked = (Join(1, timeout_us=9), Join(1, timeout_us=1), Join(1))
    line = joined(make, Batching(default_timeout_microseconds=5), *asked)
    assert line.take(1002) == Turn([1, 3], [(2, False)], 0)
    line = joined(make, Batching(default_timeout_microseconds=5), *asked)
    assert line.take(5000).late == [(2, False), (1, False)]
    fixed = Batching(default_timeout_microseconds=5, allow_timeout_override=False)
    line = joined(make, fixed, *asked)
    assert line.take(1002) == Turn([1, 2, 3], [], 0)


@both
def test_the_clients_deadline_ends_a_wait_whatever_the_timeout_action(make: Make) -> None:
    given = Batching(timeout_action="DELAY", max_queue_delay_microseconds=100)
    line = joined(make, given, Join(1, deadline_us=3), Join(1, timeout_us=2))
    assert line.take(1) == Turn([], [], 2000)
    assert line.take(2001) == Turn([], [], 999)
    assert line.take(3000) == Turn([], [(1, True)], 97_001)


@both
def test_the_delayed_are_served_behind_every_priority(make: Make) -> None:
    given = Batching(max_batch_size=1, priority_levels=2, timeout_action="DELAY")
    line = joined(make, given, Join(1, timeout_us=2, priority=1), Join(1, timeout_us=1), Join(1))
    assert line.take(2001).batch == [3]
    assert line.join(4, 1, 0, 2002, priority=2)
    assert [line.take(9999).batch for _ in range(3)] == [[4], [2], [1]]


@both
def test_who_was_delayed_still_has_the_clients_deadline(make: Make) -> None:
    given = Batching(timeout_action="DELAY", max_queue_delay_microseconds=100)
    line = joined(make, given, Join(1, timeout_us=2, deadline_us=3))
    assert line.take(2000) == Turn([], [], 1000)
    assert line.take(3000) == Turn([], [(1, True)], 0)


@both
def test_the_line_is_as_long_as_it_may_be_and_no_longer(make: Make) -> None:
    line = joined(make, Batching(max_queue_size=3), Join(1), Join(1), Join(1))
    assert not line.join(4, 1, 0, 9)
    line.leave(2)
    line.leave(2)
    assert line.waiting == 2
    assert line.join(5, 1, 0, 9)
    assert not line.join(6, 1, 0, 9)
    assert line.take(9).batch == [1, 3, 5]


@both
def test_who_waits_under_new_limits_is_served_even_when_it_is_too_large_for_them(
    make: Make,
) -> None:
    line = joined(make, Batching(), Join(8), Join(1))
    line.configure(Batching(max_batch_size=2))
    assert [line.take(9).batch for _ in range(2)] == [[1], [2]]


def test_who_left_is_forgotten_however_far_its_deadline_is() -> None:
    line = Line(Batching(max_queue_size=10))
    assert line.join(1, 1, 0, 0, deadline_ns=1 << 59)
    for key in range(2, 1000):
        line.join(key, 1, key, key, deadline_ns=1 << 60)
        line.leave(key)
        assert len(line.expiries) <= 2 * 10 + STALE_MAX + 1
    assert line.take(5000).batch == [1]
    line.take(5000)
    assert [line.items, line.levels, line.kinds, line.rows, line.expiries] == [{}, {}, {}, {}, []]
