"""What Prometheus reads under Triton's names is what ModelStatistics says."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from libs.contracts.pipeline import Batching
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference.statistics import NV, Statistics
from services.inference.tests import web
from services.inference.tests.desk import BROKEN, Desk, double, opened, refused, request, row
from services.inference.tests.fronts import kinds
from stack.testing import eventually

US_NS = 1000


@pytest.fixture(params=kinds())
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    async with opened(kind=request.param) as made:
        await made.serve("double", double())
        yield made


def read(desk: Desk, model: str) -> dict[str, float]:
    """Triton's names without `nv_inference_`."""
    samples = [one for metric in Statistics(desk.endpoints).collect() for one in metric.samples]
    own = [one for one in samples if one.labels["model"] == model and one.name in NV]
    assert all(one.labels["version"] == "1" for one in own)
    return {one.name.removeprefix("nv_inference_"): one.value for one in own}


async def test_triton_s_metrics_are_its_statistics(desk: Desk) -> None:
    for rows in (1, 3):
        await desk.stub.ModelInfer(request("double", row(*[1] * 2 * rows), [rows, 2]))
    await refused(desk.stub.ModelInfer(request("double", row(BROKEN, 0), [1, 2])))
    await refused(desk.stub.ModelInfer(request("double", row(1), [1, 1])))
    asked = oip.ModelStatisticsRequest(name="double", version="1")
    (known,) = (await desk.stub.ModelStatistics(asked)).model_stats
    stats = known.inference_stats
    assert read(desk, "double") == {
        "request_success": 2,
        "request_failure": 2,
        "count": 4,
        "exec_count": 2,
        "pending_request_count": 0,
        "request_duration_us": stats.success.ns // US_NS,
        "queue_duration_us": stats.queue.ns // US_NS,
        "compute_input_duration_us": stats.compute_input.ns // US_NS,
        "compute_infer_duration_us": stats.compute_infer.ns // US_NS,
        "compute_output_duration_us": stats.compute_output.ns // US_NS,
    }


async def test_who_waits_is_pending(desk: Desk) -> None:
    gate = web.Gate()
    gate.model.parallel = 1
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    served.configure(Batching(max_batch_size=1), 0)
    calls = [
        asyncio.ensure_future(desk.stub.ModelInfer(request("gate", row(1), [1, 1])))
        for _ in range(4)
    ]
    try:
        await eventually(lambda: read(desk, "gate")["pending_request_count"] == 3)
    finally:
        gate.opened.set()
    await asyncio.gather(*calls)
    assert read(desk, "gate")["pending_request_count"] == 0
