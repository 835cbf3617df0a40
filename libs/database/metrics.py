"""The outbox, as Prometheus reads it at `/metrics`."""

from prometheus_client import Counter, Gauge

OUTBOX = Gauge("leptonic_outbox_events", "Events committed and not yet published")
PUBLISHED = Counter("leptonic_events_published", "Events that left by the outbox", ["type"])
