"""What this replica should do about a deployment, and what a label says about an answer. Pure."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import structs

from libs.contracts.events import DeploymentUpdated, Observation, Target

ID_CHARACTERS_MAX = 256


class Plan(msgspec.Struct, frozen=True):
    """From what is loaded towards what is desired, in this order."""

    load: tuple[Target, ...] = ()
    route: dict[str, int] = {}
    """Version -> percent, once what can be loaded is loaded; {} serves nothing."""
    unload: tuple[str, ...] = ()
    complete: bool = True
    """The desired generation is what is routed."""


def plan(targets: Sequence[Target], loaded: Mapping[str, str], routed: Mapping[str, int]) -> Plan:
    """`loaded` is version -> manifest digest.

    Until every target is loaded the old route stays, so that a version which cannot be loaded
    takes nobody's answer away; with no old route those that are loaded share the traffic.
    """
    load = tuple(t for t in targets if loaded.get(str(t.number)) != t.digest)
    if not load:
        route = {str(t.number): t.percent for t in targets}
        return Plan(route=route, unload=tuple(n for n in loaded if n not in route))
    if any(routed.values()):
        return Plan(load=load, route=dict(routed), complete=False)
    missing = {t.number for t in load}
    route = {str(t.number): t.percent for t in targets if t.number not in missing}
    return Plan(load=load, route=route if any(route.values()) else {}, complete=False)


def replaced(
    targets: Sequence[Target], quarantined: Collection[str], before: Sequence[Target]
) -> list[Target]:
    """What to serve instead of `targets` when some are quarantined.

    The others among them take the traffic; when none is left, the newest of those that served
    `before` (newest first) and is not quarantined itself.
    """
    sound = [t for t in targets if str(t.number) not in quarantined]
    if any(t.percent for t in sound):
        return sound
    for target in before:
        if str(target.number) not in quarantined:
            return [structs.replace(target, percent=100)]
    return []


def is_newer(incoming: DeploymentUpdated, known: DeploymentUpdated | None) -> bool:
    """Generations only grow; events come in any order and more than once."""
    return known is None or incoming.generation > known.generation


def judge(label: Any, outputs: Mapping[str, Any]) -> tuple[int, int]:
    """(rows labelled, rows correct) of a joined feedback.

    A request of several rows takes a list of as many labels. Regression has no `label` output and
    so no correctness.
    """
    labels = label if isinstance(label, list) else [label]
    answers = outputs.get("label")
    if answers is None:
        return len(labels), 0
    if len(answers) != len(labels):
        return 0, 0
    return len(labels), sum(answer == given for answer, given in zip(answers, labels, strict=True))


def observations(
    desired: DeploymentUpdated, counts: Mapping[int, Observation], quarantined: Collection[str]
) -> list[Observation]:
    """One for every target, also for those nobody asked yet."""
    return [
        structs.replace(
            counts.get(t.number) or Observation(t.number, 0, 0),
            quarantined=True if str(t.number) in quarantined else msgspec.UNSET,
        )
        for t in desired.targets
    ]


def served_name(name: str, project: str) -> tuple[str, str]:
    """A name on the inference door -> (project, model): `digits`, or `other.digits`."""
    other, dot, model = name.rpartition(".")
    return (other, model) if dot else (project, name)


def is_id(request_id: str) -> bool:
    """Ids are the clients' own; they go into columns, spans and logs."""
    return 1 <= len(request_id) <= ID_CHARACTERS_MAX and request_id.isprintable()


def problem_of(request_id: str, label: Any) -> str:
    """Of a feedback that no request could have; "" for none."""
    if not is_id(request_id):
        return f"request_id: 1 to {ID_CHARACTERS_MAX} printable characters, got {len(request_id)}"
    if label is None:
        return "label: missing"
    return ""
