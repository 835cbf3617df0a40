"""The CloudEvents 1.0 envelope that every event travels in."""

import msgspec

from libs.contracts.events import BY_TYPE, Event, type_of

SOURCE_PREFIX = "/leptonic/"


class Envelope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """CloudEvents 1.0, structured mode, with the distributed tracing extension."""

    specversion: str
    id: str
    source: str
    type: str
    time: str
    datacontenttype: str = ""
    traceparent: str = ""
    data: msgspec.Raw


def encode(event: Event, *, id: str, service: str, time: str, traceparent: str = "") -> bytes:
    """Event -> CloudEvents JSON. `time` is RFC 3339, `id` unique for ever."""
    envelope = Envelope(
        specversion="1.0",
        id=id,
        source=SOURCE_PREFIX + service,
        type=type_of(event),
        time=time,
        datacontenttype="application/json",
        traceparent=traceparent,
        data=msgspec.Raw(msgspec.json.encode(event)),
    )
    return msgspec.json.encode(envelope)


class UnknownType(msgspec.ValidationError):
    """An event, of a type that another release reads."""


def decode(payload: bytes) -> tuple[Envelope, Event]:
    """CloudEvents JSON -> (envelope, event); fields that are not known are passed over.

    Raises `UnknownType`, or `msgspec.ValidationError` for a payload that is no event.
    """
    envelope = msgspec.json.decode(payload, type=Envelope)
    kind = BY_TYPE.get(envelope.type)
    if kind is None:
        raise UnknownType(f"unknown event type {envelope.type!r}")
    return envelope, msgspec.json.decode(envelope.data, type=kind)
