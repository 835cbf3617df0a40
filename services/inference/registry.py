"""What the registry desires, asked over gRPC."""

import grpc
import msgspec
from google.protobuf import json_format

from libs import telemetry
from libs.contracts.events import DeploymentUpdated, Target
from libs.contracts.pipeline import Batching
from libs.contracts.protos import registry_pb2, registry_pb2_grpc

TIMEOUT_S = 5.0


class Away(ConnectionError):
    """The registry did not answer."""


class Registry:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = registry_pb2_grpc.RegistryStub(channel)

    async def deployments(self, project: str) -> list[DeploymentUpdated]:
        """Those that have something to serve. Raises `Away`."""
        request = registry_pb2.ListDeploymentsRequest(project=project)
        metadata = (("traceparent", telemetry.current()),)
        try:
            answer = await self.stub.ListDeployments(request, timeout=TIMEOUT_S, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise Away(f"registry: {error.code().name}: {error.details()}") from error
        return [deployment_of(one) for one in answer.deployments if one.targets]


def deployment_of(one: registry_pb2.Deployment) -> DeploymentUpdated:
    batching = msgspec.convert(json_format.MessageToDict(one.batching), Batching, strict=False)
    return DeploymentUpdated(
        project=one.project,
        model=one.model,
        generation=one.generation,
        replicas=one.replicas,
        targets=[Target(t.number, t.percent, t.digest, t.traceparent) for t in one.targets],
        batching=msgspec.to_builtins(batching),
        request_log_percent=one.request_log_percent,
        autoscaling=json_format.MessageToDict(one.autoscaling),
    )
