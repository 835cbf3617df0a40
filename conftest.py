"""Real servers for every test: see `stack.testing`. Generated examples are the same in each run.
Spans are made as in a service, and go nowhere unless a test looks at them.
"""

import pytest
from hypothesis import HealthCheck, settings
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from libs.telemetry import ChosenIds

settings.register_profile(
    "leptonic", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("leptonic")
trace.set_tracer_provider(TracerProvider(id_generator=ChosenIds()))
pytest_plugins = ["stack.testing"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests are shared out a file stays whole, and those that start stacks or Ray run one
    after the other: three at once on two busy cores took more than the 60 s a start may take."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        group = "slow" if item.path in slow else item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
