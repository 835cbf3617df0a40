"""Real servers for every test: see `stack.testing`. Generated examples are the same in each run.
Spans are made as in a service, and go nowhere unless a test looks at them.
"""

import pytest
from hypothesis import HealthCheck, settings
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource

from libs.telemetry import Provider

settings.register_profile(
    "leptonic", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("leptonic")
trace.set_tracer_provider(Provider(Resource.create()))
pytest_plugins = ["stack.testing"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file of which one test starts a stack or Ray is slow as a whole: `make test` runs these one
    after the other, because three at once took more than the 60 s a start may take.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow") or starts_ray(item)}
    for item in items:
        if item.path in slow:
            item.add_marker(pytest.mark.slow)


def starts_ray(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "ray_folder" in item.fixturenames
