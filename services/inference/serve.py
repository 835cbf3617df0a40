"""The inference server alone: a folder of models, three doors, and nothing else of the platform.

`leptonic serve PATH` starts it. No events, no database, no object store.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import uvloop
from prometheus_client import REGISTRY

from libs import telemetry
from libs.contracts.artifacts import Tensor
from libs.contracts.protos import open_inference_pb2, open_inference_pb2_grpc
from libs.doors.drain import Drain
from libs.doors.serve import background, http_app, http_door
from services.inference import fronts
from services.inference.endpoints import Endpoints
from services.inference.modelconfig import Misconfigured
from services.inference.notes import Notes
from services.inference.repository import Mode, Repository
from services.inference.rest import app_of
from services.inference.rpc import Host, health_and_reflection
from services.inference.served import Rates
from services.inference.server import MODEL_INFER, MODEL_STREAM_INFER, OpenInference
from services.inference.statistics import Statistics
from services.inference.tensors import bracketed

log = logging.getLogger(__name__)
OPEN_INFERENCE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
PROJECT = "default"
FRONT = "LEPTONIC_INFERENCE_FRONT"
"""As for the service: auto, native or python."""
UNTRACED, TRACED = Rates(0, 0), Rates(100, 0)
"""As the service does by default; nothing is logged, and traced only where traces are taken."""
EXAMPLE_CHARACTERS_MAX = 1000
"""A longer body makes no line to copy."""


class Places(NamedTuple):
    """Where the doors are."""

    http: str
    grpc: str
    metrics: str


def main(words: Sequence[str]) -> int:
    """Exit codes: 0 ended as asked, 1 nothing could be served, 2 wrong usage."""
    options = parser().parse_args(words)
    telemetry.log_everything("inference")
    try:
        uvloop.run(serve(options))
    except (Misconfigured, OSError) as error:
        print(f"leptonic serve: {error}", file=sys.stderr)  # noqa: T201 - for people
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """`leptonic serve --help` and docs/cli.md say what the options mean."""
    made = argparse.ArgumentParser(prog="leptonic serve")
    made.add_argument("path", type=Path)
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--http-port", type=int, default=8000)
    made.add_argument("--grpc-port", type=int, default=8001)
    made.add_argument("--metrics-port", type=int, default=8002)
    made.add_argument("--model-control-mode", choices=get_args(Mode), default="none")
    made.add_argument("--load-model", action="append", default=[])
    made.add_argument("--poll-s", type=float, default=5.0)
    made.add_argument("--server-name", default="leptonic")
    made.add_argument("--token", action="append", default=[])
    made.add_argument("--otlp-endpoint", default="")
    return made


async def serve(options: argparse.Namespace) -> None:
    """Until SIGTERM or SIGINT; then what was accepted is answered. Raises `Misconfigured` when
    nothing can be served, `OSError` when a port is in use."""
    with telemetry.start("inference", options.otlp_endpoint):
        async with serving(options) as (drain, repository, places):
            over = asyncio.create_task(drain.until_over())
            await asyncio.sleep(0)  # from here on it hears signals
            await tell(repository, places)
            await over


@contextlib.asynccontextmanager
async def serving(
    options: argparse.Namespace,
) -> AsyncIterator[tuple[Drain, Repository, Places]]:
    async with contextlib.AsyncExitStack() as stack:
        host = Host([MODEL_INFER, MODEL_STREAM_INFER])
        front = fronts.make(os.environ.get(FRONT, "auto"), host.host, options.token)
        rates = TRACED if options.otlp_endpoint else UNTRACED
        endpoints = Endpoints(front, Notes(None, options.server_name, rates), PROJECT)
        stack.push_async_callback(endpoints.close)
        repository = Repository(options.path, options.model_control_mode, endpoints)
        stack.push_async_callback(repository.close)
        endpoints.on_quarantine = repository.step_back
        statistics = Statistics(endpoints)
        REGISTRY.register(statistics)
        stack.callback(REGISTRY.unregister, statistics)
        await repository.start(options.load_model)
        if options.model_control_mode == "none" and not endpoints.versions("", ""):
            raise Misconfigured("nothing can be served: " + "; ".join(await unserved(repository)))
        if options.model_control_mode == "poll":
            await stack.enter_async_context(background(repository.poll(options.poll_s)))
        drain = Drain(always)
        places = await stack.enter_async_context(doors(options, repository, host, drain))
        yield drain, repository, places


async def always() -> bool:
    """What could be loaded is, before a door opens."""
    return True


@contextlib.asynccontextmanager
async def doors(
    options: argparse.Namespace, repository: Repository, host: Host, drain: Drain
) -> AsyncIterator[Places]:
    """They close first: nothing is unloaded under a request."""
    address, endpoints = options.host, repository.endpoints
    oip = OpenInference(endpoints, options.server_name, drain.ready, repository)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(oip, host)
    api = app_of(oip, options.token)
    metrics = http_app("Metrics", [], drain.ready)
    async with (
        health_and_reflection(host, [OPEN_INFERENCE], drain.ready),
        fronts.listening(endpoints.front, host, address, options.grpc_port, drain),
        http_door(address, options.http_port, api, drain) as http_port,
        http_door(address, options.metrics_port, metrics, drain) as metrics_port,
    ):
        grpc_port = endpoints.front.port
        yield Places(*(f"{address}:{port}" for port in (http_port, grpc_port, metrics_port)))


async def tell(repository: Repository, places: Places) -> None:
    """What is served where, and a line to try it with."""
    versions = repository.endpoints.versions("", "")
    for served in versions:
        inputs, outputs = listed(served.signature.inputs), listed(served.signature.outputs)
        say(f"{served.title}, {served.model.platform}: {inputs} -> {outputs}")
    for line in await unserved(repository):
        say(line)
    say(f"HTTP http://{places.http}, gRPC {places.grpc}, metrics http://{places.metrics}/metrics")
    for served in versions:
        body = json.dumps({"inputs": [example(tensor) for tensor in served.signature.inputs]})
        if len(body) <= EXAMPLE_CHARACTERS_MAX and not served.sequencer:
            say(f"curl -s http://{places.http}/v2/models/{served.name}/infer -d '{body}'")
            break
    say(f"grpcurl -plaintext {places.grpc} inference.GRPCInferenceService/ServerMetadata")


async def unserved(repository: Repository) -> list[str]:
    return [
        f"model '{name}' {version and f'version {version} '}is not served: {reason}"
        for name, version, _, reason in await repository.index(ready_only=False)
        if reason
    ]


def say(line: str) -> None:
    """To whoever started it; what programs read is the log, on stderr."""
    print(line, flush=True)  # noqa: T201 - for people


def listed(tensors: Sequence[Tensor]) -> str:
    """`x FP32[-1,4], y INT64[-1]`."""
    return ", ".join(f"{one.name} {one.datatype}{bracketed(one.shape)}" for one in tensors)


def example(tensor: Tensor) -> dict[str, Any]:
    """Zeros, one for every free dimension."""
    shape = [max(size, 1) for size in tensor.shape]
    zero = {"BOOL": False, "BYTES": "0"}.get(tensor.datatype, 0)
    data = [zero] * min(math.prod(shape), EXAMPLE_CHARACTERS_MAX)
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": shape, "data": data}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
