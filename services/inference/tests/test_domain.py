"""From what is loaded to what is desired, and what a label says."""

from typing import Any

import pytest

from libs.contracts.events import Observation, Target
from services.inference import domain
from services.inference.domain import Plan
from services.inference.tests.stage import deployment

ONE = Target(1, 80, "one")
TWO = Target(2, 20, "two")
CANARY = [ONE, TWO]


def test_the_old_route_stays_until_everything_is_loaded() -> None:
    old = domain.plan(CANARY, {"1": "one"}, {"1": 100})
    assert old == Plan((TWO,), {"1": 100}, (), complete=False)
    new = domain.plan(CANARY, {"1": "one", "2": "two"}, {"1": 100})
    assert new == Plan(route={"1": 80, "2": 20})


def test_what_is_not_desired_is_unloaded_once_the_rest_is_there() -> None:
    promoted = [Target(2, 100, "two")]
    assert domain.plan(promoted, {"1": "one"}, {"1": 100}).unload == ()
    loaded = {"1": "one", "2": "two"}
    plan = domain.plan(promoted, loaded, {"1": 80, "2": 20})
    assert plan == Plan(route={"2": 100}, unload=("1",))


def test_with_nothing_routed_those_that_are_loaded_share_the_traffic() -> None:
    assert domain.plan(CANARY, {"1": "one"}, {}) == Plan((TWO,), {"1": 80}, (), complete=False)
    assert domain.plan(CANARY, {}, {}) == Plan((ONE, TWO), {}, (), complete=False)


def test_other_bytes_under_the_same_number_are_loaded_again() -> None:
    assert domain.plan([ONE], {"1": "other"}, {"1": 100}).load == (ONE,)


def test_the_others_take_the_traffic_of_a_version_in_quarantine() -> None:
    assert domain.replaced(CANARY, {}, []) == CANARY
    assert domain.replaced(CANARY, {"2"}, [ONE]) == [ONE]


def test_the_newest_that_served_before_and_is_sound_takes_over() -> None:
    before = [Target(3, 100, "three"), Target(2, 20, "two"), Target(1, 80, "one")]
    assert domain.replaced([before[0]], {"3"}, before) == [Target(2, 100, "two")]
    assert domain.replaced([before[0]], {"3", "2"}, before) == [Target(1, 100, "one")]
    assert domain.replaced([before[0]], {"1", "2", "3"}, before) == []


@pytest.mark.parametrize(
    ("label", "outputs", "judged"),
    [
        (3, {"label": [3]}, (1, 1)),
        (3.0, {"label": [3]}, (1, 1)),
        (4, {"label": [3]}, (1, 0)),
        ("3", {"label": [3]}, (1, 0)),
        ([3, 4], {"label": [3, 5]}, (2, 1)),
        ([3], {"label": [3, 5]}, (0, 0)),
        (1.5, {"prediction": [1.5]}, (1, 0)),
    ],
)
def test_a_label_is_judged_row_by_row(label: Any, outputs: Any, judged: tuple[int, int]) -> None:
    assert domain.judge(label, outputs) == judged


def test_every_target_is_observed_also_without_requests() -> None:
    seen = {1: Observation(1, 5, 0)}
    assert domain.observations(deployment(2, *CANARY), seen, {"2"}) == [
        Observation(1, 5, 0),
        Observation(2, 0, 0, quarantined=True),
    ]


def test_a_model_of_another_project_is_named_with_it() -> None:
    assert domain.served_name("digits", "default") == ("default", "digits")
    assert domain.served_name("other.digits", "default") == ("other", "digits")
