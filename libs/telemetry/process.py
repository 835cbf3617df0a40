"""Who this process is, in its metrics."""

from prometheus_client import Gauge, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]
VERSION = "0.1.0"
"""Of the platform: what pyproject.toml says."""
BUILD_INFO = Gauge("leptonic_build_info", "1; which release runs", ["service", "version"])
names: list[str] = []
"""The last one is in force: a process is one service, a test may be several."""


def identify(name: str) -> None:
    names.append(name)
    BUILD_INFO.labels(name, VERSION).set(1)


def service() -> str:
    """The name given to `telemetry.start`; "" before."""
    return names[-1] if names else ""
