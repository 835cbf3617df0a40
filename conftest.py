"""Real servers for every test: see `stack.testing`. Generated examples are the same in each run.
Spans are made as in a service, and go nowhere unless a test looks at them.
"""

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
