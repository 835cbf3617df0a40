"""One turn of one server: every cell of the table, its memory, its latencies, its batches."""

from collections.abc import Sequence
from pathlib import Path

import grpc
import msgspec

from bench.peers import load, servers, sink
from bench.peers.environments import PEERS, Unavailable
from bench.peers.models import Reference, on_core
from bench.peers.peers import MODELS, Peer
from bench.peers.wire import WIRES, Answer

CELLS: dict[str, tuple[int, ...]] = {
    "identity": (1, 8, 64),
    "mlp": (1, 8, 64),
    "cnn": (1, 64),
    "resnet": (8, 64),
}
"""Model -> requests at once."""
LATENCY_UNDER_LOAD = ("mlp", "cnn")
TAILS_OF = ("triton-cpp", "ours")
"""Whose p99 under load is compared."""
FLOOR_S = 0.3
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


def turn(
    number: int, peer: Peer, names: Sequence[str], where: Arrangement, label: str = ""
) -> Record:
    """`label`: what it is called in the records, when it is not the peer's ordinary turn."""
    record = Record(round=number, server=label or peer.name, names=list(names))
    try:
        with (
            sink.listening() as spans,
            servers.serving(peer, names, where.server_cores, f"127.0.0.1:{spans.port}") as server,
        ):
            record.ready_s = server.ready_s
            for name in names:
                measure(record, peer, server, name, where)
            record.pss_mb, record.rss_mb = servers.memory_mb(server.mark)
            record.spans = spans.spans
    except (Unavailable, servers.Wrong, OSError) as error:
        record.failed = f"{type(error).__name__.lower()}: {error}"
    except grpc.RpcError as error:
        record.failed = f"refused: {error}"
    return record


def measure(
    record: Record, peer: Peer, server: servers.Server, name: str, where: Arrangement
) -> None:
    target = target_of(peer, server, name, servers.check(server.client, name))
    for concurrency in CELLS[name]:
        cell = f"{name} c{concurrency}"
        counted = peer.token and name == "resnet" and len(where.server_cores) == 1
        before = server.client.batches(name) if counted else {}
        try:
            one(record, cell, target, concurrency, where)
        except load.Spoiled as error:
            record.spoiled[cell] = str(error)
            continue
        if before:
            after = server.client.batches(name)
            runs = {rows: count - before.get(rows, 0) for rows, count in after.items()}
            record.same_batches[cell] = floor_of(name, runs, where.server_cores[0])


def one(
    record: Record, cell: str, target: load.Target, concurrency: int, where: Arrangement
) -> None:
    name = cell.split()[0]
    found = load.run(target, concurrency, where.seconds, where.client_cores, log=concurrency == 1)
    record.rates[cell] = found.rate
    record.client_share[cell] = found.client_share
    loaded = concurrency == max(CELLS[name]) and name in LATENCY_UNDER_LOAD
    if loaded and record.server in TAILS_OF:
        found = load.run(target, concurrency, where.seconds, where.client_cores, log=True)
    if found.p50_us:
        record.p50_us[cell], record.p99_us[cell] = found.p50_us, found.p99_us


def target_of(peer: Peer, server: servers.Server, name: str, answer: Answer) -> load.Target:
    wire = WIRES[peer.wire]
    token = (f"authorization: Bearer {peer.token}",) if peer.token else ()
    url = f"http://127.0.0.1:{server.port}{wire.path}"
    return load.Target(url, (*wire.headers, *token), wire.http1, body_of(peer, name), answer.bytes)


def body_of(peer: Peer, name: str) -> Path:
    return PEERS / "bodies" / f"{name}.{peer.wire}"


def floor_of(name: str, runs: dict[int, int], core: int) -> float:
    """Rows a second of onnxruntime in this process on that core, were these its batches."""
    total = sum(rows * count for rows, count in runs.items())
    counted = {r: n for r, n in runs.items() if r * n >= SHARE_OF_ROWS_MIN * total}
    reference = Reference(MODELS, name)
    spent = sum(n * on_core(core, reference, r, FLOOR_S) for r, n in counted.items())
    return sum(r * n for r, n in counted.items()) / spent


def in_process(number: int, names: Sequence[str], where: Arrangement) -> Record:
    """onnxruntime in this process, a batch of as many rows as there would be requests."""
    record = Record(round=number, server="onnxruntime", names=list(names))
    for name in names:
        reference = Reference(MODELS, name)
        for rows in CELLS[name]:
            seconds = on_core(where.server_cores[0], reference, rows, FLOOR_S)
            record.rates[f"{name} c{rows}"] = rows / seconds
    return record
