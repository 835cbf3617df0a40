"""What is asked about predictions afterwards: the platform's own API of this service.

Apart from `server.py`: `leptonic serve` has no database, and its driver is a fifth of the start-up.
"""

import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from google.protobuf import json_format

from libs import telemetry
from libs.bus import TRACE_HEADER, Bus, PublishFailed
from libs.contracts.pipeline import is_name
from libs.contracts.protos import inference_pb2, inference_pb2_grpc
from libs.database import TRANSIENT, Database, Transaction
from libs.doors import Invalid, NotFound, Unavailable
from services.inference import domain, feedback, store
from services.inference.endpoint import Endpoint
from services.inference.endpoints import Endpoints

Context = Any
"""`rpc.Context`; None where a method asks nothing of it."""


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
            known |= {
                "number": target.number,
                "percent": target.percent,
                "quarantined": str(target.number) in endpoint.quarantined,
            }
            targets.append(inference_pb2.EndpointTarget(**known))
        return inference_pb2.Endpoint(
            model=endpoint.model, generation=endpoint.generation, targets=targets
        )
