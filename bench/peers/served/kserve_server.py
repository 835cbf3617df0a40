"""KServe's Python server, gRPC; it makes no batches by itself."""

import os

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from models import NAMES, PORT, Opened


class Onnx(Model):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.opened = Opened(name)
        self.ready = True

    async def predict(self, payload: InferRequest, headers=None, response_headers=None):
        scores = self.opened.run(payload.inputs[0].as_numpy())
        output = InferOutput("scores", list(scores.shape), "FP32")
        output.set_data_from_numpy(scores, binary_data=True)
        return InferResponse(payload.id, self.name, [output])


ModelServer(
    http_port=int(os.environ["BENCH_PORT_2"]),
    grpc_port=PORT,
    workers=1,
    enable_latency_logging=False,
    access_log_format=None,
).start([Onnx(name) for name in NAMES])
