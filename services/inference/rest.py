"""The Open Inference Protocol over HTTP, with Triton's extensions.

What is rare goes through the same servicer as gRPC: its messages are the JSON bodies. Inference has
a form of its own (`bodies.py`).
"""

import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import Any

import msgspec
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from libs.bus import TRACE_HEADER
from libs.contracts.protos import open_inference_pb2 as oip
from libs.doors import Exhausted, Invalid, NotFound, Refused
from libs.doors.serve import http_app
from services.inference import generate, openapi
from services.inference.bodies import HEADER_LENGTH, Exchange
from services.inference.calls import Answer, Call
from services.inference.guard import Guard
from services.inference.httpbody import body_of, object_of, sent, struct_of, while_there
from services.inference.messages import plain
from services.inference.server import OpenInference

RETRY_AFTER_S = "1"
UNAVAILABLE = 503
GONE = 499
"""As others call it: the client closed its request."""
U32_MAX = (1 << 32) - 1
Endpoint = Callable[[Request], Awaitable[Response]]


class Rest:
    def __init__(self, service: OpenInference) -> None:
        self.service = service
        self.endpoints = service.endpoints
        self.exchange = Exchange(service.endpoints, service.memory)

    def routes(self) -> list[Route]:
        """One for each path: a verb that it does not take is told all that it does."""
        found: dict[str, list[openapi.Operation]] = {}
        for one in openapi.operations():
            found.setdefault(one.path, []).append(one)
        return [
            Route(path, answering(getattr(self, same[0].handler)), methods=[s.verb for s in same])
            for path, same in found.items()
        ]

    async def server(self, _: Request) -> Response:
        return of(await self.service.ServerMetadata(oip.ServerMetadataRequest(), None))

    async def live(self, _: Request) -> Response:
        return JSONResponse({"live": True})

    async def is_ready(self, _: Request) -> Response:
        state = await self.service.ServerReady(oip.ServerReadyRequest(), None)
        return JSONResponse({"ready": state.ready}, 200 if state.ready else 503)

    async def metadata(self, request: Request) -> Response:
        asked = oip.ModelMetadataRequest(**named(request))
        return of(await self.service.ModelMetadata(asked, None))

    async def model_ready(self, request: Request) -> Response:
        place = named(request)
        state = await self.service.ModelReady(oip.ModelReadyRequest(**place), None)
        if not state.ready:
            raise NotFound(f"Request for unknown model: '{place['name']}' is not ready")
        return JSONResponse({"name": place["name"], "ready": True})

    async def config(self, request: Request) -> Response:
        asked = oip.ModelConfigRequest(**named(request))
        return of((await self.service.ModelConfig(asked, None)).config)

    async def statistics(self, request: Request) -> Response:
        asked = oip.ModelStatisticsRequest(**named(request))
        return of(await self.service.ModelStatistics(asked, None))

    async def index(self, request: Request) -> Response:
        wanted = await struct_of(request, openapi.IndexRequest)
        asked = oip.RepositoryIndexRequest(ready=wanted.ready)
        found = await self.service.RepositoryIndex(asked, None)
        return JSONResponse([plain(one) for one in found.models])

    async def load(self, request: Request) -> Response:
        asked = oip.RepositoryModelLoadRequest(**await control_of(request))
        await self.service.RepositoryModelLoad(asked, None)
        return Response()

    async def unload(self, request: Request) -> Response:
        asked = oip.RepositoryModelUnloadRequest(**await control_of(request))
        await self.service.RepositoryModelUnload(asked, None)
        return Response()

    async def trace(self, request: Request) -> Response:
        asked = oip.TraceSettingRequest(model_name=request.path_params.get("model", ""))
        if request.method == "POST":
            given = await object_of(request, dict[str, str | list[str] | None])
            for name, value in given.items():
                values = [value] if isinstance(value, str) else value or []
                asked.settings[name].value.extend(values)
        found = await self.service.TraceSetting(asked, None)
        return JSONResponse({name: traced(name, one) for name, one in found.settings.items()})

    async def logging(self, request: Request) -> Response:
        asked = oip.LogSettingsRequest()
        if request.method == "POST":
            given = await object_of(request, dict[str, bool | openapi.U32 | float | str])
            for name, value in given.items():
                asked.settings[name].CopyFrom(log_setting(name, value))
        found = await self.service.LogSettings(asked, None)
        return JSONResponse(
            {name: next(iter(plain(one).values())) for name, one in found.settings.items()}
        )

    async def system_status(self, request: Request) -> Response:
        asked = oip.SystemSharedMemoryStatusRequest(**region_of(request))
        found = await self.service.SystemSharedMemoryStatus(asked, None)
        return JSONResponse([plain(one) for one in found.regions.values()])

    async def system_register(self, request: Request) -> Response:
        wanted = await struct_of(request, openapi.Registration)
        fields = {**msgspec.structs.asdict(wanted), **region_of(request)}
        asked = oip.SystemSharedMemoryRegisterRequest(**fields)
        await self.service.SystemSharedMemoryRegister(asked, None)
        return Response()

    async def system_unregister(self, request: Request) -> Response:
        asked = oip.SystemSharedMemoryUnregisterRequest(**region_of(request))
        await self.service.SystemSharedMemoryUnregister(asked, None)
        return Response()

    async def cuda_status(self, request: Request) -> Response:
        asked = oip.CudaSharedMemoryStatusRequest(**region_of(request))
        found = await self.service.CudaSharedMemoryStatus(asked, None)
        return JSONResponse([plain(one) for one in found.regions.values()])

    async def cuda_register(self, request: Request) -> Response:
        wanted = await struct_of(request, openapi.CudaRegistration)
        asked = oip.CudaSharedMemoryRegisterRequest(
            **region_of(request),
            raw_handle=from_base64("raw_handle.b64", wanted.raw_handle.b64),
            device_id=wanted.device_id,
            byte_size=wanted.byte_size,
        )
        await self.service.CudaSharedMemoryRegister(asked, None)
        return Response()

    async def cuda_unregister(self, request: Request) -> Response:
        asked = oip.CudaSharedMemoryUnregisterRequest(**region_of(request))
        await self.service.CudaSharedMemoryUnregister(asked, None)
        return Response()

    async def infer(self, request: Request) -> Response:
        place = named(request)
        await self.check_known(**place)
        work = self.exchange.infer(
            place["name"],
            place["version"],
            await body_of(request),
            request.headers.get(HEADER_LENGTH),
            request.headers.get(TRACE_HEADER, ""),
        )
        body = await while_there(request, work)
        return await sent(request, body)

    async def check_known(self, name: str, version: str) -> None:
        """Before its body is read. What sleeps is woken behind it: only then it is seen when the
        client goes. Raises `Refused`."""
        if not self.endpoints.is_asleep(name):
            await self.endpoints.bring(name)
            self.endpoints.is_decoupled(name, version)

    async def generate(self, request: Request) -> Response:
        work = generate.only(self.endpoints.stream(await self.generated_call(request)))
        return JSONResponse(generate.fields_of(await while_there(request, work)))

    async def generate_stream(self, request: Request) -> Response:
        """What is wrong before the first answer has a status; what comes later is an event."""
        answers = self.endpoints.stream(await self.generated_call(request))
        first = await anext(answers, None)
        return StreamingResponse(events(first, answers), media_type=openapi.EVENTS)

    async def generated_call(self, request: Request) -> Call:
        place = named(request)
        await self.check_known(**place)
        body = await object_of(request, dict[str, Any])
        await while_there(request, self.endpoints.bring(place["name"]))
        signature = self.endpoints.served(**place).signature
        parent = request.headers.get(TRACE_HEADER, "")
        return generate.call_of(place["name"], place["version"], signature, body, parent)


def app_of(
    service: OpenInference, tokens: Collection[str], extra: Sequence[Route] = ()
) -> Starlette:
    """What listens on port 8000."""
    routes = [*Rest(service).routes(), *extra]
    document = openapi.document(asks_for_token=bool(tokens))
    app = http_app("Open Inference Protocol", [], service.ready, routes, document)
    app.add_middleware(Guard, tokens=tokens)
    return app


def answering(endpoint: Endpoint) -> Endpoint:
    """Every refusal as Triton words it: `{"error": ...}`."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exhausted as error:
            headers = {"Retry-After": RETRY_AFTER_S}
            return JSONResponse({"error": str(error)}, UNAVAILABLE, headers)
        except Refused as error:
            return JSONResponse({"error": str(error)}, error.http_status)
        except ClientDisconnect:
            return Response(status_code=GONE)  # for the count of requests; nobody reads it

    return answer


def of(message: Message) -> Response:
    return JSONResponse(plain(message))


def named(request: Request) -> dict[str, str]:
    found = request.path_params
    return {"name": found.get("model", ""), "version": found.get("version", "")}


def region_of(request: Request) -> dict[str, str]:
    return {"name": request.path_params.get("region", "")}


async def control_of(request: Request) -> dict[str, Any]:
    """Of a load or an unload; files come in base64."""
    given = await struct_of(request, openapi.ControlRequest)
    parameters = {n: repository_parameter(n, value) for n, value in given.parameters.items()}
    return {"model_name": request.path_params["model"], "parameters": parameters}


def repository_parameter(name: str, value: bool | int | str) -> oip.ModelRepositoryParameter:
    if isinstance(value, bool):
        return oip.ModelRepositoryParameter(bool_param=value)
    if isinstance(value, int):
        return oip.ModelRepositoryParameter(int64_param=value)
    if name.startswith("file:"):
        return oip.ModelRepositoryParameter(bytes_param=from_base64(name, value))
    return oip.ModelRepositoryParameter(string_param=value)


def from_base64(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise Invalid(f"not base64: {error}", name) from error


def traced(name: str, value: oip.TraceSettingResponse.SettingValue) -> str | list[str]:
    """A level is a list, whatever its length."""
    values = list(value.value)
    return values[0] if name != "trace_level" and len(values) == 1 else values


def log_setting(name: str, value: bool | float | str) -> oip.LogSettingsRequest.SettingValue:
    """A whole number may be written as 1.0."""
    if isinstance(value, bool):
        return oip.LogSettingsRequest.SettingValue(bool_param=value)
    if isinstance(value, float):
        if not value.is_integer() or not 0 <= value <= U32_MAX:
            raise Invalid(f"a whole number from 0 to {U32_MAX}, got {value}", name)
        value = int(value)
    if isinstance(value, int):
        return oip.LogSettingsRequest.SettingValue(uint32_param=value)
    return oip.LogSettingsRequest.SettingValue(string_param=value)


async def events(first: Answer | None, others: AsyncIterator[Answer]) -> AsyncIterator[bytes]:
    if first is None:
        return
    yield event(generate.fields_of(first))
    try:
        async for answer in others:
            yield event(generate.fields_of(answer))
    except Refused as error:
        yield event({"error": str(error)})


def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"
