"""h2load, on the core that the servers do not have."""

import re
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

CONNECTIONS = 8
WARM_UP_S = 0.3
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


def command_of(target: Target, concurrency: int, seconds: float) -> list[str]:
    clients, streams = connections(concurrency, target.http1)
    command = ["h2load", "-c", str(clients), "-m", str(streams), "-d", str(target.body)]
    command += ["-D", f"{round(seconds * 1000)}ms", f"--warm-up-time={round(WARM_UP_S * 1000)}ms"]
    command += ["--h1"] if target.http1 else []
    for header in target.headers:
        command += ["-H", header]
    return [*command, target.url]


def run(target: Target, concurrency: int, seconds: float, cores: Sequence[int]) -> Load:
    return measured(command_of(target, concurrency, seconds), target, cores)


def run_logged(target: Target, concurrency: int, seconds: float, cores: Sequence[int]) -> Load:
    """With p50 and p99; writing the log costs the client, so rates are taken without."""
    log = target.body.with_suffix(".log")
    log.unlink(missing_ok=True)
    command = command_of(target, concurrency, seconds)
    load = measured([*command[:-1], f"--log-file={log}", command[-1]], target, cores)
    times = np.loadtxt(log, usecols=2, ndmin=1)
    return load._replace(p50_us=float(np.median(times)), p99_us=float(np.percentile(times, 99)))


def measured(command: list[str], target: Target, cores: Sequence[int]) -> Load:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    pinned = ["taskset", "-c", ",".join(map(str, cores)), *command]
    printed = subprocess.run(pinned, capture_output=True, text=True, check=True, timeout=120).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    seconds = int(command[command.index("-D") + 1].removesuffix("ms")) / 1000
    return Load(rate_of(printed, target), spent / (seconds + WARM_UP_S))


def rate_of(printed: str, target: Target) -> float:
    """Raises `Spoiled` with what h2load printed."""
    rate = re.search(r"finished in .*?, ([\d.]+) req/s", printed)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", printed)
    data = re.search(r"\((\d+)\) data", printed)
    good = re.search(r"status codes: (\d+) 2xx", printed)
    if rate is None or counts is None or data is None or good is None:
        raise Spoiled(printed)
    succeeded, failed, errored, timeout = map(int, counts.groups())
    wanted = succeeded * target.answer_bytes * SHARE_OF_BYTES_MIN
    if not succeeded or failed or errored or timeout or int(data[1]) < wanted:
        raise Spoiled(printed)
    return float(rate[1])
