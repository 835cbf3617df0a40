"""Every metric is documented, every alert is tried, and dashboards ask for what there is."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from leptonic import compose

from libs.settings import SERVICES
from services.inference.statistics import Statistics
from services.inference.tests import desk
from tests.running import running_stack, until
from tests.test_docs import rows, section

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
METRICS = (ROOT / "docs" / "metrics.md").read_text()
RULES = DEPLOY / "prometheus" / "rules.yml"
TRIED = DEPLOY / "prometheus" / "rules_test.yml"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
PART_OF = re.compile(r"_(bucket|count|sum)$")
NOT_OURS = re.compile(r"up|ALERTS|process_\w+")
OBJECT_STORE = "Every service but the scheduler"
TITLES = ("Every service", OBJECT_STORE, *SERVICES)
EXPOSED = """
import importlib, json, sys
from prometheus_client import REGISTRY
importlib.import_module(f"services.{sys.argv[1]}.app")
families = [one for one in REGISTRY.collect() if one.name.startswith("leptonic_")]
ending = {"counter": "_total"}
labels = {one.name: REGISTRY._names_to_collectors[one.name]._labelnames for one in families}
told = {one.name + ending.get(one.type, ""): [one.type, *labels[one.name]] for one in families}
print(json.dumps(told))
"""
"""What there is once the service is imported."""


def documented(title: str) -> dict[str, list[str]]:
    """Metric -> its type and its labels, as docs/metrics.md says in one section."""
    found = rows(section(METRICS, title))
    return {name: [cells[0], *re.findall(r"`(\w+)`", cells[1])] for name, cells in found.items()}


def documented_of(service: str) -> dict[str, list[str]]:
    shared = documented("Every service") | documented(service)
    return shared if service == "scheduler" else shared | documented(OBJECT_STORE)


def every_metric() -> set[str]:
    return {name for title in TITLES for name in documented(title)}


def all_rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in all_rules() if "alert" in rule]


def drawn() -> Iterator[str]:
    """Every expression of every dashboard, as Prometheus gets it."""
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            yield from (target["expr"] for target in panel.get("targets", []))
        yield from (one["expr"] for one in dashboard["annotations"]["list"])


@pytest.fixture(scope="module")
def promtool() -> str:
    done = subprocess.run(
        [ROOT / "scripts" / "promtool.sh"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"rules are not tried: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
async def test_every_metric_of_a_service_is_documented_and_no_other(service: str) -> None:
    exposed = told_of(service)
    if service == "inference":
        exposed |= await told_of_models()
    assert exposed == documented_of(service)


def told_of(service: str) -> dict[str, list[str]]:
    command = [sys.executable, "-c", EXPOSED, service]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    told: dict[str, list[str]] = json.loads(done.stdout)
    return told


async def told_of_models() -> dict[str, list[str]]:
    """What inference tells of its queues while it serves: collected when it is asked."""
    async with desk.opened() as made:
        await made.serve("double", desk.double())
        asked = desk.request("double", desk.row(1, 2), [1, 2])
        await made.stub.ModelInfer(asked)
        families = list(Statistics(made.endpoints).collect())
    ending = {"counter": "_total"}
    return {f.name + ending.get(f.type, ""): [f.type, *f._labelnames] for f in families}  # type: ignore[attr-defined]


def test_names_end_in_their_unit() -> None:
    units = {
        "counter": "total",
        "histogram": "seconds|bytes|messages|records|rows",
    }
    for title in TITLES:
        for name, (kind, *_) in documented(title).items():
            assert kind not in units or re.search(rf"_({units[kind]})$", name), name


def test_the_configuration_and_the_rules_are_valid(promtool: str) -> None:
    run(promtool, "check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_every_alert_does_what_its_cases_say(promtool: str) -> None:
    run(promtool, "test", "rules", TRIED)


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    fires: dict[str, set[bool]] = {alert["alert"]: set() for alert in alerts()}
    for case in yaml.safe_load(TRIED.read_text())["tests"]:
        for asked in case["promql_expr_test"]:
            (name,) = re.findall(r'alertname="(\w+)"', asked["expr"])
            fires[name].add(bool(asked["exp_samples"]))
    assert {name: seen for name, seen in fires.items() if seen != {True, False}} == {}


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket", "info"), alert["alert"]
        assert set(alert["annotations"]) == {"summary", "do"}, alert["alert"]


def test_every_alert_is_documented() -> None:
    described = rows(section(METRICS, "Alerts"))
    severities = {alert["alert"]: alert["labels"]["severity"] for alert in alerts()}
    assert {name: cells[0] for name, cells in described.items()} == severities


def test_dashboards_parse(promtool: str, tmp_path: Path) -> None:
    rules = [
        {"record": f"drawn:{number}", "expr": expr.replace("$__rate_interval", "1m")}
        for number, expr in enumerate(drawn())
    ]
    path = tmp_path / "drawn.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "drawn", "rules": rules}]}))
    run(promtool, "check", "rules", path)


def test_rules_and_dashboards_ask_for_metrics_that_exist() -> None:
    recorded = {rule["record"] for rule in all_rules() if "record" in rule}
    known = every_metric() | recorded
    asked = [*drawn(), *(rule["expr"] for rule in all_rules())]
    used = {name for expr in asked for name in names_of(expr)}
    assert not {name for name in used - known if not NOT_OURS.fullmatch(name)}
    assert {"leptonic_requests_total", "leptonic_request_seconds", "up"} <= used


def names_of(expr: str) -> set[str]:
    """The metrics of an expression: what is no string, label, function or word of the language."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"\{[^}]*\}", "{}", bare)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    found = re.findall(r"(?<![\w:$])([a-zA-Z_][\w:]*)(?!\s*\()(?![\w:])", bare)
    words = {"and", "or", "unless", "offset", "by", "sum", "max", "min", "count"}
    return {PART_OF.sub("", name) for name in found} - words


def test_every_service_is_scraped_where_it_answers() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (ours,) = [one for one in config["scrape_configs"] if one["job_name"] == "leptonic"]
    scraped = {one["names"][0]: one["port"] for one in ours["dns_sd_configs"]}
    said = dict(re.findall(r"\b([a-z]+)\s(8\d{3})\b", METRICS.split("\n## ")[0]))
    assert {name: str(port) for name, port in scraped.items() if name in SERVICES} == said


def test_pipelines_of_the_collector_use_what_is_defined() -> None:
    config = yaml.safe_load((DEPLOY / "otel" / "collector.yaml").read_text())
    used: dict[str, set[str]] = {"extensions": set(config["service"]["extensions"])}
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            used.setdefault(kind, set()).update(pipeline[kind])
        assert pipeline["processors"][0] == "memory_limiter"
    assert {kind: set(config[kind]) for kind in used} == used


def test_spans_reach_jaeger_and_our_own_receiver() -> None:
    config = yaml.safe_load((DEPLOY / "otel" / "collector.yaml").read_text())
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    sent = {one["endpoint"] for one in config["exporters"].values()}
    assert sent == {"jaeger:4317", "collector:4317"}
    assert set(config["service"]["pipelines"]) == {"traces"}


def test_the_containers_of_the_profile_read_what_is_here_and_stay_on_loopback() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    ours = {n: one for n, one in services.items() if one.get("profiles") == ["observability"]}
    assert set(ours) == {"otel-collector", "jaeger", "prometheus", "grafana"}
    for name, one in ours.items():
        mounted = [volume.split(":")[0] for volume in one.get("volumes", ())]
        assert all((ROOT / path).exists() for path in mounted if path.startswith("./")), name
        assert all(port.startswith("127.0.0.1:") for port in one.get("ports", ())), name
        assert "memory" in one["deploy"]["resources"]["limits"], name


@pytest.mark.slow
@pytest.mark.compose
async def test_prometheus_finds_every_container_and_evaluates_every_rule(tmp_path: Path) -> None:
    everyone = dict.fromkeys((*SERVICES, "collector"), "1")
    async with running_stack(tmp_path / "data", "compose") as stack:
        up = ("up", "-d", "--wait", "--no-build", "prometheus")
        await asyncio.to_thread(compose.docker, *up)
        url = f"http://127.0.0.1:{os.environ['STACK_PROMETHEUS_PORT']}/api/v1"

        async def scraped() -> bool:
            asked = {"query": 'up{job="leptonic"}'}
            answer = (await stack.http.get(f"{url}/query", params=asked)).json()["data"]["result"]
            return {one["metric"]["service"]: one["value"][1] for one in answer} == everyone

        async def evaluated() -> bool:
            groups = (await stack.http.get(f"{url}/rules")).json()["data"]["groups"]
            return {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}

        try:
            await until(scraped, "Prometheus does not scrape every container", 60)
            await until(evaluated, "a rule cannot be evaluated", 60)
        finally:
            down = ("--profile", "observability", "down", "--volumes", "--timeout", "5")
            await asyncio.to_thread(compose.docker, *down)
