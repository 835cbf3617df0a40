"""A bare grpc.aio server with uvloop: nothing around the model; identity is an echo."""

import grpc
import uvloop
from models import NAMES, PORT, Opened
from numpy import float32, frombuffer

from libs.contracts.protos.open_inference_pb2 import ModelInferRequest, ModelInferResponse

OPENED = {name: Opened(name) for name in NAMES if name != "identity"}


async def infer(message: bytes, _: object) -> bytes:
    request = ModelInferRequest.FromString(message)
    raw, shape = request.raw_input_contents[0], request.inputs[0].shape
    if request.model_name in OPENED:
        scores = OPENED[request.model_name].run(frombuffer(raw, float32).reshape(shape))
        raw, shape = scores.tobytes(), scores.shape
    response = ModelInferResponse(model_name=request.model_name, model_version="1")
    response.outputs.add(name="scores", datatype="FP32", shape=shape)
    response.raw_output_contents.append(raw)
    return response.SerializeToString()


async def main() -> None:
    server = grpc.aio.server()
    methods = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
    server.add_generic_rpc_handlers((service,))
    server.add_insecure_port(f"127.0.0.1:{PORT}")
    await server.start()
    await server.wait_for_termination()


uvloop.run(main())
