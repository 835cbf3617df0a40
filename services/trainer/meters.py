"""How training goes, as Prometheus reads it at `/metrics`.

By pipeline and not by job: the last values stay to be read, and there are as many as pipelines.
"""

from time import perf_counter

from prometheus_client import Counter, Gauge, Histogram

from services.trainer.domain import Assignment, Progress

PIPELINE = ["project", "pipeline"]
EPOCH_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
RAY_UP = Gauge("leptonic_trainer_ray_up", "1 once Ray and its warm workers are there")
RUNNING = Gauge("leptonic_trainer_running_attempts", "Attempts that run on this node")
ATTEMPTS = Counter("leptonic_trainer_attempts", "Attempts that ended here", ["outcome"])
EPOCH = Gauge("leptonic_trainer_epoch", "Epochs done, of the last attempt", PIPELINE)
EPOCHS = Gauge("leptonic_trainer_epochs", "Epochs to do, of the last attempt", PIPELINE)
METRIC = Gauge(
    "leptonic_trainer_metric", "Loss and validation metrics after an epoch", [*PIPELINE, "metric"]
)
SAMPLES = Counter("leptonic_trainer_samples", "Rows trained on, each epoch again", PIPELINE)
SPEED = Gauge("leptonic_trainer_samples_per_second", "Of the last epoch", PIPELINE)
EPOCH_SECONDS = Histogram(
    "leptonic_trainer_epoch_seconds", "An epoch with its checkpoint", PIPELINE, buckets=EPOCH_S
)


class Training:
    """One attempt, epoch by epoch."""

    def __init__(self, assignment: Assignment) -> None:
        self.place = (assignment.project, assignment.spec.pipeline)
        self.since = perf_counter()

    def note(self, progress: Progress) -> None:
        now = perf_counter()
        seconds, self.since = now - self.since, now
        EPOCH.labels(*self.place).set(progress.epoch)
        EPOCHS.labels(*self.place).set(progress.epochs)
        for name, value in progress.metrics.items():
            METRIC.labels(*self.place, name).set(value)
        if progress.metrics:
            EPOCH_SECONDS.labels(*self.place).observe(seconds)
            SAMPLES.labels(*self.place).inc(progress.samples)
            SPEED.labels(*self.place).set(progress.samples / seconds)
