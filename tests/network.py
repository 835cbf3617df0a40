"""Whether network policies let one pod speak to another, as Kubernetes decides it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

Object = dict[str, Any]


class End(NamedTuple):
    """A pod, or somebody in another namespace."""

    labels: dict[str, str]
    ports: dict[str, int]
    """Of its containers, by name."""
    namespace: dict[str, str] | None = None
    """Another namespace's labels."""


def allowed(policies: list[Object], source: End, target: End, port: int) -> bool:
    """Both sides have to."""
    leaves = permits(policies, "Egress", source, target, target, port)
    return leaves and permits(policies, "Ingress", target, source, target, port)


def permits(
    policies: list[Object], direction: str, subject: End, peer: End, target: End, port: int
) -> bool:
    """Without a policy for the subject everything is permitted."""
    if subject.namespace is not None:
        return True
    own = [
        one["spec"]
        for one in policies
        if direction in one["spec"]["policyTypes"]
        and selects(one["spec"]["podSelector"], subject.labels)
    ]
    side = "from" if direction == "Ingress" else "to"
    rules = [rule for spec in own for rule in spec.get(direction.lower(), [])]
    return not own or any(
        any(is_peer(one, peer) for one in rule.get(side, [{}]))
        and port in (numbers(rule, target) or [port])
        for rule in rules
    )


def numbers(rule: Object, target: End) -> list[int | None]:
    """Ports a rule names; a name that the target has not is none of its ports."""
    ports = [one["port"] for one in rule.get("ports", [])]
    return [target.ports.get(one) if isinstance(one, str) else one for one in ports]


def is_peer(peer: Object, end: End) -> bool:
    if not peer:
        return True
    if "namespaceSelector" in peer:
        assert "podSelector" not in peer
        return end.namespace is not None and selects(peer["namespaceSelector"], end.namespace)
    return end.namespace is None and selects(peer["podSelector"], end.labels)


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """`matchLabels` and `In`, which is all we use."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}, selector
    return all(
        labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()
    ) and all(labels.get(one["key"]) in one["values"] for one in expressions(selector))


def expressions(selector: Object) -> Iterator[Object]:
    for one in selector.get("matchExpressions", []):
        assert one["operator"] == "In", one
        yield one
