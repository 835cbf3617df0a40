"""What the answers of a decoupled model took, by their place in a request's stream of them."""

from typing import NamedTuple

PLACES_MAX = 64
"""Answers further back are counted with the last of these: a stream may have millions."""


class Taken(NamedTuple):
    success: int = 0
    success_ns: int = 0
    fail: int = 0
    fail_ns: int = 0


class Responses:
    def __init__(self) -> None:
        self.by_place: dict[int, Taken] = {}

    def answered(self, place: int, ns: int) -> None:
        """`ns`: since the answer before it was taken, or since the request came."""
        known = self.at(place)
        self.put(place, known._replace(success=known.success + 1, success_ns=known.success_ns + ns))

    def failed(self, place: int, ns: int) -> None:
        known = self.at(place)
        self.put(place, known._replace(fail=known.fail + 1, fail_ns=known.fail_ns + ns))

    def at(self, place: int) -> Taken:
        return self.by_place.get(min(place, PLACES_MAX - 1), Taken())

    def put(self, place: int, taken: Taken) -> None:
        self.by_place[min(place, PLACES_MAX - 1)] = taken
