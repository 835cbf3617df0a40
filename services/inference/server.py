"""The gRPC doors: the Open Inference Protocol, and what is asked about predictions afterwards."""

import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import msgspec
from google.protobuf import json_format

from libs import telemetry
from libs.bus import TRACE_HEADER, Bus, PublishFailed
from libs.contracts.pipeline import is_name
from libs.contracts.protos import inference_pb2, inference_pb2_grpc, open_inference_pb2_grpc
from libs.contracts.protos import open_inference_pb2 as oip
from libs.database import TRANSIENT, Database, Transaction
from libs.doors import Invalid, NotFound, Refused, Unavailable
from libs.doors.drain import Ready
from services.inference import domain, feedback, store, tensors
from services.inference.endpoints import PLATFORM, Answer, Call, Endpoint, Endpoints, Served
from services.inference.statistics import Duration
from services.inference.tensors import CONTENTS, Given

SERVER_VERSION = "0.1.0"
EXTENSIONS = ("binary_tensor_data", "statistics", "model_repository")
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
"""Opens its own span: one a request."""
MICROSECONDS = 1e6
Context = grpc.aio.ServicerContext[Any, Any]


class OpenInference(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, endpoints: Endpoints, name: str, ready: Ready) -> None:
        self.endpoints = endpoints
        self.name = name
        self.ready = ready

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
        versions, served = self.endpoints.described(request.name, request.version)
        signature = served.model.signature
        kind = oip.ModelMetadataResponse.TensorMetadata
        return oip.ModelMetadataResponse(
            name=request.name,
            versions=versions,
            platform=PLATFORM,
            inputs=[kind(**msgspec.structs.asdict(tensor)) for tensor in signature.inputs],
            outputs=[kind(**msgspec.structs.asdict(tensor)) for tensor in signature.outputs],
        )

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Context) -> Any:
        return await self.infer(request, context)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[oip.ModelInferRequest], context: Context
    ) -> AsyncIterator[oip.ModelStreamInferResponse]:
        """An error is an answer: the stream goes on."""
        async for request in request_iterator:
            try:
                response = await self.infer(request, context)
            except Refused as error:
                named = oip.ModelInferResponse(id=request.id, model_name=request.model_name)
                yield oip.ModelStreamInferResponse(error_message=str(error), infer_response=named)
            else:
                yield oip.ModelStreamInferResponse(infer_response=response)

    async def infer(
        self, request: oip.ModelInferRequest, context: Context
    ) -> oip.ModelInferResponse:
        answer = await self.endpoints.infer(call_of(request, context))
        return response_of(answer, raw=bool(request.raw_input_contents))

    async def ModelStatistics(self, request: oip.ModelStatisticsRequest, context: Context) -> Any:
        found = self.endpoints.versions(request.name, request.version)
        return oip.ModelStatisticsResponse(model_stats=[statistics_of(one) for one in found])

    async def RepositoryIndex(self, request: oip.RepositoryIndexRequest, context: Context) -> Any:
        rows = self.endpoints.index(request.ready)
        kind = oip.RepositoryIndexResponse.ModelIndex
        return oip.RepositoryIndexResponse(
            models=[kind(name=n, version=v, state=s, reason=r) for n, v, s, r in rows]
        )


def call_of(request: oip.ModelInferRequest, context: Context) -> Call:
    metadata = dict(context.invocation_metadata() or ())
    return Call(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        given=given_of(request),
        outputs=[output.name for output in request.outputs],
        timeout_s=timeout_s(request, context),
        traceparent=str(metadata.get(TRACE_HEADER, "")),
    )


def timeout_s(request: oip.ModelInferRequest, context: Context) -> float | None:
    """The sooner of the call's deadline and the `timeout` parameter, in us, of Triton's clients."""
    left = [context.time_remaining()]
    if "timeout" in request.parameters:
        left.append(request.parameters["timeout"].int64_param / MICROSECONDS)
    return min((one for one in left if one is not None), default=None)


def given_of(request: oip.ModelInferRequest) -> list[Given]:
    raws = request.raw_input_contents
    if not raws:
        return [with_values(tensor) for tensor in request.inputs]
    if len(raws) != len(request.inputs):
        raise Invalid(
            f"got {len(raws)} buffers for {len(request.inputs)} inputs", "raw_input_contents"
        )
    for tensor in request.inputs:
        if tensor.HasField("contents"):
            raise Invalid(
                "contents field must not be specified when using raw_input_contents "
                f"for '{tensor.name}' for model '{request.model_name}'"
            )
    return [
        Given(tensor.name, tensor.datatype, tensor.shape, raw=raw)
        for tensor, raw in zip(request.inputs, raws, strict=True)
    ]


def with_values(tensor: Any) -> Given:
    field = CONTENTS.get(tensor.datatype)
    values = getattr(tensor.contents, field) if field else ()
    return Given(tensor.name, tensor.datatype, tensor.shape, values=values)


def response_of(answer: Answer, raw: bool) -> oip.ModelInferResponse:
    """Raw when the request was, else typed contents."""
    response = oip.ModelInferResponse(
        model_name=answer.model, model_version=str(answer.number), id=answer.id
    )
    if answer.traceparent:
        response.parameters[TRACE_HEADER].string_param = answer.traceparent
    for tensor, array in answer.outputs:
        output = response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
        if raw:
            response.raw_output_contents.append(tensors.to_raw(tensor.datatype, array))
        else:
            values = getattr(output.contents, CONTENTS[tensor.datatype])
            values.extend(tensors.to_values(tensor.datatype, array))
    return response


def statistics_of(served: Served) -> oip.ModelStatistics:
    known = served.statistics
    return oip.ModelStatistics(
        name=known.labels[0],
        version=known.labels[1],
        last_inference=known.last_inference_ms,
        inference_count=known.inference_count,
        execution_count=known.execution_count,
        inference_stats=oip.InferStatistics(
            success=duration_of(known.success),
            fail=duration_of(known.fail),
            queue=duration_of(known.queue),
            compute_input=duration_of(Duration(known.success.count)),
            compute_infer=duration_of(known.compute_infer),
            compute_output=duration_of(Duration(known.success.count)),
        ),
        batch_stats=[
            oip.InferBatchStatistics(batch_size=rows, compute_infer=duration_of(spent))
            for rows, spent in sorted(known.batches.items())
        ],
    )


def duration_of(spent: Duration) -> oip.StatisticDuration:
    return oip.StatisticDuration(count=spent.count, ns=spent.ns)


class Inference(inference_pb2_grpc.InferenceServicer):
    """The platform's own API."""

    def __init__(self, db: Database, bus: Bus, endpoints: Endpoints) -> None:
        self.db = db
        self.bus = bus
        self.endpoints = endpoints

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Transaction]:
        try:
            async with self.db.transaction() as tx:
                yield tx
        except TRANSIENT as error:
            raise Unavailable(f"Postgres does not answer: {error}") from error

    def project(self, named: str) -> str:
        project = named or self.endpoints.project
        if not is_name(project):
            raise Invalid(f"{project!r} is not a name", "project")
        return project

    async def SendFeedback(
        self, request: inference_pb2.SendFeedbackRequest, context: Context | None
    ) -> inference_pb2.SendFeedbackResponse:
        """Durable when answered; joined with its request as soon as that is logged."""
        project = self.project(request.project)
        label = json_format.MessageToDict(request.label) if request.HasField("label") else None
        problem = domain.problem_of(request.request_id, label)
        if problem:
            raise Invalid(problem)
        if not is_name(request.model):
            raise Invalid(f"{request.model!r} is not a name", "model")
        async with self.reading() as tx:
            known = await store.is_deployed(tx, project, request.model)
        if not known:
            raise NotFound(f"Request for unknown model: '{request.model}' is not found")
        payload = msgspec.json.encode(feedback.Label(request.request_id, label))
        try:
            await self.bus.publish(
                f"feedback.{project}.{request.model}",
                payload,
                id=uuid.uuid4().hex,
                headers={TRACE_HEADER: telemetry.current()},
            )
        except PublishFailed as error:
            raise Unavailable(f"the label is not kept, send it again: {error}") from error
        return inference_pb2.SendFeedbackResponse()

    async def GetPrediction(
        self, request: inference_pb2.GetPredictionRequest, context: Context | None
    ) -> inference_pb2.Prediction:
        project = self.project(request.project)
        if not domain.is_id(request.request_id):
            raise Invalid(f"{request.request_id!r} is no request's id", "request_id")
        async with self.reading() as tx:
            row = await store.prediction(tx, project, request.request_id)
        if row is None:
            raise NotFound(f"no prediction {request.request_id!r} is logged", "request_id")
        found = inference_pb2.Prediction(
            project=project,
            model=row["model"],
            number=row["number"],
            request_id=row["request_id"],
            trace_id=row["traceparent"].split("-")[1] if row["traceparent"] else "",
            at=row["at"].isoformat(),
        )
        json_format.ParseDict(row["inputs"], found.inputs)
        json_format.ParseDict(row["outputs"], found.outputs)
        if row["label"] is not None:
            json_format.Parse(json.dumps(row["label"]), found.label)
        return found

    async def ListEndpoints(
        self, request: inference_pb2.ListEndpointsRequest, context: Context | None
    ) -> inference_pb2.ListEndpointsResponse:
        project = self.project(request.project)
        found = [e for e in self.endpoints.by_key.values() if e.project == project]
        return inference_pb2.ListEndpointsResponse(
            endpoints=[await self.endpoint(e) for e in found]
        )

    async def endpoint(self, endpoint: Endpoint) -> inference_pb2.Endpoint:
        if endpoint.deployment is None:
            return inference_pb2.Endpoint(model=endpoint.model)
        async with self.reading() as tx:
            counts = await store.tallies(tx, endpoint.deployment)
        targets = []
        for target in endpoint.deployment.targets:
            known = msgspec.structs.asdict(counts[target.number]) if target.number in counts else {}
            known |= {"number": target.number, "percent": target.percent}
            targets.append(inference_pb2.EndpointTarget(**known))
        return inference_pb2.Endpoint(
            model=endpoint.model, generation=endpoint.generation, targets=targets
        )
