"""A small dataset version in object storage, and one Ray for all tests."""

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

from libs.contracts.artifacts import DatasetManifest, canonical
from libs.contracts.events import Resources
from libs.contracts.pipeline import Field, Train
from libs.objectstore import ObjectStore
from services.trainer import cluster, session
from services.trainer.domain import Assignment, Setup, Storage, TrainSpec
from stack.testing import ACCESS_KEY, PASSWORD

PIXELS = 64
SCHEMA = {"pixels": Field("float32", [PIXELS]), "label": Field("int64", role="label")}
PROJECT = "default"
BUCKET = "trainer"


def transform_of(name: str, shape: list[int], scale: float) -> bytes:
    """float32 `name` [batch, *shape] / scale -> `features`."""
    graph = helper.make_graph(
        [helper.make_node("Div", [name, "scale"], ["features"])],
        "transform",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", *shape])],
        [numpy_helper.from_array(np.array(scale, np.float32), "scale")],
    )
    opset = [helper.make_opsetid("", 20)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=10)
    return bytes(model.SerializeToString(deterministic=True))


def parquet_of(values: np.ndarray, label: np.ndarray, name: str = "pixels") -> bytes:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values[0].size)
    place = pa.array(np.arange(len(label)))
    table = pa.table({"_sequence": place, "_index": place, name: flat, "label": label})
    written = io.BytesIO()
    pq.write_table(table, written)
    return written.getvalue()


async def store_digits(objects: ObjectStore, rows: int = 1200, first_label: int = 0) -> str:
    """sklearn's digits as a dataset version, labelled from `first_label` on; its digest."""
    pixels, label = load_digits(return_X_y=True)
    pixels, label = pixels[:rows].astype(np.float32), label[:rows].astype(np.int64) + first_label
    in_test = np.arange(rows) % 5 == 0
    splits = {
        name: await objects.put_blob(parquet_of(pixels[chosen], label[chosen]))
        for name, chosen in (("train", ~in_test), ("test", in_test))
    }
    manifest = DatasetManifest(
        project=PROJECT,
        dataset="digits",
        schema=SCHEMA,
        steps=[],
        parts=[],
        splits=splits,
        transform=await objects.put_blob(transform_of("pixels", [PIXELS], 16.0)),
        fitted={},
        statistics={},
    )
    return (await objects.put_blob(canonical(manifest))).digest


def spec_of(digest: str, metrics: tuple[str, ...] = (), **train: Any) -> TrainSpec:
    settings: dict[str, Any] = {"recipe": "mlp", "params": {"epochs": 3}, **train}
    return TrainSpec(
        pipeline="digits",
        revision=1,
        model="digits",
        dataset="digits",
        dataset_version=1,
        dataset_digest=digest,
        rows=1200,
        train=Train(**settings),
        metrics=list(metrics),
    )


def assignment_of(job: str, spec: TrainSpec) -> Assignment:
    workers = spec.train.workers
    return Assignment(project=PROJECT, job=job, attempt=1, token=1, workers=workers, spec=spec)


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[str]:
    with session.opened() as folder:
        yield folder


@pytest.fixture(scope="session")
def shared(s3_server: str) -> ObjectStore:
    """One bucket for the whole session: warm workers know where they store."""
    store = ObjectStore(s3_server, ACCESS_KEY, PASSWORD, BUCKET)
    asyncio.run(store.create_bucket())
    return store


@pytest.fixture(scope="session")
def ray_started(ray_folder: str, s3_server: str, shared: ObjectStore) -> Iterator[Any]:
    """The engine on a local Ray, its pool still empty."""
    import ray  # only now: it reads its environment

    from services.trainer import engine

    storage = Storage(s3_server, ACCESS_KEY, PASSWORD, BUCKET)
    engine.start_ray(cluster.Node("", 0, Resources(2000, 4096)), ray_folder)
    yield engine.Engine(Setup(storage), 2, ray_folder)
    ray.shutdown()


@pytest_asyncio.fixture
async def pool(ray_started: Any) -> AsyncIterator[Any]:
    """The engine with two warm workers."""
    await ray_started.look()
    ray_started.pool.fill()
    await ray_started.pool.filled()
    yield ray_started
    await ray_started.pool.filled()
