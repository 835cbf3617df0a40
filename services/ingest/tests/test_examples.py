"""The example publishers, run as a stranger runs them."""

import asyncio
import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np

from libs.bus import Subscription
from libs.database import Database
from libs.objectstore import ObjectStore
from services.ingest import store
from services.ingest.domain import Place
from services.ingest.landing import Landing
from services.ingest.tests.conftest import apply
from services.ingest.tests.pipelines import applied
from services.ingest.tests.test_landing import rows_of

EXAMPLES = Path(__file__).parents[3] / "examples"


async def run(script: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(EXAMPLES / script), *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_published_digits_land_and_twice_is_once(
    nats_url: str, db: Database, objects: ObjectStore, landing: Landing, subscription: Subscription
) -> None:
    for _ in range(2):
        said = await run("publish_digits.py", "--nats", nats_url, "--count", "120")
        assert said == "120 records acked on records.default.digits\n"
    await landing.land(await landing.gather(subscription))
    assert len(await rows_of(db, objects)) == 120


async def test_printed_digits_are_the_published_ones_and_drift_changes_only_pixels() -> None:
    plain = (await run("publish_digits.py", "--print-records", "--count", "3")).splitlines()
    later = await run("publish_digits.py", "--print-records", "--offset", "1", "--count", "1")
    drift = await run("publish_digits.py", "--print-records", "--count", "3", "--drift")
    assert plain[1] == later.strip()
    for before, after in zip(
        map(json.loads, plain), map(json.loads, drift.splitlines()), strict=True
    ):
        assert before["label"] == after["label"]
        change = np.array(after["pixels"]) - (16 - np.array(before["pixels"]))
        assert np.abs(change).max() <= 3**0.5 + 0.001
        assert 0 <= min(after["pixels"]) <= max(after["pixels"]) <= 16


async def test_published_images_land(
    nats_url: str,
    db: Database,
    objects: ObjectStore,
    landing: Landing,
    subscription: Subscription,
    tmp_path: Path,
) -> None:
    for name, count in (("train", 1100), ("t10k", 100)):
        images = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28) + bytes(count * 784)
        labels = struct.pack(">HBBI", 0, 8, 1, count) + bytes(n % 10 for n in range(count))
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels, 1))
    schema = {
        "image": {"type": "uint8", "shape": [28, 28, 1]},
        "label": {"type": "int64", "role": "label"},
    }
    await apply(db, applied("fashion_mnist", schema=schema), "event-fashion")
    place = Place("default", "fashion_mnist")
    said = await run("publish_fashion_mnist.py", "--nats", nats_url, "--folder", str(tmp_path))
    assert said == "1200 records acked on records.default.fashion_mnist\n"
    await landing.land(await landing.gather(subscription))
    labels_sent = [*(n % 10 for n in range(1100)), *(n % 10 for n in range(100))]
    assert [label for _, _, label in await rows_of(db, objects, place)] == labels_sent
    assert len(await store.parts(db, place, 0, 10)) == 1
