"""Parts in, a version's artifacts out. Pure: the same parts and steps give the same bytes."""

import msgspec

from libs.contracts.artifacts import Blob, DatasetManifest, blob_of, canonical
from libs.contracts.pipeline import Pipeline
from services.preprocess import drift
from services.preprocess.domain import Part
from services.preprocess.statistics import describe
from services.preprocess.steps import clean, split
from services.preprocess.table import Table, Unusable, concatenate, read, write
from services.preprocess.transform import compile_graph, fit


class Built(msgspec.Struct, frozen=True):
    manifest: DatasetManifest
    blob: Blob
    """Of the manifest."""
    payloads: list[bytes]
    """Everything to store, the manifest last: it is there only when all it names is."""
    learned: drift.Counts
    """How the records that are new in this version fall into its own cells; {} if all are."""

    @property
    def rows(self) -> int:
        return sum(blob.rows for blob in self.manifest.splits.values())


def build(
    project: str, pipeline: Pipeline, parts: list[tuple[Part, bytes]], fresh_after: int
) -> Built:
    """`parts` in landing order. Raises `Unusable`, which names what is wrong with them."""
    schema, steps = pipeline.dataset.schema, pipeline.preprocess
    tables = [read(payload, schema) for _, payload in parts]
    if not sum(table.rows for table in tables):
        raise Unusable("dataset", f"nothing has landed in {pipeline.dataset.name!r} yet")
    cleaned = clean(concatenate(tables), schema, steps)
    in_test = split(cleaned.content, steps)
    train, test = cleaned.table.take(~in_test), cleaned.table.take(in_test)
    if not train.rows:
        raise Unusable("dataset", f"{cleaned.table.rows} clean records leave none to train on")
    fitted = fit(train, cleaned.schema, steps)
    transform = compile_graph(cleaned.schema, fitted)
    stored = {"train": write(train, cleaned.schema), "test": write(test, cleaned.schema)}
    manifest = DatasetManifest(
        project=project,
        dataset=pipeline.dataset.name,
        schema=cleaned.schema,
        steps=list(steps),
        parts=[part.digest for part, _ in parts],
        splits={
            "train": blob_of(stored["train"], train.rows),
            "test": blob_of(stored["test"], test.rows),
        },
        transform=blob_of(transform),
        fitted=msgspec.to_builtins(fitted),
        statistics=describe(train, cleaned.schema),
    )
    fresh = [t for t, (part, _) in zip(tables, parts, strict=True) if part.position > fresh_after]
    payload = canonical(manifest)
    learned = learned_from(fresh, manifest) if len(fresh) < len(tables) else {}
    return Built(manifest, blob_of(payload), [*stored.values(), transform, payload], learned)


def learned_from(fresh: list[Table], manifest: DatasetManifest) -> drift.Counts:
    if not fresh:
        return {}
    cells = drift.references(manifest.statistics, manifest.schema)
    return drift.count(concatenate(fresh).columns, manifest.schema, cells)
