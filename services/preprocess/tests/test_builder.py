"""A version is named by its content: same parts and steps, same digest, nothing lost."""

import io
import random

import msgspec
import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
import pytest

from libs.contracts.artifacts import DatasetManifest, digest_of
from libs.contracts.pipeline import Field
from services.preprocess.builder import Built, build
from services.preprocess.domain import Part, due, is_news, landing_order, rows_after
from services.preprocess.table import Unusable
from services.preprocess.tests.digits import LABELS, PIXELS, part, pipeline

PARTS = [part(start, start + 100, position=start // 100 + 1) for start in range(0, 500, 100)]


def built_from(parts: list[tuple[Part, bytes]]) -> Built:
    payloads = {one.digest: payload for one, payload in parts}
    ordered = landing_order([one for one, _ in parts])
    return build("default", pipeline(), [(one, payloads[one.digest]) for one in ordered], 0)


def test_the_order_of_arrival_does_not_matter() -> None:
    shuffled = list(PARTS)
    random.Random(3).shuffle(shuffled)
    one, other = built_from(PARTS), built_from(shuffled)
    assert one.blob == other.blob
    assert one.payloads == other.payloads


def test_other_parts_or_steps_are_another_version() -> None:
    whole = built_from(PARTS).blob.digest
    assert built_from(PARTS[:-1]).blob.digest != whole
    other = pipeline(preprocess=[{"split": {"test": 0.2, "seed": 8}}])
    assert build("default", other, PARTS, 0).blob.digest != whole


def test_every_record_is_in_one_split_where_it_can_be_accounted_for() -> None:
    built = built_from(PARTS)
    tables = [pq.read_table(io.BytesIO(payload)) for payload in built.payloads[:2]]
    places = [set(table["_sequence"].to_pylist()) for table in tables]
    assert places[0] | places[1] == set(range(1, 501))
    assert not places[0] & places[1]
    for table in tables:
        rows = table["_sequence"].to_numpy() - 1
        assert (np.diff(rows) > 0).all()
        assert (table["digit"].to_numpy() == LABELS[rows]).all()
        pixels = table["pixels"].combine_chunks().flatten().to_numpy().reshape(-1, 64)
        assert (pixels == PIXELS[rows]).all()


def test_the_manifest_names_its_payloads_and_decodes() -> None:
    built = built_from(PARTS)
    train, test, transform, payload = built.payloads
    manifest = msgspec.json.decode(payload, type=DatasetManifest)
    assert manifest == built.manifest
    assert built.blob.digest == digest_of(payload)
    assert manifest.splits["train"].digest == digest_of(train)
    assert manifest.splits["test"].digest == digest_of(test)
    assert manifest.transform.digest == digest_of(transform)
    assert manifest.parts == [one.digest for one, _ in PARTS]
    assert built.rows == 500


def test_the_transform_is_fitted_on_the_train_split() -> None:
    built = built_from(PARTS)
    table = pq.read_table(io.BytesIO(built.payloads[0]))
    pixels = table["pixels"].combine_chunks().flatten().to_numpy().reshape(-1, 64)
    session = ort.InferenceSession(built.payloads[2])
    (features,) = session.run(None, {"pixels": pixels, "ink": table["ink"].to_numpy()})
    assert features.shape == (table.num_rows, 65)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-5)
    varies = features.std(axis=0) > 0
    np.testing.assert_allclose(features.std(axis=0)[varies], 1, rtol=1e-5)


def test_statistics_are_those_of_the_train_split() -> None:
    built = built_from(PARTS)
    ink = pq.read_table(io.BytesIO(built.payloads[0]))["ink"].to_numpy()
    said = built.manifest.statistics["ink"]
    assert (said["rows"], said["nulls"]) == (len(ink), 0)
    assert (said["min"], said["max"]) == (ink.min(), ink.max())
    assert (said["mean"], said["std"]) == pytest.approx((ink.mean(), ink.std()))
    assert sum(said["histogram"]["counts"]) == len(ink)
    assert len(built.manifest.statistics["pixels"]["series"]) == 2 + 64


def test_only_records_new_to_a_version_are_what_it_learned() -> None:
    built = build("default", pipeline(), PARTS, fresh_after=3)
    assert sum(built.learned["ink"]) == 200
    assert build("default", pipeline(), PARTS, fresh_after=0).learned == {}


def test_a_dataset_of_nothing_is_refused() -> None:
    with pytest.raises(Unusable, match="nothing has landed in 'digits' yet"):
        build("default", pipeline(), [part(0, 0)], 0)


def test_a_missing_column_is_refused_by_name() -> None:
    schema = pipeline().dataset.schema | {"age": Field("int64")}
    dataset = {"name": "digits", "schema": msgspec.to_builtins(schema)}
    with pytest.raises(Unusable, match=r"schema\.age: 500 of 500 records are null"):
        build("default", pipeline(dataset=dataset), PARTS, 0)


def test_a_version_is_due_by_count_or_by_drift_but_once() -> None:
    triggers = pipeline().triggers
    assert due(triggers, "", 999) == ""
    assert due(triggers, "", 1000) == "records"
    assert due(triggers, "drift", 1000) == "drift"
    assert due(msgspec.structs.replace(triggers, records=None), "", 10**9) == ""
    assert rows_after([one for one, _ in PARTS], 3) == 200


def test_a_version_is_news_to_a_pipeline_once_a_revision() -> None:
    from services.preprocess.domain import State

    state = State(project="p", pipeline="d", revision=2, spec=pipeline(), version_digest="a")
    assert is_news(state, "a")
    told = msgspec.structs.replace(state, version_revision=2)
    assert not is_news(told, "a")
    assert is_news(told, "b")
