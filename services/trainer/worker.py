"""What one worker does with an attempt, in phases: load, fit, export, evaluate.

Knows object storage and PyTorch, and nothing of Ray: `ray_job.py` calls it in its actors.
"""

import asyncio
import importlib.metadata
import logging
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import msgspec
import numpy as np
import torch

from libs import telemetry
from libs.contracts.artifacts import Evaluation, Lineage, ModelManifest, TrainResult, canonical
from libs.objectstore import Corrupt, Missing, ObjectStore
from services.trainer import loop
from services.trainer.checkpoint import S3Checkpoints, last, unpack, weights
from services.trainer.dataset import (
    Snapshot,
    Split,
    classes_of,
    features_of,
    indices_of,
    snapshot_of,
)
from services.trainer.domain import (
    Assignment,
    Champion,
    Lost,
    Outcome,
    Progress,
    TrainSpec,
    Unusable,
    is_own_code,
)
from services.trainer.evaluation import Served, comparable, measure
from services.trainer.export import check_same, served_graph
from services.trainer.gang import is_peer_lost
from services.trainer.recipes import Recipe, recipe_of, source_digest

log = logging.getLogger(__name__)
GONE = (ConnectionError, MemoryError, Missing)
"""What another worker, node or try may have again."""
LIBRARIES = ("torch", "numpy", "onnx", "onnxruntime", "safetensors")


@dataclass(frozen=True)
class Loaded:
    """A dataset version, ready to train on."""

    snapshot: Snapshot
    task: loop.Task
    classes: np.ndarray | None


class Blamed:
    """Says whose an error in the block is: what went away is `Lost`, anything else the user's.

    Where the user's own code runs, every kind of error can come out.
    """

    def __init__(self) -> None:
        self.place = "before the first epoch"

    def __enter__(self) -> "Blamed":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, Unusable | Lost):
            return
        reason = f"{type(error).__name__}: {error}, {self.place}"
        log.warning("%s", reason, exc_info=error)
        passes = isinstance(error, GONE) or is_peer_lost(error)
        raise (Lost if passes else Unusable)(reason) from error


def load(objects: ObjectStore, spec: TrainSpec, place: str) -> Loaded:
    attributes = {"dataset.digest": spec.dataset_digest}
    with telemetry.span("load", parent=place, attributes=attributes) as span:
        try:
            snapshot = asyncio.run(snapshot_of(objects, spec.dataset_digest))
        except (Missing, Corrupt) as error:
            raise Unusable(f"dataset {spec.dataset_digest}: {error}") from error
        span.set_attribute("dataset.rows", len(snapshot.train) + len(snapshot.test))
        classes = classes_of(snapshot.train.label) if is_classification(spec) else None
        task = loop.Task(
            recipe=recipe_of(spec.train),
            outputs=1 if classes is None else len(classes),
            features=torch.from_numpy(features_of(snapshot.transform, snapshot.train)),
            targets=torch.from_numpy(targets_of(snapshot.train, classes)),
            validation_features=torch.from_numpy(features_of(snapshot.transform, snapshot.test)),
            validation_targets=targets_of(snapshot.test, classes),
            seed=spec.train.seed,
        )
        return Loaded(snapshot, task, classes)


def is_classification(spec: TrainSpec) -> bool:
    return spec.train.task == "classification"


def targets_of(split: Split, classes: np.ndarray | None) -> np.ndarray:
    return split.label.astype(np.float32) if classes is None else indices_of(split.label, classes)


def fit(
    assignment: Assignment, loaded: Loaded, objects: ObjectStore, world: loop.World, place: str
) -> Iterator[Progress]:
    """The loop over this gang; `world` is `loop.Alone` or `gang.Gloo`."""
    checkpoints = S3Checkpoints(objects, assignment.checkpoints, world.agree)
    attributes = {"rank": world.rank, "workers": world.size}
    with telemetry.span("fit", parent=place, attributes=attributes), Blamed() as blamed:
        for progress in loop.train(loaded.task, world, checkpoints):
            blamed.place = f"in epoch {progress.epoch + 1}"
            yield progress


def finish(
    assignment: Assignment, loaded: Loaded, objects: ObjectStore, outcome: Outcome, place: str
) -> TrainResult:
    """Last checkpoint -> artifacts in object storage, measured."""
    spec, test = assignment.spec, loaded.snapshot.test
    with telemetry.span("export", parent=place):
        module = trained(assignment, loaded, objects)
        graph = export(loaded, module)
    with telemetry.span("evaluate", parent=place) as span:
        served, recipe = Served(graph), loaded.task.recipe
        metrics = measure(served, test, recipe)
        check_gates(spec, metrics)
        against = measure_champion(objects, outcome.champion, served, test, recipe)
        span.set_attributes({f"metric.{name}": value for name, value in metrics.items()})
    manifest = ModelManifest(
        model=spec.model,
        weights=asyncio.run(objects.put_blob(weights(module))),
        graph=asyncio.run(objects.put_blob(graph)),
        transform=loaded.snapshot.manifest.transform,
        signature=served.signature(list(loaded.snapshot.train.columns)),
        metrics=metrics,
        lineage=lineage_of(spec, recipe, assignment.workers),
    )
    return TrainResult(
        manifest=asyncio.run(objects.put_blob(canonical(manifest))),
        evaluation=Evaluation(
            dataset_digest=spec.dataset_digest,
            metrics=metrics,
            champion=outcome.champion.number if outcome.champion else None,
            champion_metrics=against,
        ),
        seconds=outcome.seconds,
        resumed_from_epoch=outcome.resumed_from_epoch,
    )


def export(loaded: Loaded, module: torch.nn.Module) -> bytes:
    """The served graph, which gives what the module gives."""
    example = np.resize(loaded.task.features.numpy(), (2, *loaded.task.features.shape[1:]))
    graph = served_graph(loaded.snapshot.transform, module, example, loaded.classes)
    predicted = Served(graph).predicted(loaded.snapshot.test)
    features = loaded.task.validation_features.numpy()
    check_same(module, features, predicted, loaded.classes is not None)
    return graph


def check_gates(spec: TrainSpec, metrics: dict[str, float]) -> None:
    for name in spec.metrics:
        if name not in metrics:
            known = ", ".join(sorted(metrics))
            raise Unusable(f"$.gates: {name!r} is not measured by the recipe, only {known}")


def trained(assignment: Assignment, loaded: Loaded, objects: ObjectStore) -> torch.nn.Module:
    module = loop.build(loaded.task)
    checkpoints = S3Checkpoints(objects, assignment.checkpoints, lambda epoch: epoch)
    epoch = last(asyncio.run(objects.list(assignment.checkpoints)))
    if epoch != loaded.task.recipe.params.epochs:
        raise Lost(f"the last checkpoint of {assignment.job} is of epoch {epoch}")
    optimizer = loaded.task.recipe.optimizer(module)
    unpack(asyncio.run(objects.get(checkpoints.key(epoch))), module, optimizer)
    return module.eval()


def measure_champion(
    objects: ObjectStore,
    champion: Champion | None,
    candidate: Served,
    test: Split,
    recipe: Recipe,
) -> dict[str, float]:
    """{} without a champion, or with one that takes other columns."""
    if champion is None:
        return {}
    serving = Served(asyncio.run(objects.get_blob(champion.graph)))
    return measure(serving, test, recipe) if comparable(candidate, serving) else {}


def lineage_of(spec: TrainSpec, recipe: Recipe, workers: int) -> Lineage:
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    libraries["python"] = platform.python_version()
    if is_own_code(spec.train.recipe):
        libraries[spec.train.recipe] = f"sha256:{source_digest(recipe)}"
    return Lineage(
        dataset=spec.dataset,
        dataset_version=spec.dataset_version,
        dataset_digest=spec.dataset_digest,
        pipeline=spec.pipeline,
        revision=spec.revision,
        recipe=spec.train.recipe,
        params=msgspec.to_builtins(recipe.params),
        seed=spec.train.seed,
        workers=workers,
        libraries=libraries,
    )
