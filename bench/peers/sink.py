"""Takes the spans of the server that is measured, and counts them: tracing is on, or it is not."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"


class Sink:
    """An OTLP/gRPC endpoint on loopback, in this process: on the client's core."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.spans = 0
        self.server = grpc.server(ThreadPoolExecutor(1))
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]]
        methods = {"Export": grpc.unary_unary_rpc_method_handler(self.export)}
        service = grpc.method_handlers_generic_handler(SERVICE, methods)
        self.server.add_generic_rpc_handlers((service,))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def export(self, message: bytes, _: grpc.ServicerContext) -> bytes:
        scopes = [
            scope
            for resource in ExportTraceServiceRequest.FromString(message).resource_spans
            for scope in resource.scope_spans
        ]
        with self.lock:
            self.spans += sum(len(scope.spans) for scope in scopes)
        return b""


@contextlib.contextmanager
def listening() -> Iterator[Sink]:
    sink = Sink()
    sink.server.start()
    try:
        yield sink
    finally:
        sink.server.stop(None).wait()
