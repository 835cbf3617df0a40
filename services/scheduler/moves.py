"""Room for a gang by moving small jobs together: nobody waits for it, everybody is placed.

As small jobs come and go they lie scattered, and a gang that needs a whole node waits while twice
its GPUs are free. On Philly's fortnight that is half of all waiting (docs/scheduler.md). What is
moved goes on from its last checkpoint, so only jobs that levels of service may stop anyway are.
"""

from collections.abc import Iterator
from heapq import nsmallest

from services.scheduler.book import Book, Claim
from services.scheduler.jobs import LIVE, Job
from services.scheduler.nodes import Node
from services.scheduler.preempt import free_without
from services.scheduler.shapes import Spot, admits, room

NODES_MAX = 32
"""So many are looked at, those that lack the least."""
MOVED_MAX = 8
"""Jobs, for one gang."""

Moves = list[tuple[Job, list[Spot]]]


def moves_for(book: Book, claim: Claim) -> tuple[Moves, list[Spot]] | None:
    """Who goes where, and then the claim's own places; None if that makes no room.

    Only a gang that goes on one node, and only where its queue and those of who is moved are by
    attained service. Changes nothing.
    """
    ask, queue = claim.ask, claim.job.request.queue
    alone = ask.workers == 1 or ask.one_node
    if not (alone and ask.shape.gpus and rotates(book, queue)):
        return None
    if not book.quota.allows(queue, claim.amounts):
        return None
    for node in candidates(book, claim):
        moves = moves_off(book, claim, node)
        if moves:
            releases = [one for job, _ in moves for one in job.releases()]
            spots = book.pool.try_without(releases, ask.shape, ask.workers, ask.one_node)
            assert spots is not None
            assert {spot.node for spot in spots} == {node.node}
            return moves, spots
    return None


def rotates(book: Book, queue: str) -> bool:
    spec = book.specs.get(queue)
    return spec is not None and spec.order == "attained" and not book.quota.flavors(queue)


def candidates(book: Book, claim: Claim) -> list[Node]:
    """Where the fewest GPUs have to be freed, as long as that many are free in all."""
    shape, wanted = claim.ask.shape, claim.job.gpu_milli
    free = {
        node.node: unused
        for node in book.nodes.values()
        if book.is_open(node.node) and (unused := unused_of(node))
    }
    if sum(free.values()) < wanted:
        return []
    able = (book.nodes[name] for name in free if admits(book.nodes[name].machine, shape))
    return nsmallest(NODES_MAX, able, key=lambda node: (-free[node.node], node.node))


def unused_of(node: Node) -> int:
    """Milli of its GPUs."""
    return node.capacity.gpu_milli * node.capacity.gpus - node.allocated.gpu_milli


def moves_off(book: Book, claim: Claim, node: Node) -> Moves:
    """Enough of those on the node, the largest first, each with another place; [] if none do."""
    ask, name = claim.ask, node.node
    free = book.pool.free(name)
    moves: Moves = []
    book.pool.open(name, False)
    for job in movable(book, claim, name):
        spots = book.spots_for(job.ask)
        if spots is None:
            continue
        moves.append((job, spots))
        take(book, moves[-1], 1)
        if room(free_without(free, name, [job for job, _ in moves]), ask.shape) >= ask.workers:
            break
    for move in moves:
        take(book, move, -1)
    book.pool.open(name, True)
    return fewest(moves, claim, node, book)


def movable(book: Book, claim: Claim, node: str) -> Iterator[Job]:
    """Smaller than the gang, wholly here, and such as may be stopped."""
    here = (book.jobs[key] for key in book.on_node.get(node, ()))
    found = [job for job in here if may_move(book, job) and job.gpu_milli < claim.job.gpu_milli]
    found.sort(key=lambda job: (-job.gpu_milli, -job.number))
    return iter(found[:MOVED_MAX])


def may_move(book: Book, job: Job) -> bool:
    placement = job.placement
    if placement is None or job.state not in LIVE or len(placement.parts) != 1:
        return False
    if not job.request.preemptible or placement.token > book.token_before or not job.gpu_milli:
        return False
    return rotates(book, job.request.queue)


def take(book: Book, move: tuple[Job, list[Spot]], sign: int) -> None:
    job, spots = move
    for spot in spots:
        (book.pool.take if sign > 0 else book.pool.release)(job.ask.shape, spot)


def fewest(moves: Moves, claim: Claim, node: Node, book: Book) -> Moves:
    """Without those that need not go; [] if even all are not enough."""
    free, ask = book.pool.free(node.node), claim.ask

    def enough(some: Moves) -> bool:
        without = free_without(free, node.node, [job for job, _ in some])
        return room(without, ask.shape) >= ask.workers

    if not moves or not enough(moves):
        return []
    for move in reversed(list(moves)):
        rest = [one for one in moves if one is not move]
        if enough(rest):
            moves = rest
    return moves
