"""One request as bytes, for each wire that a peer speaks, and what its answer says."""

import contextlib
import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np

from bench.peers.models import Floats
from libs.contracts.protos.open_inference_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
)

GRPC_PATH = "/inference.GRPCInferenceService/ModelInfer"
HTTP_PATH = "/predict"
TIMEOUT_S = 60.0
SHARE_OF_JSON_MIN = 0.9
"""In another batch a number has a digit more or less."""


class Answer(NamedTuple):
    scores: Floats
    bytes: int
    """Of the body: what every right answer under load must bring too. Without the parameters: an
    answer says where its trace is, and few are traced."""


class Wire(NamedTuple):
    path: str
    headers: tuple[str, ...]
    http1: bool
    body: Callable[[str, Floats], bytes]
    """Model, features [1, ...] -> what the load generator posts."""


def grpc_message(model: str, features: Floats) -> bytes:
    request = ModelInferRequest(model_name=model)
    request.inputs.add(name="features", datatype="FP32", shape=features.shape)
    request.raw_input_contents.append(features.tobytes())
    return request.SerializeToString()


def grpc_body(model: str, features: Floats) -> bytes:
    message = grpc_message(model, features)
    return b"\0" + len(message).to_bytes(4, "big") + message


def json_body(_: str, features: Floats) -> bytes:
    """With the digits that a float32 has, as a careful client sends them: half the bytes."""
    shortest = features.astype(str).astype(float)
    return json.dumps({"features": shortest.tolist()}).encode()


GRPC = Wire(GRPC_PATH, ("content-type: application/grpc", "te: trailers"), False, grpc_body)
WIRES = {
    "grpc": GRPC,
    "echo": GRPC,
    "http": Wire(HTTP_PATH, ("content-type: application/json",), True, json_body),
}


class Client:
    """Asks one server on loopback; raises `grpc.RpcError` or `OSError` while it cannot answer."""

    def __init__(self, wire: str, port: int, token: str) -> None:
        self.wire, self.port = wire, port
        self.metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.max_reconnect_backoff_ms", 20),
                                          ("grpc.initial_reconnect_backoff_ms", 20),
                                          ("grpc.min_reconnect_backoff_ms", 20)]
        )  # fmt: skip

    def ask(self, model: str, features: Floats) -> Answer:
        return self.ask_http(features) if self.wire == "http" else self.ask_grpc(model, features)

    def ask_grpc(self, model: str, features: Floats) -> Answer:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(GRPC_PATH)
        message = call(grpc_message(model, features), timeout=TIMEOUT_S, metadata=self.metadata)
        if self.wire == "echo":
            [raw] = ModelInferRequest.FromString(message).raw_input_contents
            scores = np.frombuffer(raw, np.float32).reshape(features.shape)
            return Answer(scores, 5 + len(message))
        response = ModelInferResponse.FromString(message)
        scores = np.frombuffer(response.raw_output_contents[0], np.float32)
        response.ClearField("parameters")
        return Answer(scores.reshape(response.outputs[0].shape), 5 + response.ByteSize())

    def ask_http(self, features: Floats) -> Answer:
        """Raises `OSError` for an answer that is none, too."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        with contextlib.closing(connection):
            headers = {"content-type": "application/json"}
            connection.request("POST", HTTP_PATH, json_body("", features), headers)
            response = connection.getresponse()
            body = response.read()
        if response.status != http.client.OK:
            raise OSError(f"{response.status}: {body[:200]!r}")
        found = json.loads(body)
        scores = found["scores"] if isinstance(found, dict) else found
        bytes_min = round(len(body) * SHARE_OF_JSON_MIN)
        return Answer(np.array(scores, np.float32).reshape(1, -1), bytes_min)

    def batches(self, model: str) -> dict[int, int]:
        """Rows -> batches of so many, since the start; only of a server that counts them."""
        call: grpc.UnaryUnaryMultiCallable[ModelStatisticsRequest, ModelStatisticsResponse]
        call = self.channel.unary_unary(
            "/inference.GRPCInferenceService/ModelStatistics",
            ModelStatisticsRequest.SerializeToString,
            ModelStatisticsResponse.FromString,
        )
        found = call(ModelStatisticsRequest(name=model), timeout=TIMEOUT_S, metadata=self.metadata)
        return {
            int(one.batch_size): int(one.compute_infer.count)
            for version in found.model_stats
            for one in version.batch_stats
        }

    def close(self) -> None:
        self.channel.close()


def write_bodies(folder: Path, model: str, features: Floats) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, wire in WIRES.items():
        (folder / f"{model}.{name}").write_bytes(wire.body(model, features))
