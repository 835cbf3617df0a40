"""What goes on while things break: records are published, predictions are asked for.

Both ends keep books: what was acked, and what was answered by whom. Both try again as a careful
client would.
"""

import asyncio
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from time import monotonic, time
from typing import Any, NamedTuple

import grpc
import numpy as np
import pyarrow as pa
from sklearn.datasets import load_digits

from libs.bus import PublishFailed
from libs.bus.jetstream import JetStreamBus
from libs.contracts.protos import open_inference_pb2, open_inference_pb2_grpc

BATCH = 50
EVERY_S = 0.1
TIMEOUT_S = 1.0
TELL_AT_ONCE: list[tuple[str, Any]] = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]
"""So that what is measured is how long the stack takes, not how long this client waits."""
PIXELS, LABELS = load_digits(return_X_y=True)
ROWS = len(PIXELS)


class Acked(NamedTuple):
    """A batch and where the stream keeps it."""

    id: str
    sequence: int
    keys: range
    at_s: float


class Answer(NamedTuple):
    version: str
    row: int
    label: int
    probabilities: list[float]
    id_matches: bool


class Publisher:
    """Records with a key of their own each, in batches of JSON and of Arrow by turns."""

    def __init__(self, bus: JetStreamBus, dataset: str) -> None:
        self.bus = bus
        self.dataset = dataset
        self.subject = f"records.default.{dataset}"
        self.books: list[Acked] = []
        self.retries = 0
        self.next = 0

    async def run(self, records: int, over_s: float) -> None:
        """Spreads them evenly; what is late because nobody acked follows at once."""
        began_s, count = monotonic(), -(-records // BATCH)
        for number in range(count):
            await pause(began_s + over_s * number / count - monotonic())
            await self.batch(min(BATCH, records - number * BATCH))

    async def batch(self, records: int) -> Acked:
        keys = range(self.next, self.next + records)
        self.next += records
        own = f"{self.dataset}-{keys.start}"
        payload = self.payload(keys)
        while True:
            try:
                sequence = await self.bus.publish(self.subject, payload, id=own)
            except PublishFailed:
                self.retries += 1
                continue
            acked = Acked(own, sequence, keys, time())
            self.books.append(acked)
            return acked

    def payload(self, keys: range) -> bytes:
        return (in_arrow if keys.start // BATCH % 2 else in_json)(keys)


def in_json(keys: range) -> bytes:
    rows = [
        {"key": key, "pixels": PIXELS[key % ROWS].tolist(), "label": int(LABELS[key % ROWS])}
        for key in keys
    ]
    return json.dumps(rows).encode()


def in_arrow(keys: range) -> bytes:
    chosen = np.array(keys) % ROWS
    pixels = pa.array(PIXELS[chosen].astype(np.float32).ravel())
    table = pa.table(
        {
            "key": pa.array(keys, pa.int64()),
            "pixels": pa.FixedSizeListArray.from_arrays(pixels, PIXELS.shape[1]),
            "label": pa.array(LABELS[chosen], pa.int64()),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


class Predictor:
    """Asks for one digit after the other, and notes who answered what."""

    def __init__(self, channel: grpc.aio.Channel, model: str) -> None:
        self.stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.model = model
        self.answers: list[Answer] = []
        self.failures: Counter[str] = Counter()
        self.asked_s = -1.0
        """When the last answered request was sent, on the monotonic clock."""
        self.answered = asyncio.Event()

    async def run(self) -> None:
        for number in itertools.count():
            began_s = monotonic()
            await self.ask(number)
            await pause(began_s + EVERY_S - monotonic())

    async def ask(self, number: int) -> None:
        row, began_s = number * 7 % ROWS, monotonic()
        request = open_inference_pb2.ModelInferRequest(model_name=self.model, id=f"ask-{number}")
        request.inputs.add(name="pixels", datatype="FP32", shape=[1, PIXELS.shape[1]])
        request.raw_input_contents.append(PIXELS[row].astype(np.float32).tobytes())
        try:
            response = await self.stub.ModelInfer(request, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self.failures[error.code().name] += 1
            return
        self.answers.append(answer_of(response, row, request.id))
        self.asked_s = began_s
        self.answered.set()

    async def success_after(self, when_s: float) -> None:
        """Returns once a request that was sent later has been answered."""
        while self.asked_s < when_s:
            self.answered.clear()
            await self.answered.wait()


def answer_of(response: Any, row: int, id: str) -> Answer:
    arrays = {
        output.name: np.frombuffer(raw, np.int64 if output.datatype == "INT64" else np.float32)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
    (label,) = arrays["label"].tolist()
    probabilities = arrays["probabilities"].tolist()
    return Answer(response.model_version, row, label, probabilities, response.id == id)


async def pause(seconds: float) -> None:
    """The load's own rhythm; nothing waits for it."""
    if seconds > 0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.Event().wait()


@contextlib.asynccontextmanager
async def predicting(address: str, model: str) -> AsyncIterator[Predictor]:
    async with grpc.aio.insecure_channel(address, options=TELL_AT_ONCE) as channel:
        predictor = Predictor(channel, model)
        task = asyncio.create_task(predictor.run())
        try:
            yield predictor
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def again(bus: JetStreamBus, publisher: Publisher, batches: Sequence[Acked]) -> None:
    """The same batches with the same ids: as a publisher does that never saw its acks."""
    for acked in batches:
        with contextlib.suppress(PublishFailed):
            await bus.publish(publisher.subject, publisher.payload(acked.keys), id=acked.id)
