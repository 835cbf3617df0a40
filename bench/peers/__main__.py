"""`make bench-peers`: every server on one core, the client on the other, turn by turn; who is
judged by a ratio of a few times, side by side.

ONLY=triton-cpp,ours SECONDS=1 RUNS=5 MODELS=mlp select; a run that was stopped goes on where it
was, on a later commit too, where only what is ours is measured again (AGAIN=1 starts anew). What
is measured is in `rounds`, who is in `peers`.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from bench.peers import table
from bench.peers.environments import PEERS, ROOT
from bench.peers.models import export_missing, rows_of
from bench.peers.peers import BEST, MODELS, OURS, selected
from bench.peers.rounds import CELLS, Arrangement, Record, Side, in_process, turn
from bench.peers.wire import write_bodies

RESULTS = Path(__file__).parents[1] / "peers.json"
STATE = PEERS / "run.json"
QUIET_LOAD_MAX = 0.5
TRIES_MAX = 2
"""Rounds in which a server may fail: Ray gives up when its node takes 30 s on a busy core."""


class Plan(msgspec.Struct, frozen=True):
    only: str
    models: list[str]
    seconds: float
    runs: int


class Run(msgspec.Struct):
    plan: Plan
    commit: str
    records: list[Record]
    load_before: float
    """Processes that wanted a core in the minute before the first turn: 0 on a quiet machine."""


def plan_of(environment: dict[str, str]) -> Plan:
    """Raises `ValueError` for a model or a server that is not known."""
    models = [name for name in environment.get("MODELS", "").split(",") if name] or list(CELLS)
    if unknown := sorted(set(models) - set(CELLS)):
        raise ValueError(f"MODELS={','.join(unknown)}: known are {', '.join(CELLS)}")
    only = environment.get("ONLY", "")
    selected(only)
    seconds, runs = (
        float(environment.get("SECONDS_EACH") or "1"),
        int(environment.get("RUNS") or "5"),
    )
    return Plan(only, models, seconds, runs)


def commit() -> str:
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def begun(state: Path, plan: Plan, commit: str, again: bool) -> Run:
    """Where the same run was stopped, what failed once more; anew when the plan or the shape of a
    record is another. Of another commit what is ours does not count, nor what ran beside it."""
    fresh = Run(plan, commit, [], os.getloadavg()[0])
    with contextlib.suppress(FileNotFoundError, msgspec.ValidationError):
        run = msgspec.json.decode(state.read_bytes(), type=Run)
        if run.plan == plan and not again:
            fresh.load_before = max(fresh.load_before, run.load_before)
            fresh.records = [
                one
                for one in run.records
                if not one.failed and (run.commit == commit or one.server not in (BEST, *table.OWN))
            ]
    return fresh


def work(run: Run, where: Arrangement) -> Iterator[Record]:
    """What is not measured yet, round by round: a slow minute hurts every server alike."""
    done = {(one.round, one.server, tuple(one.names)) for one in run.records}
    failures: Counter[tuple[str, tuple[str, ...]]] = Counter()
    models = tuple(run.plan.models)
    for number in range(run.plan.runs):
        for sides in turns(run.plan, where):
            todo = [one for one in sides if failures[one.label, one.names] < TRIES_MAX]
            if any((number, one.label, one.names) not in done for one in todo):
                for record in turn(number, todo):
                    failures[record.server, tuple(record.names)] += bool(record.failed)
                    yield record
        if (number, "onnxruntime", models) not in done:
            yield in_process(number, models, where)


def turns(plan: Plan, where: Arrangement) -> Iterator[list[Side]]:
    """Who is judged by a ratio of a few times runs side by side, everyone else alone."""
    models = tuple(plan.models)
    both = Arrangement(where.seconds, *2 * [[*where.server_cores, *where.client_cores]])
    compared = []
    for peer in selected(plan.only):
        mine = tuple(name for name in models if name in peer.models)
        apart = [(name,) for name in mine] if peer.alone else [mine]
        sides = [Side(peer.name, peer, names, where) for names in apart if names]
        if peer.name in (OURS, BEST):
            compared += sides
        else:
            yield from ([one] for one in sides)
        if peer.name == OURS:
            if names := tuple(name for name in table.SCALED if name in models):
                compared.append(Side(table.TWO_CORES, peer, names, both))
            if "mlp" in models:
                yield [Side(table.ONE_MODEL, peer, ("mlp",), where)]
    if compared:
        yield compared


def arrangement(plan: Plan) -> Arrangement:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("bench-peers needs two cores: one for the server, one for the client")
    if shutil.which("h2load") is None:
        sys.exit("bench-peers needs h2load: apt-get install nghttp2-client")
    os.sched_setaffinity(0, {cores[0]})
    return Arrangement(plan.seconds, [cores[1]], [cores[0]])


def publish(run: Run) -> None:
    figures = table.Figures(run.records)
    found = table.targets(figures)
    print("\n".join(table.table(figures)), end="\n\n")
    print("\n".join(table.latencies(figures)), end="\n\n")
    print("\n".join(target.line() for target in found))
    if run.load_before > QUIET_LOAD_MAX:
        print(f"\nNOT QUIET: the load was {run.load_before:.1f} before the first turn")
    written = {
        "measured": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": run.commit,
        "plan": msgspec.to_builtins(run.plan),
        "cpu": cpu(),
        "load_before": run.load_before,
        "targets": [{**target._asdict(), "verdict": target.verdict} for target in found],
        "records": msgspec.to_builtins(run.records),
    }
    RESULTS.write_text(json.dumps(written, indent=1) + "\n")
    print(f"\nwritten to {RESULTS.relative_to(ROOT)}")


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}"


def main() -> None:
    try:
        plan = plan_of(dict(os.environ))
    except ValueError as error:
        sys.exit(str(error))
    PEERS.mkdir(exist_ok=True)
    (PEERS / "home").mkdir(exist_ok=True)
    where = arrangement(plan)
    export_missing(MODELS)
    for name in CELLS:
        write_bodies(PEERS / "bodies", name, rows_of(name, 1))
    # Not in the middle of a turn: its server would go on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the next run goes on from here"))
    run = begun(STATE, plan, commit(), bool(os.environ.get("AGAIN")))
    for record in work(run, where):
        same = (record.round, record.server, record.names)
        run.records = [one for one in run.records if (one.round, one.server, one.names) != same]
        run.records.append(record)
        STATE.write_bytes(msgspec.json.encode(run))
        told = record.failed or ", ".join(f"{c} {r:,.0f}" for c, r in record.rates.items())
        print(f"round {record.round + 1}, {record.server}: {told}", flush=True)
    publish(run)
    STATE.unlink()


if __name__ == "__main__":
    main()
