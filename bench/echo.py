"""An empty grpc.aio echo: the floor of any Python gRPC server. Prints its port."""

import sys

import grpc
import uvloop


async def echo(request: bytes, _: object) -> bytes:
    return request


async def main() -> None:
    server = grpc.aio.server()
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
    methods = {"ModelInfer": grpc.unary_unary_rpc_method_handler(echo)}
    service = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port)
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main())
