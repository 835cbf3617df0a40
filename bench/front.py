"""The front alone: `python -m bench.front [native|python] [MODEL ...]`, one core for it, one for
h2load.

Prints requests/s, what each costs the server, and h2load's latencies (min max mean sd) at three
concurrencies for the models of `bench.peers`, loaded as the service loads them, and what each stage
takes of a request (of a batch its share; read contains parse), beside its wait.
"""

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from bench.peers.models import SHAPES, export_missing, rows_of
from libs.contracts.pipeline import Batching
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference import fronts
from services.inference.front import Batcher, Lane, Sampling
from services.inference.models import OnnxModel

LOADS = {1: 1, 8: 8, 64: 8}
"""Concurrency -> connections."""
SECONDS = 3
METHOD = "/inference.GRPCInferenceService/ModelInfer"
SERVER_CORE, CLIENT_CORE = 0, 1


def work(batcher: Batcher, model: OnnxModel) -> None:
    while (batch := batcher.take()) is not None:
        batch.answer(model.run(batch.inputs()))


@contextlib.contextmanager
def body_of(model: str) -> Iterator[str]:
    """A file with one request as gRPC frames it."""
    given = oip.ModelInferRequest.InferInputTensor(
        name="features", datatype="FP32", shape=[1, *SHAPES[model]]
    )
    request = oip.ModelInferRequest(
        model_name=model, inputs=[given], raw_input_contents=[rows_of(model, 1).tobytes()]
    ).SerializeToString()
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(b"\0" + len(request).to_bytes(4, "big") + request)
        yield file.name


def load(port: int, body: str, concurrency: int) -> tuple[float, str]:
    """(requests/s, latencies as h2load prints them); every request has to succeed."""
    connections = LOADS[concurrency]
    command = [
        *("taskset", "-c", str(CLIENT_CORE), "h2load", "-D", str(SECONDS), "--warm-up-time=1"),
        *("-c", str(connections), "-m", str(concurrency // connections), "-d", body),
        *("-H", "content-type: application/grpc", "-H", "te: trailers"),
        f"http://127.0.0.1:{port}{METHOD}",
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    done = re.search(r"requests: (\d+) total.* (\d+) succeeded, (\d+) failed", said)
    rate = re.search(r"finished in .*?, ([\d.]+) req/s", said)
    times = re.search(r"time for request: +(.*)", said)
    assert done is not None, said
    assert rate is not None, said
    assert times is not None, said
    assert int(done[3]) == 0, said
    return float(rate[1]), times[1]


@contextlib.asynccontextmanager
async def serving(kind: str, model: OnnxModel) -> AsyncIterator[tuple[Any, Batcher]]:
    front: Any = fronts.make(kind, lambda call: None, ())
    await front.listen("127.0.0.1", 0, False)
    batcher = front.batcher(Lane(model.name, "1", model.signature, True, False))
    batcher.configure(Batching(), Sampling(0.0, 0, 0.0))
    front.route(model.name, {"1": 100}, {"1": batcher})
    runner = threading.Thread(target=work, args=(batcher, model))
    runner.start()
    try:
        yield front, batcher
    finally:
        batcher.close()
        await asyncio.to_thread(runner.join)
        await front.close(1.0)


async def measure(kind: str, model: OnnxModel, concurrency: int) -> None:
    async with serving(kind, model) as (front, batcher):
        began_s = time.process_time()
        with body_of(model.name) as body:
            rate, times = await asyncio.to_thread(load, front.port, body, concurrency)
        spent_us = (time.process_time() - began_s) * 1e6
        counts = batcher.counts()
        assert not counts.failures, counts
        runs = sum(count for count, *_ in counts.batches.values())
        print(
            f"{kind} {model.name:>8} c{concurrency:<3} {rate:>9,.0f} req/s "
            f"{spent_us / counts.success_count:6.2f} us CPU each  {times}\n"
            f"  {counts.inference_count / runs:.1f} rows a batch"
        )
        if kind == "native":
            told = (f"{stage} {us:.2f}" for stage, us in front.stages().items())
            print(f"  us: {', '.join(told)}", flush=True)


if __name__ == "__main__":
    os.sched_setaffinity(0, {SERVER_CORE})
    which = sys.argv[1] if len(sys.argv) > 1 else "native"
    with tempfile.TemporaryDirectory() as folder:
        export_missing(Path(folder))
        for one in sys.argv[2:] or SHAPES:
            graph = (Path(folder) / f"{one}.onnx").read_bytes()
            loaded = OnnxModel(one, "", graph, batched=True)
            for open_at_once in LOADS:
                asyncio.run(measure(which, loaded, open_at_once))
