"""What ingest counts, as Prometheus reads it at `/metrics`."""

from prometheus_client import Counter, Gauge, Histogram

PLACE = ("project", "dataset")
LANDED = Counter("leptonic_ingest_records_landed", "Records that are durable in a part", PLACE)
REFUSED = Counter("leptonic_ingest_records_refused", "Records refused or dead-lettered", PLACE)
DUPLICATES = Counter("leptonic_ingest_duplicates", "Messages with an id seen before", PLACE)
PARTS = Counter("leptonic_ingest_parts", "Parquet parts landed", PLACE)
LANDING_SECONDS = Histogram(
    "leptonic_ingest_landing_seconds", "From a batch fetched to its part committed"
)
LAG = Gauge("leptonic_ingest_lag_messages", "Messages of RECORDS not yet acked")
