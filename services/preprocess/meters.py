"""Dataset versions and drift, as Prometheus reads them at `/metrics`."""

from prometheus_client import Counter, Gauge, Histogram

DATASET = ["project", "dataset"]
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900)
BUILD = Histogram(
    "leptonic_preprocess_build_seconds", "From parts to a version", DATASET, buckets=SECONDS
)
FAILURES = Counter(
    "leptonic_preprocess_build_failures",
    "Builds that data or steps made impossible",
    ["project", "pipeline"],
)
ROWS = Gauge("leptonic_preprocess_version_rows", "Rows of the newest version", DATASET)
DRIFT = Gauge(
    "leptonic_preprocess_drift_psi",
    "PSI of the feature that moved most in the last window judged",
    [*DATASET, "source"],
)
