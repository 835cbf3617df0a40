"""Every metric is documented, every alert is tried, and dashboards ask for what there is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from libs.settings import SERVICES
from tests.test_docs import rows, section

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
METRICS = (ROOT / "docs" / "metrics.md").read_text()
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


def documented(title: str) -> dict[str, list[str]]:
    """Metric -> its type and its labels, as docs/metrics.md says in one section."""
    found = rows(section(METRICS, title))
    return {name: [cells[0], *re.findall(r"`(\w+)`", cells[1])] for name, cells in found.items()}


@pytest.mark.parametrize("service", SERVICES)
def test_every_metric_of_a_service_is_documented_and_no_other(service: str) -> None:
    command = [sys.executable, "-c", EXPOSED, service]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == documented("Every service") | documented(service)
