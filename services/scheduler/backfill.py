"""Backfill: later jobs pass the first that does not fit, as long as they do not make it later.

The first job that quota allows and no node has room for gets a reservation: the places that are
free once enough of those that run have reached the bound of their durations, and when that is
(EASY, Lifka 1995). A later job may start if it ends before, or if there is room beside. Where
nobody knows how long what runs takes there is no reservation, and whatever fits passes.
"""

import msgspec

from services.scheduler.book import Book, Claim
from services.scheduler.jobs import Ask, Job, Key
from services.scheduler.shapes import Shape, Spot

ENDS_MAX = 512
"""A reservation waits for so many ends at most."""
LATE_S = 10.0
"""A reservation that could not be kept is made anew after so long."""


class Reservation(msgspec.Struct):
    job: Key
    ask: Ask
    """One of its models, where its queue counts GPUs by model."""
    at: float
    spots: list[Spot]

    @property
    def nodes(self) -> list[str]:
        return sorted({spot.node for spot in self.spots})


def reserve(book: Book, claim: Claim) -> Reservation | None:
    """For who cannot be placed now; None if no known end makes room."""
    ends = book.ends[:ENDS_MAX]
    if not ends or room_after(book, claim.ask, [job for _, _, job in ends]) is None:
        return None
    low, high = 1, len(ends)
    while low < high:
        middle = (low + high) // 2
        if room_after(book, claim.ask, [job for _, _, job in ends[:middle]]) is None:
            low = middle + 1
        else:
            high = middle
    spots = room_after(book, claim.ask, [job for _, _, job in ends[:low]])
    assert spots is not None
    return Reservation(claim.job.key, claim.ask, max(book.now, ends[low - 1][0]), spots)


def room_after(book: Book, ask: Ask, ended: list[Job]) -> list[Spot] | None:
    releases = [one for job in ended for one in job.releases()]
    return book.pool.try_without(releases, ask.shape, ask.workers, ask.one_node)


def holds(book: Book, reservation: Reservation) -> bool:
    """Whether it is still worth keeping: its time has not long passed, its nodes are open.

    Its time passes if something runs for longer than its bound, or started late.
    """
    if book.now >= reservation.at + LATE_S:
        return False
    return all(book.is_open(node) for node in reservation.nodes)


def spots_beside(book: Book, claim: Claim, reservation: Reservation) -> list[Spot] | None:
    """Where a later job goes without making the reservation later; None for nowhere.

    Moves the reservation to other places where that makes room, never to a later time.
    """
    duration_s = claim.job.request.duration_s
    if duration_s and book.now + duration_s <= reservation.at:
        return book.spots_for(claim.ask)
    ask = together(book, claim.ask)
    for node in reservation.nodes:
        book.pool.open(node, False)
    spots = book.spots_for(ask)
    for node in reservation.nodes:
        book.pool.open(node, True)
    if spots is not None:
        return spots
    spots = book.spots_for(ask)
    if spots is None:
        return None
    moved = room_with(book, ask.shape, spots, reservation)
    if moved is None:
        return None
    reservation.spots = moved
    book.lines.open |= book.lines.of  # who was kept off its places before may have them now
    return spots


def room_with(
    book: Book, shape: Shape, spots: list[Spot], reservation: Reservation
) -> list[Spot] | None:
    """Where the reservation could be kept, in time, with these taken too."""
    ended = book.ends_until(reservation.at, ENDS_MAX)
    for spot in spots:
        book.pool.take(shape, spot)
    moved = room_after(book, reservation.ask, ended)
    for spot in spots:
        book.pool.release(shape, spot)
    return moved


def together(book: Book, ask: Ask) -> Ask:
    """A gang that a node of the whole pool could hold stays on one, whatever is shut for now."""
    if ask.one_node or ask.workers == 1 or not ask.shape.gpus:
        return ask
    one_node = book.pool.fits_empty(ask.shape, ask.workers, True)
    return msgspec.structs.replace(ask, one_node=one_node)
