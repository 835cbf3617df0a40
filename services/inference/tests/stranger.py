"""What anybody's `tritonclient` program does. A process of its own: its protos and ours register
the same names. `python -m services.inference.tests.stranger <grpc> <http>` prints JSON."""

import json
import queue
import sys
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

PIXELS = np.array([[0, 3, 1, 2], [9, 3, 1, 2]], np.float32)


def infer(module: Any, client: Any) -> list[int]:
    """gRPC and HTTP have the same API; HTTP sends and gets binary tensors by default."""
    asked = module.InferInput("pixels", PIXELS.shape, "FP32")
    asked.set_data_from_numpy(PIXELS)
    answer = client.infer("digits", [asked], request_id="mine")
    kept: list[int] = answer.as_numpy("label").tolist()
    assert answer.as_numpy("probabilities").shape == (2, 4)
    wanted = [module.InferRequestedOutput("label")]
    chosen = client.infer("digits", [asked], model_version="1", outputs=wanted)
    assert chosen.as_numpy("label").tolist() == kept
    return kept


def refusals(module: Any, client: Any) -> list[str]:
    said = []
    for model, name, values in (
        ("x", "pixels", PIXELS),
        ("digits", "pixel", PIXELS),
        ("digits", "pixels", PIXELS[:, :3]),
        ("digits", "pixels", PIXELS.astype(np.float64)),
    ):
        datatype = "FP64" if values.dtype == np.float64 else "FP32"
        asked = module.InferInput(name, values.shape, datatype)
        asked.set_data_from_numpy(np.ascontiguousarray(values))
        try:
            client.infer(model, [asked])
        except InferenceServerException as error:
            said.append(error.message())
    return said


def stream(client: Any) -> list[int]:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    asked = tritonclient.grpc.InferInput("pixels", PIXELS.shape, "FP32")
    asked.set_data_from_numpy(PIXELS)
    client.async_stream_infer("digits", [asked])
    result, error = answers.get(timeout=10)
    client.stop_stream()
    assert error is None, error
    kept: list[int] = result.as_numpy("label").tolist()
    return kept


def main(grpc_address: str, http_address: str) -> dict[str, Any]:
    grpc = tritonclient.grpc.InferenceServerClient(grpc_address)
    http = tritonclient.http.InferenceServerClient(http_address)
    kept: dict[str, Any] = {}
    for name, module, client in (
        ("grpc", tritonclient.grpc, grpc),
        ("http", tritonclient.http, http),
    ):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert not client.is_model_ready("x")
        kept[name] = {"labels": infer(module, client), "refused": refusals(module, client)}
    kept["stream"] = stream(grpc)
    kept["inputs"] = http.get_model_metadata("digits")["inputs"]
    assert grpc.get_model_metadata("digits").inputs[0].name == "pixels"
    assert grpc.get_server_metadata().name == http.get_server_metadata()["name"]
    statistics = grpc.get_inference_statistics("digits").model_stats[0]
    kept["counted"] = statistics.inference_stats.success.count
    stats = http.get_inference_statistics("digits")["model_stats"][0]
    assert stats["inference_stats"]["success"]["count"] == kept["counted"]
    kept["index"] = [(m.name, m.state) for m in grpc.get_model_repository_index().models]
    assert http.get_model_repository_index()[0]["name"] == "digits"
    http.close()
    grpc.close()
    return kept


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])))
