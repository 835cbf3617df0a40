"""Real servers for every test: see `stack.testing`. Generated examples are the same in each run."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "leptonic", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("leptonic")
pytest_plugins = ["stack.testing"]
