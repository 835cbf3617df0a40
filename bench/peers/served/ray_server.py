"""Ray Serve's gRPC proxy with `serve.batch`."""

import os
import signal

import ray
from models import NAMES, PORT, ROWS_MAX, WAIT_MAX_S, Opened
from numpy import concatenate, float32, frombuffer
from ray import serve
from ray.serve.config import gRPCOptions

from libs.contracts.protos.open_inference_pb2 import ModelInferRequest, ModelInferResponse


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
class Onnx:
    def __init__(self, name: str) -> None:
        self.name = name
        self.opened = Opened(name)

    @serve.batch(max_batch_size=ROWS_MAX, batch_wait_timeout_s=WAIT_MAX_S)
    async def run(self, rows):
        scores = self.opened.run(concatenate(rows))
        return [scores[number : number + 1] for number in range(len(rows))]

    async def ModelInfer(self, request: ModelInferRequest) -> ModelInferResponse:  # noqa: N802 - the RPC's name
        raw, shape = request.raw_input_contents[0], request.inputs[0].shape
        scores = await self.run(frombuffer(raw, float32).reshape(shape))
        response = ModelInferResponse(model_name=self.name, model_version="1")
        response.outputs.add(name="scores", datatype="FP32", shape=scores.shape)
        response.raw_output_contents.append(scores.tobytes())
        return response


ADD = "libs.contracts.protos.open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False)
serve.start(
    proxy_location="HeadOnly",
    http_options={"host": "127.0.0.1", "port": int(os.environ["BENCH_PORT_2"])},
    grpc_options=gRPCOptions(port=PORT, grpc_servicer_functions=[ADD]),
)
serve.run(Onnx.bind(NAMES[0]), name="default", route_prefix="/")
signal.sigwait({signal.SIGTERM, signal.SIGINT})
serve.shutdown()
ray.shutdown()
