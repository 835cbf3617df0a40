"""The doors: `leptonic.v1.Ingest` over gRPC and HTTP, and records over HTTP."""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pyarrow as pa
from google.protobuf import json_format
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from libs import telemetry
from libs.bus import TRACE_HEADER, Bus
from libs.contracts.protos import ingest_pb2, ingest_pb2_grpc
from libs.database import TRANSIENT, Database
from libs.doors import Invalid, NotFound, Refused, Unavailable
from services.ingest import meters, store
from services.ingest.domain import Place
from services.ingest.domain import Refused as RefusedRecord
from services.ingest.layout import Layout, layout_of
from services.ingest.records import Decoded, Unreadable, from_csv, from_json, from_ndjson
from services.ingest.tables import chunks, from_arrow, from_parquet, ipc_bytes

BODY_BYTES_MAX = 64 << 20
CHUNK_BYTES = 1 << 20
CHUNKS_AT_ONCE = 8
REFUSALS_MAX = 100
PARTS_MAX = 1000
RECORDS_PATH = "/v1/projects/{project}/datasets/{dataset}/records"
FORMATS: dict[str, Callable[[Layout, bytes], Decoded]] = {
    "application/json": from_json,
    "application/x-ndjson": from_ndjson,
    "text/csv": from_csv,
    "application/vnd.apache.parquet": from_parquet,
    "application/vnd.apache.arrow.stream": from_arrow,
}


class UnsupportedType(Invalid):
    http_status = 415


class TooLarge(Invalid):
    http_status = 413


class Servicer(ingest_pb2_grpc.IngestServicer):
    """`leptonic.v1.Ingest`."""

    def __init__(self, db: Database) -> None:
        self.db = db

    async def ListDatasets(
        self, request: ingest_pb2.ListDatasetsRequest, _: Any
    ) -> ingest_pb2.ListDatasetsResponse:
        rows = await store.datasets(self.db, request.project)
        return ingest_pb2.ListDatasetsResponse(datasets=[dataset_of(row) for row in rows])

    async def GetDataset(self, request: ingest_pb2.GetDatasetRequest, _: Any) -> ingest_pb2.Dataset:
        return dataset_of(await self.known(Place(request.project, request.dataset)))

    async def ListParts(
        self, request: ingest_pb2.ListPartsRequest, _: Any
    ) -> ingest_pb2.ListPartsResponse:
        if request.limit < 0:
            raise Invalid(f"0 or more, got {request.limit}", "limit")
        place = Place(request.project, request.dataset)
        await self.known(place)
        limit = min(request.limit or PARTS_MAX, PARTS_MAX)
        rows = await store.parts(self.db, place, request.after, limit)
        return ingest_pb2.ListPartsResponse(parts=[part_of(row) for row in rows])

    async def known(self, place: Place) -> dict[str, Any]:
        """Raises `NotFound`."""
        row = await store.dataset(self.db, place)
        if row is None:
            raise NotFound(f"no dataset {place.dataset!r} in project {place.project!r}", "dataset")
        return row


def dataset_of(row: dict[str, Any]) -> ingest_pb2.Dataset:
    message = ingest_pb2.Dataset(
        project=row["project"],
        dataset=row["dataset"],
        rows=row["rows"],
        parts=row["parts"],
        duplicates=row["duplicates"],
        dead_letters=row["dead_letters"],
        pipeline=row["pipeline"],
    )
    json_format.ParseDict(msgspec.json.decode(row["schema"]), message.schema)
    return message


def part_of(row: dict[str, Any]) -> ingest_pb2.Part:
    return ingest_pb2.Part(
        number=row["number"],
        digest=row["digest"],
        key=row["key"],
        rows=row["rows"],
        size_bytes=row["size_bytes"],
        traceparent=row["traceparent"],
        landed_at=row["landed_at"].isoformat(),
    )


class RecordsDoor:
    """Checks a body, publishes what fits as Arrow messages, and says what did not and why."""

    def __init__(self, bus: Bus, db: Database) -> None:
        self.bus = bus
        self.db = db

    @property
    def route(self) -> Route:
        return Route(RECORDS_PATH, self.take, methods=["POST"])

    async def take(self, request: Request) -> Response:
        with telemetry.span(
            f"POST {RECORDS_PATH}",
            kind=telemetry.SpanKind.SERVER,
            parent=request.headers.get(TRACE_HEADER, ""),
        ) as span:
            try:
                return await self.answer(request)
            except Refused as error:
                telemetry.mark_failed(span, str(error))
                raise
            except TRANSIENT as error:
                telemetry.mark_failed(span, str(error))
                raise Unavailable(f"{error}: try again, with an Idempotency-Key") from error

    async def answer(self, request: Request) -> Response:
        place = Place(request.path_params["project"], request.path_params["dataset"])
        layout = layout_of(await self.schema(place))
        read = format_of(request, layout)
        body = await body_of(request)
        try:
            accepted, refused = await asyncio.to_thread(read, layout, body)
        except Unreadable as error:
            raise Invalid(str(error), "body") from error
        is_table = isinstance(accepted.rows, pa.Table)
        table = accepted.rows if is_table else layout.table(accepted.rows)
        await self.publish(place, table, request.headers.get("Idempotency-Key", ""))
        count = sum(one.records for one in refused)
        meters.REFUSED.labels(place.project, place.dataset).inc(count)
        return JSONResponse(
            {
                "accepted": len(accepted.index),
                "refused": count,
                "refusals": [refusal_of(one) for one in refused[:REFUSALS_MAX]],
            },
            status_code=202,
        )

    async def schema(self, place: Place) -> bytes:
        """Raises `NotFound`."""
        async with self.db.transaction() as tx:
            schema = await store.schema_of(tx, place)
        if schema is None:
            raise NotFound(f"no dataset {place.dataset!r} in project {place.project!r}", "dataset")
        return schema

    async def publish(self, place: Place, table: pa.Table, key: str) -> None:
        """The same body with the same `Idempotency-Key` has the same message ids."""
        prefix = f"{place.subject}:{key}" if key else str(uuid.uuid4())
        payloads = [ipc_bytes(chunk) for chunk in chunks(table, CHUNK_BYTES)]
        with telemetry.span(f"publish {place.subject}", kind=telemetry.SpanKind.PRODUCER) as span:
            span.set_attribute("leptonic.records", len(table))
            headers = {TRACE_HEADER: telemetry.current()}
            for start in range(0, len(payloads), CHUNKS_AT_ONCE):
                some = enumerate(payloads[start : start + CHUNKS_AT_ONCE], start)
                await self.publish_some(
                    place, [(f"{prefix}:{number}", payload) for number, payload in some], headers
                )

    async def publish_some(
        self, place: Place, messages: list[tuple[str, bytes]], headers: dict[str, str]
    ) -> None:
        """Raises `PublishFailed` once all have been tried."""
        results = await asyncio.gather(
            *(
                self.bus.publish(place.subject, payload, id=msg_id, headers=headers)
                for msg_id, payload in messages
            ),
            return_exceptions=True,
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result


def format_of(request: Request, layout: Layout) -> Callable[[Layout, bytes], Decoded]:
    """Raises `UnsupportedType`, or `Invalid` for a format that cannot carry this schema."""
    name = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if name not in FORMATS:
        raise UnsupportedType(f"{name!r} is none of {', '.join(FORMATS)}", "Content-Type")
    if name == "text/csv":
        for column, field in layout.schema.items():
            if field.shape:
                problem = f"shape {field.shape} does not fit a CSV cell: send JSON, Parquet, Arrow"
                raise Invalid(problem, column)
    return FORMATS[name]


async def body_of(request: Request) -> bytes:
    """Raises `TooLarge` before holding more than the limit."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_BYTES_MAX:
            raise TooLarge(f"more than {BODY_BYTES_MAX} bytes: send several requests", "body")
    return bytes(body)


def refusal_of(refused: RefusedRecord) -> dict[str, Any]:
    problem = refused.problem
    return {"index": refused.index, "field": problem.field, "reason": problem.reason}
