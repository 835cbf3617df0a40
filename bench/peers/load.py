"""h2load, on the core that the servers do not have."""

import re
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

CONNECTIONS = 8
WARM_UP_S = 0.2
STUCK_S = 60.0
SHARE_OF_BYTES_MIN = 0.98
"""gRPC answers an error with status 200 and no message: then bytes are missing."""


class Target(NamedTuple):
    url: str
    headers: Sequence[str]
    http1: bool
    body: Path
    answer_bytes: int


class Load(NamedTuple):
    rate: float
    """Answers a second."""
    client_share: float
    """Of one core, over the run."""
    p50_us: float = 0.0
    p99_us: float = 0.0


class Spoiled(RuntimeError):
    """Answers were missing, failed or shorter than the right one."""


def connections(concurrency: int, http1: bool) -> tuple[int, int]:
    """Connections and streams on each. HTTP/1.1 carries one request a connection."""
    if http1 or concurrency < CONNECTIONS:
        return concurrency, 1
    return CONNECTIONS, concurrency // CONNECTIONS


def run(
    target: Target, concurrency: int, seconds: float, cores: Sequence[int], log: bool = False
) -> Load:
    """About so long, in whole waves of requests, warmed up by the two runs that find how many.

    A number and not a time: at the end of a time h2load hangs up on what it has asked, which kills
    Triton now and then, leaves slow servers busy, and cuts off a good part of a slow model's batch.
    `log`: p50 and p99 too; it costs the client, so other rates are taken without.

    Raises `Spoiled`.
    """
    rate = weighed(target, concurrency, concurrency, cores).rate
    rate = weighed(target, concurrency, waves(rate * WARM_UP_S, concurrency), cores).rate
    path = target.body.with_suffix(".log") if log else None
    load = weighed(target, concurrency, waves(rate * seconds, concurrency), cores, path)
    if path is None:
        return load
    p50, p99 = np.percentile(np.loadtxt(path, usecols=2, ndmin=1), (50, 99))
    return load._replace(p50_us=float(p50), p99_us=float(p99))


def waves(wanted: float, concurrency: int) -> int:
    return max(1, round(wanted / concurrency)) * concurrency


def weighed(
    target: Target, concurrency: int, count: int, cores: Sequence[int], log: Path | None = None
) -> Load:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter()
    printed = h2load(target, concurrency, count, cores, log)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), perf_counter() - started
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Load(rate_of(printed, target), spent / seconds)


def h2load(
    target: Target, concurrency: int, count: int, cores: Sequence[int], log: Path | None
) -> str:
    """What it printed. Raises `Spoiled` when it hangs."""
    clients, streams = connections(concurrency, target.http1)
    line = ["taskset", "-c", ",".join(map(str, cores)), "h2load", "-n", str(count)]
    line += ["-c", str(clients), "-m", str(streams), "-d", str(target.body)]
    line += ["--h1"] if target.http1 else []
    for header in target.headers:
        line += ["-H", header]
    if log is not None:
        log.unlink(missing_ok=True)
        line.append(f"--log-file={log}")
    try:
        done = subprocess.run([*line, target.url], capture_output=True, text=True, timeout=STUCK_S)
    except subprocess.TimeoutExpired as error:
        raise Spoiled(f"no end in {STUCK_S:.0f} s") from error
    return done.stdout + done.stderr


def rate_of(printed: str, target: Target) -> float:
    """Raises `Spoiled` with what h2load printed."""
    rate = re.search(r"finished in .*?, ([\d.]+) req/s", printed)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", printed)
    data = re.search(r"\((\d+)\) data", printed)
    good = re.search(r"status codes: (\d+) 2xx", printed)
    if rate is None or counts is None or data is None or good is None:
        raise Spoiled(printed)
    succeeded, *bad = map(int, counts.groups())
    wanted = succeeded * target.answer_bytes * SHARE_OF_BYTES_MIN
    if not succeeded or any(bad) or int(good[1]) < succeeded or int(data[1]) < wanted:
        raise Spoiled(printed)
    return float(rate[1])
