"""What a snapshot has placed, into a book that has nothing yet: all at once.

What `Book.hold` does job by job is done for all here: what is kept in order is sorted once, and
sums are made of numbers.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from libs.contracts.events import Resources
from services.scheduler.book import Book
from services.scheduler.jobs import WAITING, Ask, Job, Key, Placement, ask_of
from services.scheduler.placement import adopt
from services.scheduler.quota import amounts_of
from services.scheduler.shapes import Spot


class Held(NamedTuple):
    """A job that is placed, and what it asks for: kept on each job it would cost as much again."""

    token: int
    key: Key
    job: Job
    ask: Ask
    placement: Placement


def placed(book: Book) -> None:
    """Of its jobs, by token, as they came; what no node has room for any more is lost."""
    found = [
        Held(placement.token, key, job, ask_of(job.request), placement)
        for key, job in book.jobs.items()
        if (placement := job.placement) is not None
    ]
    found.sort()
    take(book, found)
    for held in found:
        if not held.placement.parts:
            find_parts(book, held)
    found = [held for held in found if held.placement.parts]
    book.changes += len(found)
    hold(book, found)
    count(book, found)


def take(book: Book, found: Sequence[Held]) -> None:
    pool = book.pool
    for _, _, _, ask, placement in found:
        for part in placement.parts:
            for gpus in part.gpus:
                pool.take(ask.shape, Spot(part.node, gpus))


def find_parts(book: Book, held: Held) -> None:
    """An earlier release said only on which node it is."""
    job, placement = held.job, held.placement
    placement.parts = adopt(book.pool, job, placement.node) if placement.node else []
    take(book, [held])
    if not placement.parts:
        job.placement, job.state = None, WAITING


def hold(book: Book, found: Sequence[Held]) -> None:
    """In the order of their tokens."""
    on_node, running, ends = book.on_node, book.running, book.ends
    for token, key, job, _, placement in found:
        for part in placement.parts:
            on_node.setdefault(part.node, {})[key] = None
        running.setdefault(job.request.queue, []).append((-placement.rank, token, job))
        if job.request.duration_s:
            ends.append((*book.end_of(job), job))
    for queue in running.values():
        queue.sort()
    ends.sort()


def count(book: Book, found: Sequence[Held]) -> None:
    """What they take of nodes and quotas."""
    taken = {name: [0, 0, 0] for name in book.nodes}
    workers: dict[tuple[str, Ask], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for _, _, job, ask, placement in found:
        models, shape = workers[job.request.queue, ask], ask.shape
        for part in placement.parts:
            number = len(part.gpus)
            models[part.model] += number
            amounts = taken[part.node]
            amounts[0] += number * shape.cpu_milli
            amounts[1] += number * shape.memory_mib
            amounts[2] += number * shape.gpus * shape.gpu_milli
    for name, amounts in taken.items():
        book.nodes[name].allocated = Resources(*amounts)
    for (queue, ask), models in workers.items():
        together = msgspec.structs.replace(ask, workers=sum(models.values()))
        book.quota.take(queue, amounts_of(together, models))
