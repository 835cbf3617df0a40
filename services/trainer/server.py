"""The trainer's doors: `leptonic.v1.Trainer`, the only gRPC and HTTP types of the service."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from psycopg.rows import DictRow

from libs.contracts.pipeline import is_name
from libs.contracts.protos import trainer_pb2 as pb
from libs.contracts.protos import trainer_pb2_grpc
from libs.database import TRANSIENT, Database, Transaction
from libs.doors import Invalid, NotFound, Unavailable
from services.trainer import store


class Trainer(trainer_pb2_grpc.TrainerServicer):
    def __init__(self, db: Database) -> None:
        self.db = db

    @contextlib.asynccontextmanager
    async def reading(self, project: str) -> AsyncIterator[Transaction]:
        if not is_name(project):
            raise Invalid(f"{project!r} is not a name", "project")
        try:
            async with self.db.transaction() as tx:
                yield tx
        except TRANSIENT as error:
            raise Unavailable(f"Postgres does not answer: {error}") from error

    async def ListRuns(self, request: pb.ListRunsRequest, _: Any) -> pb.ListRunsResponse:
        async with self.reading(request.project) as tx:
            rows = await store.run_rows(tx, request.project)
            epochs = await store.epoch_rows(tx, request.project, [row["job"] for row in rows])
        return pb.ListRunsResponse(runs=[run_of(row, epochs) for row in rows])

    async def GetRun(self, request: pb.GetRunRequest, _: Any) -> pb.Run:
        async with self.reading(request.project) as tx:
            row = await store.run_row(tx, request.project, request.job)
            epochs = await store.epoch_rows(tx, request.project, [request.job])
        if row is None:
            raise NotFound(f"no run of job {request.job!r}", "job")
        return run_of(row, epochs)


def run_of(row: DictRow, epochs: list[DictRow]) -> pb.Run:
    own = [one for one in epochs if one["job"] == row["job"]]
    return pb.Run(
        project=row["project"],
        job=row["job"],
        attempt=row["attempt"],
        state=row["state"],
        recipe=row["spec"].get("train", {}).get("recipe", ""),
        epochs=[pb.Epoch(epoch=one["epoch"], metrics=one["metrics"]) for one in own],
        reason=row["reason"],
        result=json_format.ParseDict(row["result"], Struct()),
    )
