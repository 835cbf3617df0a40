"""What `kubectl apply -k` would send: a reader of the part of kustomize that our manifests use.

No package carries kustomize itself, so the manifests keep to this part: `namespace`, `resources`,
`components` and strategic-merge `patches` with a `target`. Anything else is an error.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "patches"}
MERGED_BY = {
    "containers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
"""Lists whose items are merged by this field; others are replaced. As in Kubernetes' own types."""
CLUSTER_WIDE = {"Namespace"}


def build(folder: Path) -> list[Object]:
    """Raises `ValueError` for what it does not know."""
    return kustomized(folder, [])


def kustomized(folder: Path, objects: list[Object]) -> list[Object]:
    """A component's patches see what was there before it; a base's only its own."""
    said = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(said) - KNOWN:
        raise ValueError(f"{folder}: {sorted(unknown)}")
    found = [*objects, *(one for name in said.get("resources", []) for one in read(folder / name))]
    for name in said.get("components", []):
        found = kustomized(folder / name, found)
    for patch in said.get("patches", []):
        found = list(patched(found, patch, folder))
    if namespace := said.get("namespace"):
        for one in found:
            if one["kind"] not in CLUSTER_WIDE:
                one["metadata"]["namespace"] = namespace
    return found


def read(path: Path) -> list[Object]:
    if path.is_dir():
        return kustomized(path, [])
    # Anchors repeat an object in one document; each gets its own copy.
    return [deepcopy(one) for one in yaml.safe_load_all(path.read_text())]


def patched(objects: list[Object], patch: Object, folder: Path) -> Iterable[Object]:
    text = patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text()
    change = yaml.safe_load(text)
    if patch.keys() - {"patch", "path", "target"} or patch["target"].keys() - {"kind", "name"}:
        raise ValueError(f"{folder}: {patch}")
    hits = [one for one in objects if is_target(one, patch["target"])]
    if not hits:
        raise ValueError(f"{folder}: nothing is {patch['target']}")
    for one in objects:
        if one not in hits:
            yield one
        elif change.get("$patch") != "delete":
            own = {"apiVersion", "kind", "metadata"}
            yield merged(one, {key: value for key, value in change.items() if key not in own})


def is_target(one: Object, target: Object) -> bool:
    return bool(
        re.fullmatch(target["kind"], one["kind"])
        and re.fullmatch(target.get("name", ".*"), one["metadata"]["name"])
    )


def merged(old: Object, change: Object) -> Object:
    """A strategic merge; `null` removes."""
    new = dict(old)
    for key, value in change.items():
        if value is None:
            new.pop(key, None)
        elif isinstance(value, dict):
            new[key] = merged(old.get(key, {}), value)
        elif isinstance(value, list) and key in MERGED_BY:
            new[key] = merged_lists(old.get(key, []), value, MERGED_BY[key])
        else:
            new[key] = deepcopy(value)
    return new


def merged_lists(old: list[Object], change: list[Object], by: str) -> list[Object]:
    items = {one[by]: one for one in old}
    for one in change:
        items[one[by]] = merged(items.get(one[by], {}), one)
    return list(items.values())
