"""From a prediction's span one can walk to the registration and the roll-out of its version."""

from typing import Any

import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from libs.bus.jetstream import JetStreamBus
from libs.objectstore import ObjectStore
from services.inference.app import Settings
from services.inference.tests import stage
from services.inference.tests.conftest import ROW, Replica, request, started
from services.inference.tests.stage import DEPLOYED, REGISTERED, Platform, register
from stack.testing import eventually

CALLER = "00-" + "e" * 32 + "-" + "f" * 16 + "-01"
UNSAMPLED = "00-" + "e" * 32 + "-" + "f" * 16 + "-00"


@pytest.fixture
async def digits(
    spans: InMemorySpanExporter, replica: Replica, platform: Platform, objects: ObjectStore
) -> Replica:
    await platform.place()
    await platform.deploy(1, await register(objects, 1, 100, stage.digits()))
    await replica.until_announced(1)
    return replica


def place_of(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


async def of_requests(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    """Nobody waits for a span: a request's may end a moment after its client has the answer."""
    return await eventually(lambda: named(spans, "infer digits"))  # type: ignore[no-any-return]


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


async def test_a_request_is_one_span_that_continues_the_caller_and_links_its_version(
    digits: Replica, spans: InMemorySpanExporter
) -> None:
    answer = await digits.oip.ModelInfer(request(ROW, id="r"), metadata=(("traceparent", CALLER),))
    (span,) = await of_requests(spans)
    (load,) = named(spans, "deployment load")
    assert [one for one in spans.get_finished_spans() if one.kind is SpanKind.SERVER] == [span]
    assert span.parent is not None
    assert place_of(span.parent) == CALLER
    assert answer.parameters["traceparent"].string_param == place_of(span.context)
    assert [place_of(link.context) for link in span.links] == [REGISTERED, place_of(load.context)]
    attributes = dict(span.attributes or {})
    assert [attributes[f"leptonic.{name}"] for name in ("request_id", "version", "generation")] == [
        "r", 1, 1,
    ]  # fmt: skip
    assert load.parent is not None
    assert place_of(load.parent) == DEPLOYED


async def test_http_continues_the_caller_too(digits: Replica, spans: InMemorySpanExporter) -> None:
    asked = {"name": "pixels", "datatype": "FP32", "shape": [1, 4], "data": ROW}
    await digits.http.post(
        "/v2/models/digits/infer", json={"inputs": [asked]}, headers={"traceparent": CALLER}
    )
    (span,) = await of_requests(spans)
    assert span.parent is not None
    assert place_of(span.parent) == CALLER


async def test_so_many_are_traced_beside_those_whose_callers_trace(
    spans: InMemorySpanExporter,
    settings: Settings,
    bus: JetStreamBus,
    platform: Platform,
    objects: ObjectStore,
) -> None:
    async with started(replace(settings, traces_per_s=0), bus) as replica:
        await platform.place()
        await platform.deploy(1, await register(objects, 1, 100, stage.digits()))
        await replica.until_announced(1)
        for metadata in ((("traceparent", CALLER),), (("traceparent", UNSAMPLED),), ()):
            await replica.oip.ModelInfer(request(ROW, id=str(metadata)), metadata=metadata)
    (span,) = named(spans, "infer digits")
    assert span.parent is not None
    assert place_of(span.parent) == CALLER
