"""The manifests: as Kubernetes wants them, and as the services, the bus and compose are."""

import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import msgspec
import prometheus_client
import pytest
import yaml
from starlette.routing import Route

from libs import settings
from libs.bus import STREAMS
from libs.doors.serve import DRAIN_S, http_app
from services.inference.endpoints import Endpoints
from services.inference.openapi import document
from services.inference.statistics import Statistics
from services.preprocess.request_log import DURABLE
from tests.manifests import build, is_target
from tests.network import End, allowed

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("complete", "production")
KUBERNETES = ("1.30", "1.37")
"""The oldest that README.md says, and the newest whose schemas there are."""
SCHEMAS = yaml.safe_load(Path(__file__).with_name("custom_resources.yaml").read_text())
COMPOSE = (ROOT / "compose.yaml").read_text()
IMAGES = dict(re.findall(r"^  (\w+):\n(?:    .*\n)*?    image: (.+)$", COMPOSE, re.MULTILINE))
"""Service -> image, as compose runs it where nothing is set."""
NAME = "app.kubernetes.io/name"
Object = dict[str, Any]
CONSUMERS = {("RECORDS", "ingest"), ("EVENTS", "preprocess"), ("REQUESTS", DURABLE)}
SERVERS = {"nats": 4222, "postgres": 5432, "s3": 9000, "collector": 4317}
CLIENT = End({"leptonic.ai/client": "true"}, {})
STRANGER = End({}, {})
PROMETHEUS = End({}, {}, {"kubernetes.io/metadata.name": "monitoring"})


@pytest.fixture(params=OVERLAYS, scope="module")
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return build(FOLDER / "overlays" / request.param)


@pytest.fixture(scope="module")
def complete() -> list[Object]:
    return build(FOLDER / "overlays" / "complete")


@pytest.fixture(scope="module")
def production() -> list[Object]:
    return build(FOLDER / "overlays" / "production")


@pytest.fixture(scope="module")
def secret() -> Object:
    """What secret.sh prints."""
    said = subprocess.run([FOLDER / "secret.sh"], capture_output=True, check=True, text=True)
    return dict(yaml.safe_load(said.stdout))


def of_kind(objects: list[Object], kind: str) -> dict[str, Object]:
    return {one["metadata"]["name"]: one for one in objects if is_target(one, {"kind": kind})}


def templates(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """(name, pod template) of everything that starts pods."""
    for one in objects:
        spec = one.get("spec", {})
        if "template" in spec:
            yield one["metadata"]["name"], spec["template"]
        if one["kind"] == "RayCluster":
            yield "trainer", spec["headGroupSpec"]["template"]
            for group in spec["workerGroupSpecs"]:
                yield group["template"]["metadata"]["labels"][NAME], group["template"]


def container_of(template: Object) -> Object:
    (container,) = template["spec"]["containers"]
    return dict(container)


def ports_of(template: Object) -> dict[str, int]:
    return {one["name"]: one["containerPort"] for one in container_of(template)["ports"]}


def ends(objects: list[Object]) -> dict[str, End]:
    return {name: End(one["metadata"]["labels"], ports_of(one)) for name, one in templates(objects)}


def settings_of(service: str) -> Any:
    return importlib.import_module(f"services.{service}.app").Settings


@pytest.mark.parametrize("release", KUBERNETES)
def test_every_object_is_what_its_schema_says(
    release: str, complete: list[Object], production: list[Object], secret: Object
) -> None:
    new = [one for one in production if one not in complete]
    for one in [*complete, *new, secret]:
        if schema := SCHEMAS.get(one["kind"]):
            jsonschema.validate(one["spec"], schema)
        else:
            kubernetes_validate.validate(one, release, strict=True)
    for name, template in templates(list(of_kind(production, "RayCluster").values())):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}}
        kubernetes_validate.validate({**pod, "template": template}, release, strict=True)


def test_names_are_given_once(objects: list[Object]) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same(overlay: str) -> None:
    """Where there is a kubectl: our reader agrees with the real one."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    folder = FOLDER / "overlays" / overlay
    command = ["kubectl", "kustomize", str(folder)]
    said = subprocess.run(command, capture_output=True, check=True, text=True)
    real = [normal(one) for one in yaml.safe_load_all(said.stdout)]
    ours = [normal(one) for one in build(folder)]
    assert sorted(ours, key=str) == sorted(real, key=str)


def normal(value: Any) -> Any:
    """Without the order of keys and of merged lists."""
    if isinstance(value, dict):
        return {key: normal(value[key]) for key in sorted(value)}
    return sorted(map(normal, value), key=str) if isinstance(value, list) else value


def test_what_runs_is_what_compose_runs(objects: list[Object]) -> None:
    for name, template in templates(objects):
        image = IMAGES["trainer" if name == "ray-worker" else name]
        assert container_of(template)["image"] == re.sub(r"\$\{\w+:-(.*)\}", r"\1", image)
    assert {name for name, _ in templates(objects)} >= set(settings.SERVICES)


def test_every_pod_is_confined(objects: list[Object]) -> None:
    for name, template in templates(objects):
        pod, container = template["spec"], container_of(template)
        assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False, name
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert "memory" in container["resources"]["limits"], name
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}, name
        assert "readinessProbe" in container, name


def test_selectors_choose_what_they_mean(objects: list[Object]) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in templates(objects)}
    for one in objects:
        spec, name = one.get("spec", {}), one["metadata"]["name"]
        if one["kind"] in ("Deployment", "StatefulSet"):
            assert spec["selector"]["matchLabels"].items() <= labels[name].items()
        if one["kind"] == "Service":
            assert [n for n, has in labels.items() if spec["selector"].items() <= has.items()] == [
                name
            ]
    (budget,) = of_kind(objects, "PodDisruptionBudget").values()
    (rule,) = budget["spec"]["selector"]["matchExpressions"]
    single = {
        n for n, one in of_kind(objects, "Deployment").items() if one["spec"].get("replicas") == 1
    }
    assert set(rule["values"]) == set(settings.SERVICES) - single - {"trainer"}


def test_services_lead_to_ports_that_are_open(objects: list[Object]) -> None:
    pods = {name: ports_of(template) for name, template in templates(objects)}
    for name, service in of_kind(objects, "Service").items():
        for port in service["spec"]["ports"]:
            assert pods[name][port["targetPort"]] == port["port"], name


@pytest.mark.parametrize("service", settings.SERVICES)
def test_ports_are_those_the_service_opens(service: str, objects: list[Object]) -> None:
    doors = dict(templates(objects))[service]
    kind = settings_of(service)
    opened = {
        field.name.removesuffix("_port"): field.default
        for field in msgspec.structs.fields(kind)
        if field.name.endswith("_port") and field.name != "ray_port"
    }
    assert opened.items() <= ports_of(doors).items()
    others = {name: port for name, port in ports_of(doors).items() if name not in opened}
    assert others in ({}, {"gcs-server": getattr(kind(), "ray_port", None)})


def test_probes_ask_what_is_answered(objects: list[Object]) -> None:
    async def ready() -> bool:
        return True

    every = {route.path for route in http_app("", [], ready).routes if isinstance(route, Route)}
    oip = set(document(asks_for_token=False)["paths"])
    for name, template in templates(objects):
        if name in SERVERS:
            continue
        container, answered = container_of(template), oip if name == "inference" else every
        for probe, end in (("livenessProbe", "/live"), ("readinessProbe", "/ready")):
            asked = container[probe]["httpGet"]
            assert asked["port"] == "http"
            assert asked["path"] in answered, name
            assert asked["path"].endswith(end), name
        assert container["startupProbe"]["httpGet"] == {"port": "http", "path": "/health/live"}
        assert "/health/live" in every


def environment(objects: list[Object], secret: Object, template: Object) -> dict[str, str]:
    """What the container of a pod finds."""
    maps = of_kind(objects, "ConfigMap")
    found: dict[str, str] = {}
    for source in container_of(template).get("envFrom", []):
        if "configMapRef" in source:
            found |= maps[source["configMapRef"]["name"]]["data"]
        else:
            assert source["secretRef"]["name"] == secret["metadata"]["name"]
            found |= secret["stringData"]
    for one in container_of(template).get("env", []):
        found[one["name"]] = one.get("value") or given(one["valueFrom"], secret)
    return found


def given(source: Object, secret: Object) -> str:
    """What Kubernetes puts in."""
    if "secretKeyRef" in source:
        return str(secret["stringData"][source["secretKeyRef"]["key"]])
    return "127.0.0.1" if "fieldRef" in source else "2000"


def test_settings_are_those_the_services_know(objects: list[Object], secret: Object) -> None:
    for name, template in templates(objects):
        found = environment(objects, secret, template)
        if name not in SERVERS:
            service = "trainer" if name == "ray-worker" else name
            assert settings.load(settings_of(service), service, found).host == "0.0.0.0"  # noqa: S104 - a pod's own
    known = {v for s in settings.SERVICES for v in settings.variables(settings_of(s), s)}
    written = re.findall(r"LEPTONIC_[A-Z0-9_]+", yaml.safe_dump_all([*objects, secret]))
    assert set(written) <= known


def test_a_replica_says_an_address_that_other_pods_reach(
    objects: list[Object], secret: Object
) -> None:
    """A pod has a name of its own, which nobody resolves."""
    found = environment(objects, secret, dict(templates(objects))["inference"])
    assert found["LEPTONIC_INFERENCE_GRPC_ADDRESS"] == "$(POD_IP):8001"
    assert found["POD_IP"] == "127.0.0.1", "of the pod's status"


def test_addresses_are_services(complete: list[Object], secret: Object) -> None:
    data = of_kind(complete, "ConfigMap")["leptonic"]["data"].values()
    addresses = {tuple(one.removeprefix("nats://").split(":")) for one in data if ":" in one}
    addresses.add(
        (secret["stringData"]["LEPTONIC_POSTGRES_DSN"].split()[0][len("host=") :], "5432")
    )
    open_ports = {
        (name, str(port["port"]))
        for name, service in of_kind(complete, "Service").items()
        for port in service["spec"]["ports"]
    }
    assert addresses <= open_ports
    assert {name for name, _ in addresses} == {*SERVERS, "registry", "ingest"}


@pytest.mark.parametrize("service", settings.SERVICES)
def test_the_network_lets_every_step_of_the_loop_through(
    service: str, complete: list[Object], production: list[Object]
) -> None:
    pods, policies = ends(complete), list(of_kind(complete, "NetworkPolicy").values())
    for server, port in SERVERS.items():
        assert allowed(policies, pods[service], pods[server], port), (service, server)
    for port in pods[service].ports.values():
        assert allowed(policies, CLIENT, pods[service], port)
        assert not allowed(policies, STRANGER, pods[service], port)
    if service in ("trainer", "inference"):
        assert allowed(policies, pods[service], pods["registry"], pods["registry"].ports["grpc"])
    assert not allowed(policies, pods["ingest"], pods["scheduler"], 8014)
    assert not allowed(policies, CLIENT, pods["postgres"], 5432)
    assert allowed(policies, CLIENT, pods["nats"], 4222)
    pods, policies = ends(production), list(of_kind(production, "NetworkPolicy").values())
    assert allowed(policies, PROMETHEUS, pods[service], pods[service].ports["http"])
    assert not allowed(policies, PROMETHEUS, pods[service], pods[service].ports["grpc"])


def test_ray_nodes_reach_each_other_and_nobody_else_reaches_them(production: list[Object]) -> None:
    pods, policies = ends(production), list(of_kind(production, "NetworkPolicy").values())
    for port in (6379, 40_000):
        assert allowed(policies, pods["ray-worker"], pods["trainer"], port)
        assert allowed(policies, pods["trainer"], pods["ray-worker"], port)
        assert allowed(policies, pods["ray-worker"], pods["ray-worker"], port)
        assert not allowed(policies, pods["ingest"], pods["ray-worker"], port)
    (cluster,) = of_kind(production, "RayCluster").values()
    (group,) = cluster["spec"]["workerGroupSpecs"]
    values = {one["name"]: one.get("value") for one in container_of(group["template"])["env"]}
    port = ports_of(cluster["spec"]["headGroupSpec"]["template"])["gcs-server"]
    service = f"{cluster['metadata']['name']}-head-svc"  # KubeRay makes it
    assert values["LEPTONIC_TRAINER_RAY_HEAD"] == f"{service}:{port}"
    assert cluster["spec"]["rayVersion"] == version("ray")
    assert not [
        one for one in production if is_target(one, {"kind": "Deployment", "name": "trainer"})
    ]


def test_what_is_scaled_exists_and_is_scaled_by_what_exists(production: list[Object]) -> None:
    deployments, asked = of_kind(production, "Deployment"), set()
    for scaled in of_kind(production, "ScaledObject").values():
        target = deployments[scaled["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in target["spec"], "KEDA and kubectl would take turns"
        for trigger in scaled["spec"]["triggers"]:
            told = trigger["metadata"]
            if trigger["type"] == "nats-jetstream":
                asked.add((told["stream"], told["consumer"]))
            else:
                names = set(re.findall(r"leptonic_\w+", told["query"]))
                assert {name.removesuffix("_total") for name in names} <= metrics()
    assert asked == CONSUMERS
    assert {stream for stream, _ in asked} <= {stream.name for stream in STREAMS}
    landing = (ROOT / "services" / "ingest" / "landing.py").read_text()
    assert re.search(r'subscribe\(\s*RECORDS, "?(ingest|CONSUMER)', landing)


def metrics() -> set[str]:
    nobody: Any = None
    of_models = Statistics(Endpoints(nobody, nobody, "default")).collect()
    return {one.name for one in (*prometheus_client.REGISTRY.collect(), *of_models)}


def test_a_rollout_keeps_every_door_open(objects: list[Object]) -> None:
    for name, one in of_kind(objects, "Deployment").items():
        assert one["spec"]["strategy"] == {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
        pod = one["spec"]["template"]["spec"]
        wait_s = container_of(one["spec"]["template"])["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain_s = float(of_kind(objects, "ConfigMap")["leptonic"]["data"]["LEPTONIC_DRAIN_S"])
        assert pod["terminationGracePeriodSeconds"] >= wait_s + 2 * drain_s + 2 * DRAIN_S, name


def test_what_the_reader_does_not_know_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namePrefix: my-")
    with pytest.raises(ValueError, match="namePrefix"):
        build(tmp_path)
