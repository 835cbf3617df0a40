"""compose.yaml and .env.example against the code; the containers run in test_containers.py."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from leptonic.compose import DOORS

from libs.doors.healthy import READY
from libs.settings import SERVICES, variables

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "compose.yaml").read_text()
REPLICAS = (ROOT / "compose.replicas.yaml").read_text()
BALANCER = (ROOT / "deploy" / "compose" / "haproxy.cfg").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
LINE = re.compile(r"^#?((?:STACK|LEPTONIC)_\w+)=(.*)$", re.MULTILINE)
DEFAULT = re.compile(r"\$\{(\w+):-([^}]*)\}")
CORE_MAX = 10


def listed() -> dict[str, str]:
    """Variable -> default, as .env.example says."""
    return dict(LINE.findall(EXAMPLE))


def settings() -> dict[str, str]:
    """What may be set of the services: neither their ports inside nor the address they bind."""
    found: dict[str, str] = {}
    for service in SERVICES:
        kind = importlib.import_module(f"services.{service}.app").Settings
        found |= {name: str(field.default) for name, field in variables(kind, service).items()}
    fixed = {name for name in found if name.endswith("_PORT")} | {"LEPTONIC_HOST"}
    return {name: default for name, default in found.items() if name not in fixed}


def core() -> dict[str, Any]:
    return {
        name: one
        for name, one in COMPOSE["services"].items()
        if "profiles" not in one and name != "secrets"
    }


def test_the_example_lists_every_setting_with_its_default_and_nothing_else() -> None:
    assert listed() == {**settings(), **dict(DEFAULT.findall(TEXT + REPLICAS))}


def test_the_example_changes_nothing_as_it_is() -> None:
    assert all(line.startswith("#") for line in EXAMPLE.splitlines() if line)


def test_the_core_has_at_most_ten_containers() -> None:
    assert len(core()) <= CORE_MAX
    assert set(SERVICES) <= set(core())


def test_every_image_is_pinned() -> None:
    images = [one["image"] for one in COMPOSE["services"].values()]
    for image in [DEFAULT.sub(r"\2", image) for image in images]:
        name, _, tag = image.partition(":")
        assert tag, f"{name} has no tag"
        assert tag != "latest", image


def test_every_setting_a_container_gets_is_one() -> None:
    known = settings().keys() | {"LEPTONIC_HOST", "LEPTONIC_SECRETS_DIR"}
    for name in SERVICES:
        given = COMPOSE["services"][name]["environment"]
        assert given.keys() <= known, name


def test_every_door_is_published_on_loopback_unless_told_otherwise() -> None:
    published = [
        port.removeprefix("${STACK_BIND:-127.0.0.1}:")
        for one in core().values()
        for port in one.get("ports", ())
    ]
    assert all(port.startswith("${STACK_") for port in published), published
    inside = {int(port.rpartition(":")[2]) for port in published}
    assert inside >= {port for _, port in DOORS.values()}


def test_the_balancer_publishes_every_door_of_the_services() -> None:
    """In place of the services, on the same ports."""
    published = [port for name in SERVICES for port in COMPOSE["services"][name]["ports"]]
    assert re.findall(r"- (\$\{STACK_BIND.*)", REPLICAS) == sorted(published, key=REPLICAS.index)
    inside = {port.rpartition(":")[2] for port in published}
    assert set(re.findall(r"^  bind :(\d+)$", BALANCER, re.MULTILINE)) == inside | {"8404"}
    checked = re.findall(r"^  server-template (\w+) 3 \w+:\d+ port (\d+)$", BALANCER, re.MULTILINE)
    assert set(checked) == {(name, str(READY[name][0])) for name in SERVICES}
    assert len(checked) == len(inside)
    for name in SERVICES:
        assert f"  {name}: {{<<: *behind, ports: !reset []}}" in REPLICAS


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_healthy_when_its_service_is_ready(service: str) -> None:
    kind = importlib.import_module(f"services.{service}.app").Settings
    port, path = READY[service]
    assert port == kind().http_port
    assert path == ("/v2/health/ready" if service == "inference" else "/health/ready")


@pytest.mark.parametrize("name", [*SERVICES, "collector"])
def test_our_containers_may_do_little(name: str) -> None:
    one = COMPOSE["services"][name]
    assert one["read_only"]
    assert one["cap_drop"] == ["ALL"]
    assert one["security_opt"] == ["no-new-privileges:true"]
    assert "memory" in one["deploy"]["resources"]["limits"]
    assert "USER 10001" in (ROOT / "Dockerfile").read_text()
