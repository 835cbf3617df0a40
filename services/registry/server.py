"""The registry's doors: `leptonic.v1.Registry`, the only gRPC and HTTP types of the service."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct

from libs.contracts import pipeline as pipelines
from libs.contracts.events import Target
from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.database import TRANSIENT, Transaction
from libs.doors import Conflict, Invalid, NotFound, Unavailable
from services.registry import handlers, store
from services.registry.handlers import Context

YAML_BYTES_MAX = 256 << 10


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """What was wrong, as the status a caller can act on."""
    try:
        yield
    except pipelines.Invalid as error:
        raise Invalid(error.problem, error.field) from error
    except handlers.Unknown as error:
        raise NotFound(error.problem, error.field) from error
    except handlers.Refused as error:
        raise Conflict(error.problem, error.field) from error
    except TRANSIENT as error:
        raise Unavailable(f"Postgres does not answer: {error}") from error


def named(**names: str) -> None:
    """Refuses what is no name, with the field that holds it."""
    for field, name in names.items():
        if not pipelines.is_name(name):
            raise Invalid(f"{name!r} is not a name", field)


class Registry(registry_pb2_grpc.RegistryServicer):
    def __init__(self, context: Context) -> None:
        self.context = context

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[Transaction]:
        with answered():
            async with self.context.db.transaction() as tx:
                yield tx

    async def ApplyPipeline(self, request: pb.ApplyPipelineRequest, _: Any) -> pb.Pipeline:
        named(project=request.project)
        if len(request.yaml.encode()) > YAML_BYTES_MAX:
            raise Invalid(f"at most {YAML_BYTES_MAX} bytes, got {len(request.yaml)}", "yaml")
        with answered():
            pipeline = pipelines.parse(request.yaml)
            row = await handlers.apply_pipeline(self.context, request.project, pipeline)
        return pipeline_of(row)

    async def ListPipelines(
        self, request: pb.ListPipelinesRequest, _: Any
    ) -> pb.ListPipelinesResponse:
        named(project=request.project)
        async with self.reading() as tx:
            rows = await store.pipeline_rows(tx, request.project)
        return pb.ListPipelinesResponse(pipelines=[pipeline_of(row) for row in rows])

    async def GetPipeline(self, request: pb.GetPipelineRequest, _: Any) -> pb.Pipeline:
        named(project=request.project, pipeline=request.pipeline)
        async with self.reading() as tx:
            row = await store.pipeline_row(tx, request.project, request.pipeline)
        if row is None:
            raise NotFound(f"no pipeline {request.pipeline!r}", "pipeline")
        return pipeline_of(row)

    async def ListModels(self, request: pb.ListModelsRequest, _: Any) -> pb.ListModelsResponse:
        named(project=request.project)
        async with self.reading() as tx:
            rows = await store.model_rows(tx, request.project)
        return pb.ListModelsResponse(models=[model_of(row) for row in rows])

    async def ListModelVersions(
        self, request: pb.ListModelVersionsRequest, _: Any
    ) -> pb.ListModelVersionsResponse:
        named(project=request.project, model=request.model)
        async with self.reading() as tx:
            rows = await store.version_rows(tx, request.project, request.model)
        return pb.ListModelVersionsResponse(versions=[version_of(row) for row in rows])

    async def GetModelVersion(self, request: pb.GetModelVersionRequest, _: Any) -> pb.ModelVersion:
        named(project=request.project, model=request.model)
        async with self.reading() as tx:
            number = await self.number_of(tx, request)
            row = await store.version_row(tx, request.project, request.model, number)
        if row is None:
            raise NotFound(f"model {request.model!r} has no version {number}", "version")
        return version_of(row)

    async def number_of(self, tx: Transaction, request: pb.GetModelVersionRequest) -> int:
        """`3` or `@champion`."""
        text = request.version
        if text.isascii() and text.isdigit() and len(text) < 10:
            return int(text)
        if not text.startswith("@") or not pipelines.is_name(text[1:]):
            raise Invalid(f"{text!r} is neither a number nor an alias like @champion", "version")
        number = await store.number_of_alias(tx, request.project, request.model, text[1:])
        if number is None:
            raise NotFound(f"model {request.model!r} has no alias {text[1:]!r}", "version")
        return number

    async def SetAlias(self, request: pb.SetAliasRequest, _: Any) -> pb.ModelVersion:
        named(project=request.project, model=request.model, alias=request.alias)
        if not 1 <= request.number < 1 << 31:
            raise Invalid(f"a version number is 1 or more, got {request.number}", "number")
        with answered():
            row = await handlers.set_alias(
                self.context, request.project, request.model, request.alias, request.number
            )
        return version_of(row)

    async def ListDeployments(
        self, request: pb.ListDeploymentsRequest, _: Any
    ) -> pb.ListDeploymentsResponse:
        named(project=request.project)
        async with self.reading() as tx:
            rows = await store.deployment_rows(tx, request.project)
        return pb.ListDeploymentsResponse(deployments=[deployment_of(row) for row in rows])

    async def GetDeployment(self, request: pb.GetDeploymentRequest, _: Any) -> pb.Deployment:
        named(project=request.project, model=request.model)
        async with self.reading() as tx:
            row = await store.deployment_row(tx, request.project, request.model)
        if row is None:
            raise NotFound(f"model {request.model!r} is not deployed", "model")
        return deployment_of(row)


def struct(value: dict[str, Any]) -> Struct:
    return json_format.ParseDict(value, Struct())


def pipeline_of(row: store.Row) -> pb.Pipeline:
    return pb.Pipeline(
        project=row["project"],
        pipeline=row["pipeline"],
        revision=row["revision"],
        spec=struct(row["spec"]),
        applied_at=row["applied_at"].isoformat(),
    )


def model_of(row: store.Row) -> pb.Model:
    return pb.Model(
        project=row["project"],
        model=row["model"],
        versions=row["versions"],
        aliases=row["aliases"],
    )


def version_of(row: store.Row) -> pb.ModelVersion:
    return pb.ModelVersion(
        project=row["project"],
        model=row["model"],
        number=row["number"],
        digest=row["digest"],
        state=row["state"],
        job=row["job"],
        aliases=row["aliases"],
        metrics=row["manifest"]["metrics"],
        checks=[struct(check) for check in row["checks"]],
        manifest=struct(row["manifest"]),
        traceparent=row["traceparent"],
        registered_at=row["registered_at"].isoformat(),
    )


def deployment_of(row: store.Row) -> pb.Deployment:
    deployment = store.deployment_of(row)
    return pb.Deployment(
        project=deployment.project,
        model=deployment.model,
        generation=deployment.generation,
        replicas=deployment.settings.replicas,
        targets=[target_of(one) for one in deployment.targets],
        batching=struct(row["settings"]["batching"]),
        request_log_percent=deployment.settings.request_log_percent,
        state=deployment.state,
        ready_generation=row["ready_generation"],
        autoscaling=struct(row["settings"].get("autoscaling", {})),
    )


def target_of(one: Target) -> pb.TrafficTarget:
    return pb.TrafficTarget(
        number=one.number, percent=one.percent, digest=one.digest, traceparent=one.traceparent
    )
