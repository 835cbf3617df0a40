"""Loopback ports: which doors have fixed ones, which are free, which are taken."""

import contextlib
import random
import socket
from collections.abc import Collection, Mapping
from pathlib import Path

LOOPBACK = "127.0.0.1"
DOORS = {
    "nats": 4222,
    "inference_http": 8000,
    "inference_grpc": 8001,
    "inference_metrics": 8002,
    "inference_api": 8015,
    "ingest_http": 8010,
    "ingest_grpc": 9010,
    "preprocess_http": 8011,
    "preprocess_grpc": 9011,
    "trainer_http": 8012,
    "trainer_grpc": 9012,
    "registry_http": 8013,
    "registry_grpc": 9013,
    "scheduler_http": 8014,
    "scheduler_grpc": 9014,
}
"""`<component>_<door>` -> its fixed port; a service reads it from LEPTONIC_<name>_PORT."""
S3_PORTS = tuple(f"s3_{n}" for n in range(10))
"""The first is the door; the others are the server's own."""
INNER = ("postgres", "otlp", "traces", *S3_PORTS)
"""Never fixed: nobody outside needs to know them beforehand."""
FIRST = 20_000
LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class InUse(OSError):
    """Somebody else listens where a component must."""


def choose(mode: str, previous: Mapping[str, int]) -> dict[str, int]:
    """Name -> port for every door and every inner port.

    `mode` is `fixed` or `auto`; what was chosen before and is free is chosen again. Raises
    `InUse`, which names every taken port and its component.
    """
    fixed = DOORS if mode == "fixed" else {}
    taken = [f"port {port}, which {n} needs" for n, port in fixed.items() if not is_free(port)]
    if taken:
        raise InUse(f"in use: {'; '.join(taken)} (--ports auto takes free ones)")
    names = [name for name in (*DOORS, *INNER) if name not in fixed]
    again = {n: previous[n] for n in names if n in previous and is_free(previous[n])}
    missing = [name for name in names if name not in again]
    fresh = free(len(missing), avoid={*fixed.values(), *again.values()})
    return {**fixed, **again, **dict(zip(missing, fresh, strict=True))}


def free(count: int, avoid: Collection[int] = ()) -> list[int]:
    """So many different free ports, below those the kernel hands to outgoing connections."""
    last = int(LOCAL_RANGE.read_text().split()[0])
    candidates = [port for port in range(FIRST, last) if port not in avoid]
    assert candidates, f"{LOCAL_RANGE} leaves no ports from {FIRST}"
    random.SystemRandom().shuffle(candidates)
    found = [port for port, _ in zip(filter(is_free, candidates), range(count), strict=False)]
    assert len(found) == count, f"{len(found)} of {count} ports are free from {FIRST} to {last}"
    return found


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    with contextlib.closing(socket.socket()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
