"""Loopback ports: which doors have fixed ones, which are free, which are taken."""

import contextlib
import random
import socket
from collections.abc import Collection, Mapping, Sequence
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
S3_DOORS = ("s3", "s3_master", "s3_volume", "s3_filer", "s3_admin")
S3_PORTS = (*S3_DOORS, *(f"{door}_grpc" for door in S3_DOORS))
"""`s3` is the door; the others are the server's own."""
GRPC_OFFSET = {"s3_admin_grpc": ("s3_admin", 10_000)}
"""The server's own worker looks for this one so far above that one, whatever the options say."""
INNER = ("postgres", "otlp", "traces", *S3_PORTS)
"""Never fixed: nobody outside needs to know them beforehand."""
FIRST = 20_000
TRIES_MAX = 1_000
LOCAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


class InUse(OSError):
    """Somebody else listens where a component must."""


def choose(
    mode: str, previous: Mapping[str, int], names: Sequence[str] = (*DOORS, *INNER)
) -> dict[str, int]:
    """Name -> port for every name.

    `mode` is `fixed` or `auto`; what was chosen before and is free is chosen again. Raises
    `InUse`, which names every taken port and its component.
    """
    fixed = {name: DOORS[name] for name in names if name in DOORS and mode == "fixed"}
    taken = [f"port {port}, which {n} needs" for n, port in fixed.items() if not is_free(port)]
    if taken:
        raise InUse(f"in use: {'; '.join(taken)} (--ports auto takes free ones)")
    chosen = dict(fixed)
    for name in names:
        if name in chosen or name in GRPC_OFFSET:
            continue
        beside = {n: offset for n, (door, offset) in GRPC_OFFSET.items() if door == name}
        port = find(previous.get(name), chosen.values(), beside.values())
        chosen[name] = port
        chosen.update({n: port + offset for n, offset in beside.items()})
    return chosen


def find(previous: int | None, avoid: Collection[int], offsets: Collection[int] = ()) -> int:
    """A free port, the previous one where that is free, with free ones so far above it.

    Below those the kernel hands to outgoing connections: they would be taken now and then.
    """
    last = int(LOCAL_RANGE.read_text().split()[0]) - max(offsets, default=0)
    for _ in range(TRIES_MAX):
        port = previous or random.SystemRandom().randrange(FIRST, last)
        wanted = {port, *(port + offset for offset in offsets)}
        if not wanted.intersection(avoid) and all(map(is_free, wanted)):
            return port
        previous = None
    raise InUse(f"no free port from {FIRST} to {last} ({LOCAL_RANGE})")


def free(count: int, avoid: Collection[int] = ()) -> list[int]:
    """So many different free ports; `avoid`: those that are promised and not taken yet."""
    found: list[int] = []
    for _ in range(count):
        found.append(find(None, {*found, *avoid}))
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
