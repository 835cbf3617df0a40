"""What a snapshot has placed, into a book that has nothing yet: all at once.

What `Book.hold` does job by job is done for all here: what is kept in order is sorted once, and
sums are made of numbers.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec

from libs.contracts.events import Resources
from services.scheduler.book import Book
from services.scheduler.jobs import WAITING, Ask, Job
from services.scheduler.placement import adopt
from services.scheduler.quota import amounts_of
from services.scheduler.shapes import Shape, Spot


def placed(book: Book, jobs: Sequence[Job]) -> None:
    """What no node has room for any more is lost."""
    found = sorted((job for job in jobs if job.placement is not None), key=token_of)
    take(book, found)
    for job in found:
        if not job.live.parts:
            find_parts(book, job)
    found = [job for job in found if job.placement is not None]
    book.changes += len(found)
    hold(book, found)
    count(book, found)


def token_of(job: Job) -> int:
    return job.live.token


def take(book: Book, jobs: Sequence[Job]) -> None:
    pool = book.pool
    for job in jobs:
        shape = job.ask.shape
        for part in job.live.parts:
            for gpus in part.gpus:
                pool.take(shape, Spot(part.node, gpus))


def find_parts(book: Book, job: Job) -> None:
    """An earlier release said only on which node it is."""
    placement = job.live
    placement.parts = adopt(book.pool, job, placement.node) if placement.node else []
    take(book, [job])
    if not placement.parts:
        job.placement, job.state = None, WAITING


def hold(book: Book, jobs: Sequence[Job]) -> None:
    """By token, as they came."""
    for job in jobs:
        placement, queue = job.live, job.request.queue
        for part in placement.parts:
            book.on_node.setdefault(part.node, {})[job.key] = None
        book.running.setdefault(queue, []).append((placement.rank, -placement.token, job))
        if job.request.duration_s:
            book.ends.append((*book.end_of(job), job))
    for running in book.running.values():
        running.sort()
    book.ends.sort()


def count(book: Book, jobs: Sequence[Job]) -> None:
    """What they take of nodes and quotas."""
    taken: dict[str, list[int]] = {}
    workers: dict[tuple[str, Ask], Counter[str]] = {}
    for job in jobs:
        models = workers.setdefault((job.request.queue, job.ask), Counter())
        for part in job.live.parts:
            models[part.model] += len(part.gpus)
            add(taken.setdefault(part.node, [0, 0, 0]), job.ask.shape, len(part.gpus))
    for name, amounts in taken.items():
        book.nodes[name].allocated = Resources(*amounts)
    for (queue, ask), models in workers.items():
        together = msgspec.structs.replace(ask, workers=models.total())
        book.quota.take(queue, amounts_of(together, models))


def add(amounts: list[int], shape: Shape, workers: int) -> None:
    """To (cpu_milli, memory_mib, gpu_milli)."""
    amounts[0] += workers * shape.cpu_milli
    amounts[1] += workers * shape.memory_mib
    amounts[2] += workers * shape.gpus * shape.gpu_milli
