"""Every event that was ever written can be read, for ever."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from libs.contracts.envelope import decode, encode
from libs.contracts.events import BY_TYPE, EVENTS, Event, JobCancelled, subject_of, type_of

SAMPLES = Path(__file__).parent.parent / "samples"
STORED = sorted(SAMPLES.glob("*.json"))


def name_of(kind: type[Event]) -> str:
    return f"{kind.entity}.{kind.verb}.v{kind.version}"


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_sample_is_read_and_written_as_it_was(path: Path) -> None:
    document: dict[str, Any] = json.loads(path.read_text())
    envelope, event = decode(path.read_bytes())
    assert path.stem == name_of(type(event))
    again = encode(
        event,
        id=envelope.id,
        service=envelope.source.removeprefix("/leptonic/"),
        time=envelope.time,
        traceparent=envelope.traceparent,
    )
    assert json.loads(again) == document


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_sample_is_a_cloud_event(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["specversion"] == "1.0"
    assert document["datacontenttype"] == "application/json"
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", document["traceparent"])
    assert datetime.fromisoformat(document["time"]).tzinfo is not None
    assert document["source"].startswith("/leptonic/")


def test_every_event_has_a_sample() -> None:
    assert {path.stem for path in STORED} >= {name_of(kind) for kind in EVENTS}


def test_every_event_class_is_listed_once() -> None:
    assert len(set(EVENTS)) == len(EVENTS) == len(BY_TYPE)
    assert set(Event.__subclasses__()) == set(EVENTS)


@pytest.mark.parametrize("kind", EVENTS, ids=lambda kind: kind.__name__)
def test_types_and_subjects_have_the_documented_form(kind: type[Event]) -> None:
    assert re.fullmatch(r"ai\.leptonic\.[a-z_]+\.([a-z]+ed|ready)\.v[1-9]\d*", type_of(kind))
    _, event = decode((SAMPLES / f"{name_of(kind)}.json").read_bytes())
    assert subject_of(event) == f"events.default.{kind.entity}.{kind.verb}"
    assert type_of(event) == f"ai.leptonic.{kind.entity}.{kind.verb}.v{kind.version}"


def test_a_newer_writer_may_add_fields() -> None:
    document = json.loads((SAMPLES / "job.cancelled.v1.json").read_text())
    document["data"]["colour"] = "green"
    document["partitionkey"] = "an extension we do not know"
    _, event = decode(json.dumps(document).encode())
    assert isinstance(event, JobCancelled)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "truncated"),
        (b"\xff", "malformed"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `specversion`"),
    ],
)
def test_what_is_no_event_is_refused(payload: bytes, said: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=said):
        decode(payload)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"type": "ai.leptonic.job.cancelled.v9"}, "unknown event type 'ai.leptonic.job.cancelled"),
        ({"data": {"project": "p"}}, "missing required field `job`"),
        ({"data": {"project": "p", "job": 3}}, r"Expected `str`, got `int` - at `\$.job`"),
        ({"id": None}, "Expected `str`, got `null`"),
    ],
)
def test_an_event_of_another_shape_is_refused(changes: dict[str, Any], said: str) -> None:
    document = json.loads((SAMPLES / "job.cancelled.v1.json").read_text())
    with pytest.raises(msgspec.ValidationError, match=said):
        decode(json.dumps(document | changes).encode())
