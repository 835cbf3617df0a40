"""A servicer that remembers what it was asked."""

import asyncio
from typing import Any

from google.protobuf.message import Message

from libs import telemetry
from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.doors import Refused

SERVICE = pb.DESCRIPTOR.services_by_name["Registry"]


class Desk(registry_pb2_grpc.RegistryServicer):
    def __init__(self) -> None:
        self.request: Message | None = None
        self.refusal: Refused | None = None
        self.is_ready = True
        self.traceparent = ""
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def ready(self) -> bool:
        return self.is_ready

    async def take(self, request: Message) -> None:
        self.request = request
        self.traceparent = telemetry.current()
        self.asked.set()
        await self.may_answer.wait()
        if self.refusal is not None:
            raise self.refusal

    async def SetAlias(self, request: pb.SetAliasRequest, _: Any) -> pb.ModelVersion:
        await self.take(request)
        return pb.ModelVersion(project=request.project, number=request.number)

    async def GetModelVersion(self, request: pb.GetModelVersionRequest, _: Any) -> pb.ModelVersion:
        await self.take(request)
        return pb.ModelVersion(model=request.model)

    async def ListModels(self, request: pb.ListModelsRequest, _: Any) -> pb.ListModelsResponse:
        await self.take(request)
        return pb.ListModelsResponse()
