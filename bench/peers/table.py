"""The table of the run, and each target as a ratio: met, not met, or not measured."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

from bench.peers.peers import BEST, EVERYONE, FALLBACK, OURS, PYTHON_PEERS
from bench.peers.rounds import CELLS, Record

ONE_MODEL, TWO_CORES = "ours with one model", "ours on two cores"
OWN = (OURS, FALLBACK, ONE_MODEL, TWO_CORES)
SCALED = ("cnn", "resnet")
MEMORY_MB_MAX = 230.0
READY_S_MAX = 1.0
TAIL_MAX = 3.0
LABELS = {peer.name: peer.label for peer in EVERYONE} | {
    "onnxruntime": "onnxruntime in process, batches of 1 / 8 / 64",
    ONE_MODEL: "Leptonic with one model",
    TWO_CORES: "Leptonic on two cores, the client on them too",
}
Rounds = dict[int, float]
"""Round -> what was measured in it."""


class Target(NamedTuple):
    what: str
    value: float | None
    """None: not measured in this run."""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        good = self.value >= (self.at_least or 0) and self.value <= (self.at_most or self.value)
        return "met" if good else "NOT MET"

    def line(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least else f"<= {self.at_most:g}"
        value = "-" if self.value is None else f"{self.value:.3g}"
        return f"{self.what:<76} {value:>9} {bound:>8}  {self.verdict}"


class Figures:
    """The records of a run, asked by server and cell."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def rounds(self, server: str, what: str, cell: str) -> Rounds:
        mine = [one for one in self.records if one.server == server]
        return {one.round: getattr(one, what)[cell] for one in mine if cell in getattr(one, what)}

    def middle(self, server: str, what: str, cell: str) -> float | None:
        found = self.rounds(server, what, cell)
        return median(found.values()) if found else None

    def plain(self, server: str, what: str) -> float | None:
        """The largest of a round's turns, the median of the rounds."""
        by_round: Rounds = {}
        for one in self.records:
            if one.server == server and not one.failed:
                by_round[one.round] = max(by_round.get(one.round, 0.0), getattr(one, what))
        return median(by_round.values()) if by_round else None

    def failures(self, server: str) -> str:
        mine = [one for one in self.records if one.server == server]
        told = [f"{','.join(one.names)}: {one.failed}" for one in mine if one.failed]
        told += [f"{cell}: spoiled under load" for one in mine for cell in one.spoiled]
        return "; ".join(dict.fromkeys(told))


def ratio(above: Rounds, below: Rounds) -> float | None:
    """The median of the rounds' ratios: a noisy neighbour hurts both sides of one round."""
    both = [above[number] / below[number] for number in above.keys() & below.keys()]
    return median(both) if both else None


def table(figures: Figures) -> Iterator[str]:
    servers = list(dict.fromkeys(one.server for one in figures.records))
    heads = [f"{name} {' / '.join(f'c{c}' for c in cells)}" for name, cells in CELLS.items()]
    yield f"| server, requests/s on one core | {' | '.join(heads)} | PSS / RSS, MB | ready, s |"
    yield "|---" * (len(heads) + 3) + "|"
    for server in servers:
        cells = [cell_text(figures, server, name) for name in CELLS]
        yield f"| {LABELS.get(server, server)} | {' | '.join(cells)} | {weight(figures, server)} |"
    for server in servers:
        if told := figures.failures(server):
            yield f"\n{LABELS.get(server, server)}: {told}"


def weight(figures: Figures, server: str) -> str:
    pss, rss, ready = (figures.plain(server, what) for what in ("pss_mb", "rss_mb", "ready_s"))
    return f"{pss:,.0f} / {rss:,.0f} | {ready:.2f}" if pss and rss and ready else "- | -"


def latencies(figures: Figures) -> Iterator[str]:
    cells = sorted({cell for one in figures.records for cell in one.p50_us})
    yield f"| us, p50 / p99 | {' | '.join(cells)} |"
    yield "|---" * (len(cells) + 1) + "|"
    for server in dict.fromkeys(one.server for one in figures.records if one.p50_us):
        texts = [latency_text(figures, server, cell) for cell in cells]
        yield f"| {LABELS.get(server, server)} | {' | '.join(texts)} |"


def latency_text(figures: Figures, server: str, cell: str) -> str:
    p50, p99 = (figures.middle(server, what, cell) for what in ("p50_us", "p99_us"))
    return f"{p50:,.0f} / {p99:,.0f}" if p50 and p99 else "-"


def cell_text(figures: Figures, server: str, name: str) -> str:
    found = [figures.middle(server, "rates", f"{name} c{one}") for one in CELLS[name]]
    return " / ".join("-" if one is None else f"{one:,.0f}" for one in found)


def targets(figures: Figures) -> list[Target]:
    return [
        *against_triton(figures),
        *against_python(figures),
        *of_the_fallback(figures),
        *of_a_replica(figures),
    ]


def rates(figures: Figures, cell: str) -> Callable[[str, str], float | None]:
    return lambda above, below: ratio(
        figures.rounds(above, "rates", cell), figures.rounds(below, "rates", cell)
    )


def against_triton(figures: Figures) -> Iterator[Target]:
    wanted = {"identity c64": 8, "mlp c64": 8, "identity c8": 3, "mlp c8": 3, "cnn c64": 3.5}
    for cell, least in wanted.items():
        value = rates(figures, cell)(OURS, BEST)
        yield Target(f"{cell}: requests/s over Triton's with a C++ backend", value, at_least=least)
    for name in ("identity", "mlp", "cnn"):
        sides = [figures.rounds(who, "p50_us", f"{name} c1") for who in (OURS, BEST)]
        yield Target(f"{name} c1: p50 over Triton's", ratio(*sides), at_most=1.0)
    for cell in ("resnet c8", "resnet c64"):
        sides = [figures.rounds(OURS, what, cell) for what in ("rates", "same_batches")]
        what = f"{cell}: requests/s over onnxruntime in process, the same batches"
        yield Target(what, ratio(*sides), at_least=0.97)


def against_python(figures: Figures) -> Iterator[Target]:
    for peer in PYTHON_PEERS:
        value = rates(figures, "mlp c64")(OURS, peer)
        yield Target(f"mlp c64: requests/s over {LABELS[peer]}", value, at_least=20)


def of_the_fallback(figures: Figures) -> Iterator[Target]:
    compared = rates(figures, "mlp c64")
    what = "mlp c64: pure Python, requests/s over Triton's with a C++ backend"
    yield Target(what, compared(FALLBACK, BEST), at_least=1.0)
    for peer in PYTHON_PEERS:
        what = f"mlp c64: pure Python, requests/s over {LABELS[peer]}"
        yield Target(what, compared(FALLBACK, peer), at_least=2.0)


def of_a_replica(figures: Figures) -> Iterator[Target]:
    for server in (OURS, FALLBACK):
        what = f"spans that arrived from {LABELS[server]}: sampled tracing was on"
        yield Target(what, figures.plain(server, "spans"), at_least=1)
    memory, ready = figures.plain(ONE_MODEL, "rss_mb"), figures.plain(ONE_MODEL, "ready_s")
    yield Target("memory of a replica of mlp after its load, MB of RSS", memory,
                 at_most=MEMORY_MB_MAX)  # fmt: skip
    yield Target("start to first answer of a replica of mlp, s", ready, at_most=READY_S_MAX)
    for name in SCALED:
        yield from of_two_cores(figures, f"{name} c64")
    for name in ("mlp", "cnn"):
        sides = [figures.rounds(OURS, what, f"{name} c64") for what in ("p99_us", "p50_us")]
        yield Target(f"{name} c64: p99 over p50", ratio(*sides), at_most=TAIL_MAX)


def of_two_cores(figures: Figures, cell: str) -> Iterator[Target]:
    """Towards one core the client has the other for itself; here it takes its share of the two.
    Judged is what the server's cores do: the rate over the cores that the client left."""
    two, one = figures.rounds(TWO_CORES, "rates", cell), figures.rounds(OURS, "rates", cell)
    shares = figures.rounds(TWO_CORES, "client_share", cell)
    free = {number: rate * 2 / (2 - shares[number]) for number, rate in two.items()}
    share = figures.middle(TWO_CORES, "client_share", cell)
    both = ratio(two, one)
    told = f" (x{both:.2f} with the client at {share:.2f} cores)" if both and share else ""
    what = f"{cell}: two cores over one, by server core{told}"
    yield Target(what, ratio(free, one), at_least=1.8)
