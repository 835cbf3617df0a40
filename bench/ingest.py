"""Records/s from publish through to a Parquet part that is acked, against the bare bus.

The floor publishes the very same payloads, pipelined the same way, onto a stream nobody reads.
Rounds alternate, so that a noisy neighbour hurts both.
"""

import asyncio
import json
from statistics import median
from time import perf_counter
from typing import Any

from libs.bus.jetstream import JetStreamBus
from stack.testing import eventually
from tests.running import Stack, digits, digits_pipeline, stranger

MESSAGES = 100
RECORDS_A_MESSAGE = 200
IN_FLIGHT = 32
ROUNDS = 5
NEVER = 1 << 30


async def publish_all(bus: JetStreamBus, subject: str, run: str, payloads: list[bytes]) -> None:
    window = asyncio.Semaphore(IN_FLIGHT)

    async def one(number: int, payload: bytes) -> None:
        async with window:
            await bus.publish(subject, payload, id=f"{run}-{number}")

    await asyncio.gather(*(one(number, payload) for number, payload in enumerate(payloads)))


async def landed(stack: Stack, dataset: str) -> int:
    found = await stack.get("ingest", f"/v1/projects/default/datasets/{dataset}")
    return int(found["rows"])


async def measure(stack: Stack) -> list[dict[str, Any]]:
    await stack.apply(digits_pipeline("bench-ingest", NEVER))
    records = digits(0, RECORDS_A_MESSAGE)
    payloads = [json.dumps(records).encode()] * MESSAGES
    total = MESSAGES * RECORDS_A_MESSAGE
    ours, floor = [], []
    async with stranger(stack) as bus:
        await eventually(
            lambda: stack.try_get("ingest", "/v1/projects/default/datasets/bench-ingest")
        )
        for number in range(ROUNDS):
            started = perf_counter()
            await publish_all(bus, "requests.bench.floor", f"floor-{number}", payloads)
            floor.append(total / (perf_counter() - started))

            wanted = (number + 1) * total
            started = perf_counter()
            await publish_all(bus, "records.default.bench-ingest", f"ours-{number}", payloads)

            async def complete(wanted: int = wanted) -> bool:
                return await landed(stack, "bench-ingest") == wanted

            await eventually(complete, 120)
            ours.append(total / (perf_counter() - started))
    ratio = median(a / b for a, b in zip(ours, floor, strict=True))
    size = len(payloads[0]) // 1024
    return [
        {
            "what": f"ingest to Parquet, records/s ({RECORDS_A_MESSAGE} a message, {size} KiB)",
            "ours": f"{median(ours):,.0f}",
            "floor": f"{median(floor):,.0f}",
            "ratio": f"{ratio:.2f}",
            "against": "bare pipelined JetStream publish of the same payloads",
        }
    ]
