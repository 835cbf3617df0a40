"""The replica with the least to do is asked, and what was sent meanwhile counts."""

from services.inference.loads import Load
from services.inference.peers import FRESH_S, Peers, Told

KEY = ("default", "digits")


def told(node: str, milli: int, ready: bool = True) -> Told:
    return Told(node, f"{node}:8001", [Load(*KEY, milli, ready=ready), Load("default", "other", 0)])


def test_who_has_least_to_do_is_asked() -> None:
    peers = Peers()
    for node, milli in (("a", 3000), ("b", 1000), ("c", 2000)):
        peers.heard(told(node, milli), 10.0)
    assert peers.least(KEY, 10.0) == ("b", 1000)
    assert peers.address("b") == "b:8001"
    peers.sent["b", KEY] += 2
    assert peers.least(KEY, 10.0) == ("c", 2000), "b has two more by now"
    assert peers.least(("default", "unknown"), 10.0) is None


def test_a_burst_is_shared_before_anybody_says_anything() -> None:
    peers = Peers()
    for node in "abc":
        peers.heard(told(node, 0), 10.0)
    for _ in range(30):
        node, _ = peers.least(KEY, 10.0) or ("", 0)
        peers.sent[node, KEY] += 1
    assert set(peers.sent.values()) == {10}


def test_who_is_silent_lost_or_only_waits_is_not_asked() -> None:
    peers = Peers()
    peers.heard(told("a", 0, ready=False), 10.0)
    assert peers.least(KEY, 10.0) is None, "it waits for the model itself"
    peers.heard(told("b", 0), 10.0)
    assert peers.least(KEY, 10.0 + FRESH_S) == ("b", 0)
    assert peers.least(KEY, 10.1 + FRESH_S) is None
    peers.heard(told("b", 0), 20.0)
    peers.lost("b")
    assert peers.least(KEY, 20.0) is None
    peers.heard(told("b", 0), 20.5)
    assert peers.least(KEY, 20.5) == ("b", 0)


def test_who_left_one_model_is_asked_for_the_others() -> None:
    peers = Peers()
    peers.heard(told("a", 0), 10.0)
    peers.left("a", KEY)
    assert peers.least(KEY, 10.0) is None
    assert peers.least(("default", "other"), 10.0) == ("a", 0)
    peers.heard(Told("a", "a:8001", [Load(*KEY, 0)]), 10.5)
    assert peers.least(KEY, 10.5) == ("a", 0)
    assert peers.least(("default", "other"), 10.5) is None, "it says so itself"


def test_a_sequence_has_one_home_and_sequences_have_many() -> None:
    peers = Peers()
    assert peers.home(KEY, "1", 10.0) is None
    for node in "abc":
        peers.heard(told(node, 0), 10.0)
    homes = [peers.home(KEY, str(number), 10.0) for number in range(300)]
    assert homes == [peers.home(KEY, str(number), 10.0) for number in range(300)]
    assert all(homes.count(node) > 50 for node in "abc")
    peers.lost("a")
    after = [peers.home(KEY, str(number), 10.0) for number in range(300)]
    moved = [before for before, now in zip(homes, after, strict=True) if before != now]
    assert set(moved) == {"a"}, "only those of the one that went move"
