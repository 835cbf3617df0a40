"""One turn: servers side by side, every cell of the table, their memory, latencies, batches."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, harmonic_mean, median
from typing import NamedTuple

import grpc
import msgspec

from bench.peers import load, servers, sink
from bench.peers.environments import PEERS, Unavailable
from bench.peers.models import Reference, on_core
from bench.peers.peers import BEST, MODELS, OURS, Peer
from bench.peers.wire import WIRES, Answer

CELLS: dict[str, tuple[int, ...]] = {
    "identity": (1, 8, 64),
    "mlp": (1, 8, 64),
    "cnn": (1, 64),
    "resnet": (8, 64),
}
"""Model -> requests at once."""
LATENCY_UNDER_LOAD = (("mlp", 64), ("cnn", 64))
TAILS_OF = (BEST, OURS)
"""Whose p99 under load is compared."""
FLOOR_S = 0.3
BESIDE_FLOOR = "resnet"
"""What is judged against onnxruntime in process."""
SLICES = 3
"""Of a cell of servers side by side."""
SHARE_OF_ROWS_MIN = 0.01
"""A batch size that fewer of the rows went through is not timed for the floor."""


class Record(msgspec.Struct, kw_only=True):
    """What one turn gave. A cell is `mlp c64`."""

    round: int
    server: str
    names: list[str]
    failed: str = ""
    """Why the server could not be measured."""
    spoiled: dict[str, str] = {}
    """Cell -> what went wrong under load."""
    rates: dict[str, float] = {}
    p50_us: dict[str, float] = {}
    p99_us: dict[str, float] = {}
    same_batches: dict[str, float] = {}
    """Cell -> answers a second of onnxruntime in process, with the batches the server made."""
    client_share: dict[str, float] = {}
    """Cell -> of one core."""
    pss_mb: float = 0.0
    rss_mb: float = 0.0
    ready_s: float = 0.0
    spans: int = 0
    """That arrived until the end of its load: 0 without tracing."""


class Arrangement(msgspec.Struct, frozen=True):
    seconds: float
    server_cores: Sequence[int]
    client_cores: Sequence[int]


class Side(msgspec.Struct, frozen=True):
    """A server in a turn, as it is called in the records."""

    label: str
    peer: Peer
    names: tuple[str, ...]
    where: Arrangement

    def record(self, number: int) -> Record:
        return Record(round=number, server=self.label, names=list(self.names))


class Cell(NamedTuple):
    name: str
    concurrency: int

    def __str__(self) -> str:
        return f"{self.name} c{self.concurrency}"


class Slice(NamedTuple):
    """Of a cell: one run of the load."""

    rate: float
    client_share: float
    p50_us: float
    """0: not asked for."""
    p99_us: float
    floor: float
    """Answers a second of onnxruntime in process right after, with the batches the server made."""


class Running(NamedTuple):
    side: Side
    record: Record
    server: servers.Server
    spans: sink.Sink


def turn(number: int, sides: Sequence[Side]) -> list[Record]:
    """All of them run, and within a cell they are measured by turns, a few times: what the machine
    has to give changes within a minute. In every other round it goes from the last to the first."""
    records = [side.record(number) for side in sides]
    with ExitStack() as stack:
        running: list[Running] = []
        for side, record in zip(sides, records, strict=True):
            with failing(record):
                running.append(started(stack, side, record))
        if number % 2:
            running.reverse()
        for name, concurrencies in CELLS.items():
            asked = [one for one in running if name in one.side.names]
            targets = {one.side.label: target for one in asked for target in checked(one, name)}
            for concurrency in concurrencies:
                still = [one for one in asked if not one.record.failed]
                beside(still, targets, Cell(name, concurrency))
        for one in running:
            one.record.pss_mb, one.record.rss_mb = servers.memory_mb(one.server.mark)
            one.record.spans = one.spans.spans
    return records


@contextmanager
def failing(record: Record) -> Iterator[None]:
    """The record says why there is nothing in it."""
    try:
        yield
    except (Unavailable, servers.Wrong, OSError) as error:
        record.failed = f"{type(error).__name__.lower()}: {error}"
    except grpc.RpcError as error:
        record.failed = f"refused: {error}"


def started(stack: ExitStack, side: Side, record: Record) -> Running:
    spans = stack.enter_context(sink.listening())
    endpoint = f"127.0.0.1:{spans.port}"
    serving = servers.serving(side.peer, side.names, side.where.server_cores, endpoint)
    server = stack.enter_context(serving)
    record.ready_s = server.ready_s
    return Running(side, record, server, spans)


def checked(one: Running, name: str) -> Iterator[load.Target]:
    """Where to send the load, unless an answer is wrong."""
    with failing(one.record):
        yield target_of(one.side.peer, one.server, name, servers.check(one.server.client, name))


def beside(running: Sequence[Running], targets: dict[str, load.Target], cell: Cell) -> None:
    """Measures one cell of all of them."""
    slices: dict[str, list[Slice]] = {one.side.label: [] for one in running}
    for _ in range(SLICES if len(running) > 1 else 1):
        for one in running:
            with failing(one.record):
                try:
                    slices[one.side.label].append(measured(one, targets[one.side.label], cell))
                except load.Spoiled as error:
                    one.record.spoiled[str(cell)] = str(error)
    for one in running:
        if str(cell) not in one.record.spoiled and not one.record.failed:
            tell(one.record, str(cell), slices[one.side.label])


def measured(one: Running, target: load.Target, cell: Cell) -> Slice:
    """Raises `load.Spoiled`."""
    where = one.side.where
    floored = one.side.label == OURS and cell.name == BESIDE_FLOOR
    before = one.server.client.batches(cell.name) if floored else {}
    found = load.run(
        target, cell.concurrency, where.seconds, where.client_cores, log=cell.concurrency == 1
    )
    floor = 0.0
    if floored:
        after = one.server.client.batches(cell.name)
        runs = {rows: count - before.get(rows, 0) for rows, count in after.items()}
        floor = floor_of(cell.name, runs, where.server_cores[0], where.seconds)
    tails = found
    if one.side.label in TAILS_OF and cell in LATENCY_UNDER_LOAD:
        tails = load.run(target, cell.concurrency, where.seconds, where.client_cores, log=True)
    return Slice(found.rate, found.client_share, tails.p50_us, tails.p99_us, floor)


def tell(record: Record, cell: str, slices: Sequence[Slice]) -> None:
    record.rates[cell] = harmonic_mean([one.rate for one in slices])
    record.client_share[cell] = fmean(one.client_share for one in slices)
    if slices[0].p50_us:
        record.p50_us[cell] = median(one.p50_us for one in slices)
        record.p99_us[cell] = median(one.p99_us for one in slices)
    if slices[0].floor:
        record.same_batches[cell] = harmonic_mean([one.floor for one in slices])


def target_of(peer: Peer, server: servers.Server, name: str, answer: Answer) -> load.Target:
    wire = WIRES[peer.wire]
    token = (f"authorization: Bearer {peer.token}",) if peer.token else ()
    url = f"http://127.0.0.1:{server.port}{wire.path}"
    return load.Target(url, (*wire.headers, *token), wire.http1, body_of(peer, name), answer.bytes)


def body_of(peer: Peer, name: str) -> Path:
    return PEERS / "bodies" / f"{name}.{peer.wire}"


def floor_of(name: str, runs: dict[int, int], core: int, seconds: float) -> float:
    """Rows a second of onnxruntime in this process on that core, were these its batches; each
    size is timed for its share of that many seconds."""
    total = sum(rows * count for rows, count in runs.items())
    counted = {r: n for r, n in runs.items() if r * n >= SHARE_OF_ROWS_MIN * total}
    rows = sum(r * n for r, n in counted.items())
    reference = Reference(MODELS, name)
    spent = sum(n * on_core(core, reference, r, seconds * r * n / rows) for r, n in counted.items())
    return rows / spent


def in_process(number: int, names: Sequence[str], where: Arrangement) -> Record:
    """onnxruntime in this process, a batch of as many rows as there would be requests."""
    record = Record(round=number, server="onnxruntime", names=list(names))
    for name in names:
        reference = Reference(MODELS, name)
        for rows in CELLS[name]:
            seconds = on_core(where.server_cores[0], reference, rows, FLOOR_S)
            record.rates[f"{name} c{rows}"] = rows / seconds
    return record
