"""What ingest counts, as Prometheus reads it at `/metrics`."""

from prometheus_client import Counter, Histogram

SIZES = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576)
BYTES = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28)
PLACE = ("project", "dataset")
LANDED = Counter("leptonic_ingest_records_landed", "Records that are durable in a part", PLACE)
REFUSED = Counter("leptonic_ingest_records_refused", "Records refused or dead-lettered", PLACE)
DUPLICATES = Counter("leptonic_ingest_duplicates", "Messages with an id seen before", PLACE)
PARTS = Counter("leptonic_ingest_parts", "Parquet parts landed", PLACE)
BATCH_MESSAGES = Histogram("leptonic_ingest_batch_messages", "Messages of a batch", buckets=SIZES)
BATCH_RECORDS = Histogram("leptonic_ingest_batch_records", "Records of a part", buckets=SIZES)
PART_BYTES = Histogram("leptonic_ingest_part_bytes", "Size of a part in S3", buckets=BYTES)
