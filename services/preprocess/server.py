"""`leptonic.v1.Preprocess`."""

from typing import Any

from google.protobuf import json_format

from libs import doors
from libs.contracts.protos import preprocess_pb2 as pb
from libs.contracts.protos import preprocess_pb2_grpc
from libs.database import TRANSIENT
from services.preprocess import domain, drift, store, worker
from services.preprocess.handlers import Context
from services.preprocess.request_log import SOURCE as REQUESTS
from services.preprocess.store import Version

SERVICE = pb.DESCRIPTOR.services_by_name["Preprocess"]


class Servicer(preprocess_pb2_grpc.PreprocessServicer):
    def __init__(self, context: Context) -> None:
        self.context = context
        self.store = context.store

    async def ListDatasetVersions(
        self, request: pb.ListDatasetVersionsRequest, _: Any
    ) -> pb.ListDatasetVersionsResponse:
        """Without their manifests."""
        versions = await self.store.versions(request.project, request.dataset)
        return pb.ListDatasetVersionsResponse(versions=[message_of(one) for one in versions])

    async def GetDatasetVersion(
        self, request: pb.GetDatasetVersionRequest, _: Any
    ) -> pb.DatasetVersion:
        version = await self.store.version(request.project, request.dataset, request.number)
        if version is None:
            problem = f"dataset {request.dataset!r} has no version {request.number}"
            raise doors.NotFound(problem, "number")
        return with_manifest(version)

    async def BuildDatasetVersion(
        self, request: pb.BuildDatasetVersionRequest, _: Any
    ) -> pb.DatasetVersion:
        state = await self.pipeline_of(request.project, request.dataset)
        try:
            version = await worker.build(self.context, state.project, state.pipeline, domain.MANUAL)
        except worker.UNUSABLE as error:
            raise doors.Conflict(str(error), "dataset") from error
        except TRANSIENT as error:
            raise doors.Unavailable(f"nothing was built: {error}") from error
        assert version is not None
        return with_manifest(version)

    async def GetDrift(self, request: pb.GetDriftRequest, _: Any) -> pb.Drift:
        """Of the last window that was judged, or of the one that is filling."""
        state = await self.pipeline_of(request.project, request.dataset)
        manifest = await self.store.manifest(state)
        if manifest is None:
            raise doors.NotFound(f"{request.dataset!r} has no version to compare with", "dataset")
        reference = drift.references(manifest.statistics, manifest.schema)
        answer = pb.Drift(reference_digest=state.version_digest)
        for source in (domain.RECORDS, REQUESTS):
            async with self.store.db.transaction() as tx:
                window = await store.window(tx, state, source)
            rows, measures = drift.shown(window, reference, state.learned)
            answer.features.extend(
                pb.FeatureDrift(
                    source=source, feature=m.feature, psi=m.psi, ks=m.ks, window_rows=rows
                )
                for m in measures
            )
        return answer

    async def pipeline_of(self, project: str, dataset: str) -> domain.State:
        state = await self.store.pipeline_of(project, dataset=dataset)
        if state is None:
            raise doors.NotFound(f"no pipeline uses a dataset {dataset!r}: apply one", "dataset")
        return state


def message_of(version: Version) -> pb.DatasetVersion:
    return pb.DatasetVersion(
        project=version.project,
        dataset=version.dataset,
        number=version.number,
        digest=version.digest,
        rows=version.rows,
        reason=version.reason,
        created_at=version.created_at,
        traceparent=version.traceparent,
    )


def with_manifest(version: Version) -> pb.DatasetVersion:
    message = message_of(version)
    json_format.ParseDict(version.manifest, message.manifest)
    return message
