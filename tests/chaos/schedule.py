"""What is broken, in which order: from a seed alone, so that a run can be repeated."""

import random
from collections.abc import Iterable

import msgspec

SERVERS = ("nats", "postgres", "s3", "collector")
SERVICES = ("ingest", "preprocess", "trainer", "registry", "inference", "scheduler")
VICTIMS = (*SERVERS, *SERVICES)
HELD_S = 15.0
HELD_IN_STORM_S = 5.0
STORM_FAULTS = 10
DOUBLE_KILLS = 2
KILL, PAUSE, DISCONNECT, FILL, RESTART = "kill -9", "pause", "disconnect", "fill", "restart"
DUPLICATES, REORDER, STORM = "duplicates", "reorder", "storm"


class Fault(msgspec.Struct, frozen=True):
    """One row of the table."""

    kind: str
    victims: tuple[str, ...] = ()
    seconds: float = 0.0
    """How long it lasts; 0 for what happens at once."""
    seed: int = 0
    parts: "tuple[Fault, ...]" = ()
    """Of a storm: one after the other, none waits for what the one before broke."""

    @property
    def label(self) -> str:
        return f"{self.kind} {' + '.join(self.victims)}".strip()


def whole(seed: int) -> list[Fault]:
    """Every fault of the table once, and what the seed chooses."""
    chance = random.Random(seed)
    doubles = [tuple(chance.sample(VICTIMS, 2)) for _ in range(DOUBLE_KILLS)]
    faults = [
        *(Fault(KILL, (victim,)) for victim in VICTIMS),
        *(Fault(PAUSE, (victim,), HELD_S) for victim in VICTIMS),
        *(Fault(DISCONNECT, (victim,), HELD_S) for victim in VICTIMS),
        Fault(FILL, ("s3",), HELD_S),
        *(Fault(RESTART, (victim,)) for victim in ("nats", "postgres")),
        Fault(DUPLICATES),
        Fault(REORDER),
        *(Fault(KILL, pair) for pair in doubles),
        Fault(STORM, parts=storm(chance)),
    ]
    return [msgspec.structs.replace(one, seed=chance.randrange(1 << 32)) for one in faults]


def storm(chance: random.Random) -> tuple[Fault, ...]:
    return tuple(drawn(chance) for _ in range(STORM_FAULTS))


def drawn(chance: random.Random) -> Fault:
    kind = chance.choice((KILL, PAUSE, DISCONNECT, RESTART))
    held_s = HELD_IN_STORM_S if kind in (PAUSE, DISCONNECT) else 0.0
    return Fault(kind, (chance.choice(VICTIMS),), held_s)


def only(faults: Iterable[Fault], wanted: str) -> list[Fault]:
    """Those of one kind or one victim, or the one of that label; all for ""."""
    return [f for f in faults if not wanted or wanted in (f.kind, f.label, *f.victims)]


def slices(records: int, faults: int, batch: int) -> list[int]:
    """Records to publish during each fault, whole batches, `records` or a few more in all."""
    batches = -(-records // batch)
    return [batch * (batches // faults + (n < batches % faults)) for n in range(faults)]
