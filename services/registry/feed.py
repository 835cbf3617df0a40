"""What happened, over HTTP: platform events and dead letters, read from the bus as they lie there.

    GET /v1/events?project=default&after=120&limit=100
    GET /v1/dead-letters?after=-20

`after` is the `last` of the answer before; a negative one starts so many messages before the end.
"""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from libs.bus import DEAD_LETTERS, EVENTS, ID_HEADER, TRACE_HEADER, Bus, Delivery, ReadFailed
from libs.contracts.envelope import Envelope
from libs.contracts.pipeline import is_name
from libs.doors import Invalid, Unavailable

LIMIT_DEFAULT = 100
LIMIT_MAX = 1000
PAYLOAD_SHOWN_CHARACTERS = 2000


def routes(bus: Bus) -> list[Route]:
    return [
        Route("/v1/events", endpoint(bus, read_events)),
        Route("/v1/dead-letters", endpoint(bus, read_dead_letters)),
    ]


def endpoint(
    bus: Bus, read: Callable[[Bus, Any], Awaitable[dict[str, Any]]]
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            body = await read(bus, request.query_params)
        except ReadFailed as error:
            raise Unavailable(f"the bus did not answer: {error}") from error
        return Response(msgspec.json.encode(body), media_type="application/json")

    return answer


async def read_events(bus: Bus, query: Any) -> dict[str, Any]:
    project = query.get("project", "")
    if project and not is_name(project):
        raise Invalid(f"{project!r} is not a name", "project")
    after, limit = window(query)
    found = await bus.read(EVENTS, f"events.{project or '*'}.>", after, limit)
    return {"events": [shown_event(one) for one in found], "last": last_of(found, after)}


async def read_dead_letters(bus: Bus, query: Any) -> dict[str, Any]:
    after, limit = window(query)
    found = await bus.read(DEAD_LETTERS, "dlq.>", after, limit)
    shown = [shown_dead_letter(one) for one in found]
    return {"dead_letters": shown, "last": last_of(found, after)}


def window(query: Any) -> tuple[int, int]:
    """(after, limit) of a query. Raises `Invalid`."""
    after = number_of(query, "after", 0)
    limit = number_of(query, "limit", LIMIT_DEFAULT)
    if not 1 <= limit <= LIMIT_MAX:
        raise Invalid(f"1 to {LIMIT_MAX}, got {limit}", "limit")
    return after, limit


def number_of(query: Any, name: str, default: int) -> int:
    text = query.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise Invalid(f"a whole number, got {text!r}", name) from error


def last_of(found: list[Delivery], after: int) -> int:
    return found[-1].sequence if found else max(after, 0)


def shown_event(delivery: Delivery) -> dict[str, Any]:
    place = {"sequence": delivery.sequence, "subject": delivery.subject}
    try:
        envelope = msgspec.json.decode(delivery.payload, type=Envelope)
    except msgspec.DecodeError as error:
        return {**place, "error": f"not an event: {error}"}
    return {**place, **msgspec.structs.asdict(envelope)}


def shown_dead_letter(delivery: Delivery) -> dict[str, Any]:
    headers = delivery.headers
    text = delivery.payload[: PAYLOAD_SHOWN_CHARACTERS * 4].decode(errors="replace")
    return {
        "sequence": delivery.sequence,
        "subject": delivery.subject,
        "reason": headers.get("Leptonic-Reason", ""),
        "from_subject": headers.get("Leptonic-Subject", ""),
        "from_sequence": int(headers.get("Leptonic-Sequence", "0")),
        "message_id": headers.get("Leptonic-Msg-Id", headers.get(ID_HEADER, "")),
        "traceparent": headers.get(TRACE_HEADER, ""),
        "at": datetime.fromtimestamp(delivery.stored_at_ns / 1e9, UTC).isoformat(),
        "size_bytes": len(delivery.payload),
        "payload": text[:PAYLOAD_SHOWN_CHARACTERS],
    }
