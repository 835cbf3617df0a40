"""The Open Inference Protocol with Triton's extensions; HTTP asks the same object."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, Protocol

import grpc

from libs.contracts.protos import open_inference_pb2 as oip
from libs.contracts.protos import open_inference_pb2_grpc
from libs.doors import Conflict, Invalid, NotFound, Refused
from libs.doors.drain import Ready
from services.inference import protocol
from services.inference.controls import Controls
from services.inference.endpoints import Endpoints
from services.inference.sharedmemory import SharedMemory
from services.inference.streams import Stream

SERVER_VERSION = "0.1.0"
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
MODEL_STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
"""Both open their own spans: one a request."""
UNLOAD_DEPENDENTS = "unload_dependents"
Context = Any
"""`rpc.Context`; None where a method asks nothing of it."""


class Unsupported(Refused):
    code = grpc.StatusCode.UNIMPLEMENTED


class Repository(Protocol):
    """Where models are loaded from on a client's demand. Raises `Refused`."""

    async def load(self, name: str, config: str = "", files: Mapping[str, bytes] = ...) -> None: ...

    async def unload(self, name: str) -> None: ...

    async def index(self, ready_only: bool) -> list[tuple[str, str, str, str]]: ...


class Deployed:
    """The models of the platform: deployments decide what is served, and clients look."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints = endpoints

    async def index(self, ready_only: bool) -> list[tuple[str, str, str, str]]:
        return self.endpoints.index(ready_only)

    async def load(self, name: str, config: str = "", files: Mapping[str, bytes] = {}) -> None:
        raise Conflict(f"failed to load '{name}': deployments decide what is served here")

    async def unload(self, name: str) -> None:
        raise Conflict(f"failed to unload '{name}': deployments decide what is served here")


class OpenInference(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The protocol; HTTP asks the same object."""

    def __init__(
        self, endpoints: Endpoints, name: str, ready: Ready, repository: Repository | None = None
    ) -> None:
        """Without a repository, deployments decide what is served."""
        self.endpoints = endpoints
        self.name = name
        self.ready = ready
        self.repository = repository or Deployed(endpoints)
        self.memory = SharedMemory()
        self.controls = Controls(endpoints)
        self.changes: set[asyncio.Task[None]] = set()
        """Of the repository, on clients' demand."""

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> Any:
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> Any:
        return oip.ServerReadyResponse(ready=await self.ready())

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> Any:
        ready = self.endpoints.is_ready(request.name, request.version)
        return oip.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: oip.ServerMetadataRequest, context: Context) -> Any:
        return oip.ServerMetadataResponse(
            name=self.name, version=SERVER_VERSION, extensions=EXTENSIONS
        )

    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Context) -> Any:
        await self.endpoints.bring(request.name)
        versions, served = self.endpoints.described(request.name, request.version)
        return protocol.metadata_of(request.name, versions, served)

    async def ModelConfig(self, request: oip.ModelConfigRequest, context: Context) -> Any:
        await self.endpoints.bring(request.name)
        served = self.endpoints.served(request.name, request.version)
        return oip.ModelConfigResponse(config=served.config)

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Context) -> Any:
        call, wanted = protocol.call_of(request, self.memory, context)
        if not call.forwarded:
            await self.endpoints.bring(call.model, call.deadline_ns)
        if self.endpoints.is_decoupled(call.model, call.version):
            raise Unsupported(
                "ModelInfer RPC doesn't support models with decoupled transaction policy: "
                f"ask '{call.model}' with ModelStreamInfer"
            )
        answer = await self.endpoints.infer(call)
        return await protocol.response_of(answer, wanted)

    def ModelStreamInfer(
        self, request_iterator: AsyncIterator[oip.ModelInferRequest], context: Context
    ) -> AsyncIterator[oip.ModelStreamInferResponse]:
        return Stream(self.endpoints, self.memory, context).answers(request_iterator)

    async def ModelStatistics(self, request: oip.ModelStatisticsRequest, context: Context) -> Any:
        found = self.endpoints.versions(request.name, request.version)
        rows = [protocol.statistics_of(one) for one in found]
        return oip.ModelStatisticsResponse(model_stats=rows)

    async def RepositoryIndex(self, request: oip.RepositoryIndexRequest, context: Context) -> Any:
        check_one_repository(request.repository_name)
        rows = await self.repository.index(request.ready)
        kind = oip.RepositoryIndexResponse.ModelIndex
        return oip.RepositoryIndexResponse(
            models=[kind(name=n, version=v, state=s, reason=r) for n, v, s, r in rows]
        )

    async def RepositoryModelLoad(
        self, request: oip.RepositoryModelLoadRequest, context: Context
    ) -> Any:
        check_one_repository(request.repository_name)
        config, files = protocol.load_of(request.parameters)
        await self.kept(self.repository.load(request.model_name, config, files))
        return oip.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: oip.RepositoryModelUnloadRequest, context: Context
    ) -> Any:
        """No model depends on another, so `unload_dependents` changes nothing."""
        check_one_repository(request.repository_name)
        for name, value in request.parameters.items():
            if name != UNLOAD_DEPENDENTS:
                raise Invalid(f"unrecognized unload parameter '{name}': '{UNLOAD_DEPENDENTS}' is")
            protocol.chosen(name, value, "bool_param")
        await self.kept(self.repository.unload(request.model_name))
        return oip.RepositoryModelUnloadResponse()

    async def kept(self, change: Coroutine[Any, Any, None]) -> None:
        """To its end, also when the client has gone: half a load leaves a process behind, half an
        unload its threads."""
        task = asyncio.create_task(change)
        self.changes.add(task)
        task.add_done_callback(self.changes.discard)
        await asyncio.shield(task)

    async def SystemSharedMemoryStatus(
        self, request: oip.SystemSharedMemoryStatusRequest, context: Context
    ) -> Any:
        kind = oip.SystemSharedMemoryStatusResponse.RegionStatus
        found = {
            one.name: kind(name=one.name, key=one.key, offset=one.offset, byte_size=one.byte_size)
            for one in self.memory.status(request.name)
        }
        return oip.SystemSharedMemoryStatusResponse(regions=found)

    async def SystemSharedMemoryRegister(
        self, request: oip.SystemSharedMemoryRegisterRequest, context: Context
    ) -> Any:
        self.memory.register(request.name, request.key, request.offset, request.byte_size)
        return oip.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(
        self, request: oip.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> Any:
        self.memory.unregister(request.name)
        return oip.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(
        self, request: oip.CudaSharedMemoryStatusRequest, context: Context
    ) -> Any:
        if request.name:
            raise NotFound(f"Unable to find cuda shared memory region: '{request.name}'")
        return oip.CudaSharedMemoryStatusResponse()

    async def CudaSharedMemoryRegister(
        self, request: oip.CudaSharedMemoryRegisterRequest, context: Context
    ) -> Any:
        raise Invalid(
            f"failed to register CUDA shared memory region: '{request.name}', GPUs not supported"
        )

    async def CudaSharedMemoryUnregister(
        self, request: oip.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> Any:
        """There is none, which is what is asked for."""
        return oip.CudaSharedMemoryUnregisterResponse()

    async def TraceSetting(self, request: oip.TraceSettingRequest, context: Context) -> Any:
        changes = {name: list(one.value) for name, one in request.settings.items()}
        found = self.controls.trace(request.model_name, changes)
        kind = oip.TraceSettingResponse.SettingValue
        settings = {name: kind(value=values) for name, values in found.items()}
        return oip.TraceSettingResponse(settings=settings)

    async def LogSettings(self, request: oip.LogSettingsRequest, context: Context) -> Any:
        changes = {n: protocol.log_value(n, one) for n, one in request.settings.items()}
        settings = {n: protocol.log_setting(v) for n, v in self.controls.log(changes).items()}
        return oip.LogSettingsResponse(settings=settings)


def check_one_repository(name: str) -> None:
    if name:
        raise Unsupported("'repository_name' specification is not supported: there is one")
