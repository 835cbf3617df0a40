"""Asks the registry over gRPC which version serves now."""

import grpc
from google.protobuf import json_format

from libs import telemetry
from libs.contracts.protos import registry_pb2, registry_pb2_grpc
from services.trainer.domain import Champion

TIMEOUT_S = 5.0
ALIAS = "@champion"


class Away(ConnectionError):
    """The registry did not answer."""


class Registry:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = registry_pb2_grpc.RegistryStub(channel)

    async def champion(self, project: str, model: str) -> Champion | None:
        """None while the model has none. Raises `Away`."""
        request = registry_pb2.GetModelVersionRequest(project=project, model=model, version=ALIAS)
        metadata = (("traceparent", telemetry.current()),)
        try:
            answer = await self.stub.GetModelVersion(request, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise Away(f"registry: {error.code().name}: {error.details()}") from error
        manifest = json_format.MessageToDict(answer.manifest)
        return Champion(answer.number, manifest["graph"]["digest"])
