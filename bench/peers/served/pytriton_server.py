"""PyTriton with dynamic batching."""

import os

from models import NAMES, PORT, ROWS_MAX, Opened
from numpy import float32
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

config = TritonConfig(
    grpc_port=PORT,
    grpc_address="127.0.0.1",
    http_port=int(os.environ["BENCH_PORT_2"]),
    http_address="127.0.0.1",
    allow_metrics=False,
)
with Triton(config=config) as triton:
    for name in NAMES:
        opened = Opened(name)

        @batch
        def infer(opened=opened, **inputs):
            return {"scores": opened.run(inputs["features"])}

        triton.bind(
            model_name=name,
            infer_func=infer,
            inputs=[Tensor(name="features", dtype=float32, shape=opened.shape)],
            outputs=[Tensor(name="scores", dtype=float32, shape=opened.scores_shape)],
            config=ModelConfig(max_batch_size=ROWS_MAX, batcher=DynamicBatcher()),
        )
    triton.serve()
