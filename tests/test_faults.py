"""Promise 1: whatever is killed and whenever, an acked record takes effect once.

Each of the six services and the three servers is killed with SIGKILL while the loop runs, at the
moment that hurts it most; the loop completes.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
import pytest_asyncio
from pyarrow import BufferReader

from libs.contracts.artifacts import DatasetManifest
from libs.objectstore import ObjectStore
from tests.running import (
    STACKS,
    Stack,
    digits,
    digits_pipeline,
    publish,
    running_stack,
    stranger,
)

# A published port answers for a server that is away; nats-py 2.16 leaves that connection unclosed.
UNCLOSED = "ignore:Exception ignored in. <(function (StreamWriter|_SelectorTransport)|socket)"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings(f"{UNCLOSED}:pytest.PytestUnraisableExceptionWarning"),
]

RECORDS = 400
BATCH = 20
WHILE_PUBLISHING = ("nats", "postgres", "s3", "ingest")
AFTER_EVENT = {
    "preprocess": "part.landed",
    "trainer": "attempt.started",
    "scheduler": "job.requested",
    "registry": "attempt.succeeded",
    "inference": "model_version.registered",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=STACKS)
async def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stack]:
    async with running_stack(tmp_path_factory.mktemp("faults") / "data", request.param) as running:
        yield running


def is_of(name: str, data: dict[str, Any]) -> bool:
    return name in (data.get("dataset"), data.get("model")) or name in str(data.get("job", ""))


async def kill_when_it_hurts(stack: Stack, victim: str, name: str) -> None:
    event = AFTER_EVENT.get(victim)
    if event:
        await stack.event(event, lambda data: is_of(name, data))
    old = stack.kill(victim)
    await stack.back(victim, old)


async def publish_and_kill(stack: Stack, victim: str, name: str) -> list[int]:
    records = digits(0, RECORDS)
    async with stranger(stack) as bus:
        half = await publish(bus, name, records[: RECORDS // 2], BATCH)
        killing = asyncio.create_task(kill_when_it_hurts(stack, victim, name))
        rest = await publish(bus, name, records, BATCH)
        await killing
    return sorted({*half, *rest})


async def landed_records(stack: Stack, digest: str) -> Counter[tuple[int, int]]:
    """How often each record, by stream sequence and index, is in a dataset version."""
    state = stack.state
    keys = state["secrets"]
    objects = ObjectStore(
        stack.endpoint("s3"), keys["s3_access_key"], keys["s3_secret_key"], "leptonic"
    )
    manifest = msgspec.json.decode(await objects.get_blob(digest), type=DatasetManifest)
    found: Counter[tuple[int, int]] = Counter()
    for blob in manifest.splits.values():
        table = pq.read_table(BufferReader(await objects.get_blob(blob.digest)))
        pairs = zip(table["_sequence"].to_pylist(), table["_index"].to_pylist(), strict=True)
        found.update(pairs)
    return found


@pytest.mark.parametrize("victim", [*WHILE_PUBLISHING, *AFTER_EVENT])
async def test_the_loop_completes_and_every_acked_record_counts_once(
    stack: Stack, victim: str
) -> None:
    name = f"kill-{victim}"
    pipeline = digits_pipeline(name, RECORDS)
    pipeline["preprocess"] = [s for s in pipeline["preprocess"] if "drop_duplicates" not in s]
    await stack.apply(pipeline)

    acked = await publish_and_kill(stack, victim, name)

    ready = await stack.event("deployment.ready", lambda data: data["model"] == name)
    assert ready["generation"] >= 1
    version = await stack.event("dataset_version.created", lambda data: data["dataset"] == name)
    counts = await landed_records(stack, version["digest"])
    assert counts == Counter({(s, i): 1 for s in acked for i in range(BATCH)})
    models = await stack.get("registry", f"/v1/projects/default/models/{name}/versions")
    assert [one["number"] for one in models["versions"]] == ["1"]
    registered = [
        event
        for event in await stack.events("model_version.registered")
        if event["data"]["model"] == name
    ]
    assert len({event["id"] for event in registered}) == 1
