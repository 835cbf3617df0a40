"""A server for its turn: started on its cores, asked until it answers, weighed, ended by pid."""

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import grpc
import numpy as np

from bench.peers.environments import PEERS, Unavailable
from bench.peers.models import Floats, Reference, rows_of
from bench.peers.peers import MODELS, Peer, Turn
from bench.peers.wire import Answer, Client
from stack import ports

READY_S_MAX = 120.0
LEAVE_S_MAX = 20.0
POLL_S = 0.01
MARK = "BENCH_PEERS_TURN"
CHECKED_ROWS = 64
CHECKERS = 16
TOLERANCE = 1e-3


class Wrong(RuntimeError):
    """A server that answers something else than onnxruntime does."""


class Server(NamedTuple):
    client: Client
    port: int
    mark: str
    ready_s: float
    """From the start of the process to its first right answer."""


@contextlib.contextmanager
def serving(
    peer: Peer, names: Sequence[str], cores: Sequence[int], otlp_endpoint: str
) -> Iterator[Server]:
    """Raises `Unavailable` when it does not get ready, with the end of its log."""
    port, port_2 = ports.free(2)
    command, environment = peer.start(Turn(list(names), port, port_2, otlp_endpoint))
    mark, log = uuid.uuid4().hex, PEERS / f"{peer.name}.log"
    client = Client(peer.wire, port, peer.token)
    with log.open("wb") as output:
        started = monotonic()
        process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command],
            env={**environment, MARK: mark}, cwd=PEERS, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            wait_until_ready(process, client, names, log)
            yield Server(client, port, mark, monotonic() - started)
        finally:
            client.close()
            end(process, mark)


def wait_until_ready(
    process: subprocess.Popen[bytes], client: Client, names: Sequence[str], log: Path
) -> None:
    ends = monotonic() + READY_S_MAX
    left = list(names)
    while left:
        try:
            client.ask(left[0], rows_of(left[0], 1))
            left.pop(0)
        except (grpc.RpcError, OSError) as error:
            if process.poll() is not None:
                raise Unavailable(f"ended with {process.returncode}: {last_line(log)}") from error
            if monotonic() > ends:
                told = error.details() if isinstance(error, grpc.Call) else error
                raise Unavailable(f"not ready in {READY_S_MAX:.0f} s: {told}") from error
            sleep(POLL_S)


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if len(line) > 1]
    return lines[-1][-200:] if lines else "it printed nothing"


def pids_of(mark: str) -> list[int]:
    """Processes of the turn, its children's children too: they carry its mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Asked, then made to. Whoever its parent leaves behind is asked too: PyTriton's Triton keeps
    shared memory until it ends by itself."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LEAVE_S_MAX)
    for sent in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids_of(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
        ends = monotonic() + LEAVE_S_MAX
        while pids_of(mark) and monotonic() < ends:
            process.poll()
            sleep(10 * POLL_S)
    assert not pids_of(mark), pids_of(mark)


def memory_mb(mark: str) -> tuple[float, float]:
    """PSS, which splits what processes share among them, strangers too, and RSS, which counts it
    in each; both summed over its processes."""
    lines = [line for pid in pids_of(mark) for line in rollup_of(pid)]
    kib = {
        kind: sum(int(line.split()[1]) for line in lines if line.startswith(kind))
        for kind in ("Pss:", "Rss:")
    }
    return kib["Pss:"] / 1024, kib["Rss:"] / 1024


def rollup_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return []


def check(client: Client, name: str) -> Answer:
    """Many at once, each its own row, so that batches are taken apart right. Raises `Wrong`."""
    rows = rows_of(name, CHECKED_ROWS, seed=1)
    wanted = Reference(MODELS, name).run(rows)
    with ThreadPoolExecutor(CHECKERS) as pool:
        answers = list(pool.map(lambda row: client.ask(name, row[None]), rows))
    for number, answer in enumerate(answers):
        compare(name, number, answer.scores, wanted[number : number + 1])
    return client.ask(name, rows_of(name, 1))


def compare(name: str, number: int, given: Floats, wanted: Floats) -> None:
    if given.shape != wanted.shape or not np.allclose(given, wanted, TOLERANCE, TOLERANCE):
        raise Wrong(f"{name}, row {number}: {given.ravel()[:4]} and not {wanted.ravel()[:4]}")
