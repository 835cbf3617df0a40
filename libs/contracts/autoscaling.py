"""How many replicas a deployment may have, and what makes it more or fewer.

The words are KServe's and Knative's. The pipeline file has them under `deployment.autoscaling`.
"""

import msgspec

REPLICA_KIND = REPLICA_QUEUE = "serve"
"""A replica is a job of that kind and of one worker, on a node that has no other of its model."""
REPLICA_PRIORITY = 1000
"""Somebody waits for an answer."""
REPLICA_ATTEMPTS_MAX = 1_000_000
NODE_LABEL = "node"
"""An agent that serves carries its node's name under it, so that a replica can be sent there."""
REPLICAS_MAX = 1024
WINDOW_S_MAX = 3600
IDLE_S_MAX = 30 * 86400


class Autoscaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    min_replicas: int = 1
    """0: without requests for `idle_s` nothing serves it, and the next request waits for one."""
    max_replicas: int = 1
    target_concurrency: int = 8
    """Requests a replica is to have at a time, waiting or being computed."""
    target_latency_ms: int = 0
    """Of the slowest 5 %, from arrival to answer; 0: not looked at."""
    idle_s: int = 300
    up_s: int = 5
    """More are needed for so long before there are more. From zero at once."""
    down_s: int = 60
    """Fewer would do for so long before there are fewer."""


def first_replica(model: str) -> str:
    """Its job: whoever asks for it first, it is the same one."""
    return f"serve-{model}"


def problem_of(wanted: Autoscaling) -> tuple[str, str] | None:
    """(field, what is wrong with it)."""
    bounds = {
        "min_replicas": (0, REPLICAS_MAX),
        "max_replicas": (max(wanted.min_replicas, 1), REPLICAS_MAX),
        "target_concurrency": (1, 1 << 20),
        "target_latency_ms": (0, 600_000),
        "idle_s": (1, IDLE_S_MAX),
        "up_s": (1, WINDOW_S_MAX),
        "down_s": (1, WINDOW_S_MAX),
    }
    for field, (low, high) in bounds.items():
        if not low <= getattr(wanted, field) <= high:
            return field, f"{low} to {high}, got {getattr(wanted, field)}"
    return None
