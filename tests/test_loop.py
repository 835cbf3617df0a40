"""Promise 2: one trace, from the publish of the records to the prediction."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from libs.settings import SERVICES
from stack.testing import eventually
from tests.running import (
    ROOT,
    STACKS,
    Stack,
    digits,
    digits_pipeline,
    running_stack,
    until,
)
from tests.test_observability import documented_of

pytestmark = pytest.mark.slow

EDGES = [
    ("publish", "ingest"),
    ("ingest", "preprocess"),
    ("preprocess", "trainer"),
    ("trainer", "scheduler"),
    ("scheduler", "trainer"),
    ("scheduler", "registry"),
    ("trainer", "registry"),
    ("registry", "inference"),
]
ENDINGS = {"counter": "_total"}
TURNED = {
    "ingest": ["leptonic_ingest_records_landed_total", "leptonic_ingest_batch_records_count"],
    "preprocess": ["leptonic_preprocess_version_rows", "leptonic_preprocess_build_seconds_count"],
    "trainer": [
        "leptonic_trainer_samples_total",
        "leptonic_trainer_epoch",
        "leptonic_trainer_ray_up",
    ],
    "scheduler": ["leptonic_scheduler_wait_seconds_count", "leptonic_scheduler_capacity_cores"],
    "registry": ["leptonic_events_published_total", "leptonic_object_store_seconds_count"],
    "inference": ["leptonic_inference_requests_total", "leptonic_inference_traffic_percent"],
}
"""What one turn of the loop must have counted."""
SIGNALS = ("spans", "metrics", "logs")

PUBLISH_AND_TRACE = """
import asyncio, json, sys
from libs import telemetry
from libs.bus.jetstream import connect
from tests.running import digits, publish

async def main(nats_url, dataset):
    async with connect(nats_url, name="publisher") as bus:
        with telemetry.span(f"publish records.default.{dataset}", kind=telemetry.SpanKind.PRODUCER):
            headers = {"traceparent": telemetry.current()}
            await publish(bus, dataset, digits(0, 600), headers=headers)
            print(headers["traceparent"])

nats_url, otlp, dataset = sys.argv[1:]
with telemetry.start("publish", otlp):
    asyncio.run(main(nats_url, dataset))
"""

PREDICT = """
import json, sys
import numpy as np
import tritonclient.grpc as triton
address, model, rows, traceparent = sys.argv[1:]
pixels = np.array(json.loads(rows), dtype=np.float32)
tensor = triton.InferInput("pixels", list(pixels.shape), "FP32")
tensor.set_data_from_numpy(pixels)
client = triton.InferenceServerClient(address)
caller = {"traceparent": traceparent}
answer = client.infer(model, [tensor], request_id="asked-by-a-test", headers=caller)
response = answer.get_response()
labels = answer.as_numpy("label").tolist()
print(json.dumps({"label": labels, "version": response.model_version}))
"""


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def served(stack: Stack, model: str) -> dict[str, Any]:
    return await stack.event("deployment.ready", lambda data: data["model"] == model)


@pytest.fixture(scope="module", params=STACKS)
def story(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """One turn of the loop, and every span of it, read back from the collector."""
    import asyncio

    return asyncio.run(one_turn(tmp_path_factory.mktemp("loop") / "data", request.param))


async def one_turn(data_dir: Path, kind: str) -> dict[str, Any]:
    async with running_stack(data_dir, kind) as stack:
        await stack.apply(digits_pipeline("digits", 600))
        traceparent = run(
            PUBLISH_AND_TRACE, stack.endpoint("nats"), stack.endpoint("otlp"), "digits"
        )
        await served(stack, "digits")
        rows = digits(1000, 50)
        caller = "00-" + "7" * 32 + "-" + "8" * 16 + "-01"
        answer = json.loads(
            run(
                PREDICT,
                stack.endpoint("inference_grpc"),
                "digits",
                json.dumps([row["pixels"] for row in rows]),
                caller,
            )
        )
        published = traceparent.split("-")[1]

        async def whole() -> dict[str, Any] | None:
            found = await stack.try_get("traces", f"/v1/story/{'7' * 32}")
            spans = found.get("spans", [])
            traces = {span["trace_id"] for span in spans}
            return found if published in traces else None

        found = await until(whole, "the prediction's story does not reach the publish", 20)
        await stack.event("deployment.ready", lambda data: data["model"] == "digits")
        prediction = await until(
            lambda: stack.try_get(
                "inference_api", "/v1/projects/default/predictions/asked-by-a-test"
            ),
            "the prediction is not in the log",
            20,
        )
        ten_lines = (ROOT / "examples" / "ten_lines.py").read_text()
        said = run(ten_lines, stack.endpoint("nats"), stack.endpoint("inference_grpc"))

        async def landed() -> bool:
            dataset = await stack.try_get("ingest", "/v1/projects/default/datasets/digits")
            return bool(dataset.get("rows") == "601")

        await until(landed, "the stranger's record did not land", 20)
        return {
            "said": said,
            "feedback": await labelled(stack),
            "lines": {service: stack.log(service) for service in (*SERVICES, "collector")},
            "holes": {service: await holes(stack, service) for service in SERVICES},
            "spans": found["spans"],
            "published": published,
            "answer": answer,
            "labels": [row["label"] for row in rows],
            "prediction": prediction,
        }


async def labelled(stack: Stack) -> list[dict[str, Any]]:
    """The spans of a label that a caller with a trace sent for the prediction."""
    body = {"model": "digits", "request_id": "asked-by-a-test", "label": 3}
    caller = {"traceparent": "00-" + "9" * 32 + "-" + "8" * 16 + "-01"}
    url = stack.endpoint("inference_http") + "/v1/feedback"
    response = await stack.http.post(url, json=body, headers=caller)
    assert response.status_code == 200, response.text

    async def kept() -> list[dict[str, Any]] | None:
        spans = (await stack.try_get("traces", f"/v1/traces/{'9' * 32}")).get("spans", [])
        return spans if "feedback digits" in {span["name"] for span in spans} else None

    found: list[dict[str, Any]] = await until(kept, "the label is not kept", 20)
    return found


async def holes(stack: Stack, service: str) -> dict[str, str]:
    """Signal -> what of it does not arrive; "" where nothing is missing."""
    heard = (await stack.get("traces", "/v1/services"))["services"]
    known = {one["name"] for one in heard if one["spans"]}
    return {
        "spans": "" if service in known else f"the collector knows only {sorted(known)}",
        "metrics": await lacking(stack, service),
        "logs": await untraced(stack, service),
    }


async def lacking(stack: Stack, service: str) -> str:
    """Documented metrics that it does not expose, and what it should have counted by now."""
    door = "inference_metrics" if service == "inference" else service
    text = (await stack.http.get(stack.endpoint(door) + "/metrics")).text
    families = list(text_string_to_metric_families(text))
    exposed = {sample.name for family in families for sample in family.samples}
    exposed |= {family.name + ENDINGS.get(family.type, "") for family in families}
    counted = {
        (sample.name, sample.labels.get("outcome"), sample.labels.get("dependency"))
        for family in families
        for sample in family.samples
        if sample.value > 0
    }
    due: set[tuple[str, str | None, str | None]]
    due = {("leptonic_consumer_messages_total", "handled", None)}
    due |= {("leptonic_requests_total", None, None)}
    needs = ("nats", "postgres") if service == "scheduler" else ("nats", "postgres", "s3")
    due |= {("leptonic_dependency_up", None, one) for one in needs}
    due |= {(name, None, None) for name in TURNED[service]}
    missing = sorted(set(documented_of(service)) - exposed)
    return ", ".join([*missing, *(str(one) for one in sorted(due - counted, key=str))])


async def untraced(stack: Stack, service: str) -> str:
    """Trace ids of its log that the collector does not know."""
    lines = [json.loads(line) for line in stack.log(service)]
    ids = {line["trace_id"] for line in lines if "trace_id" in line}

    async def unknown() -> list[str]:
        return [one for one in ids if not await stack.try_get("traces", f"/v1/traces/{one}")]

    async def all_known() -> bool:
        return not await unknown()

    try:
        await eventually(all_known)
    except AssertionError:
        return f"unknown traces {await unknown()}"
    return "" if ids else "no line with a trace id"


def test_every_signal_of_every_service_arrives(story: dict[str, Any]) -> None:
    """Service x signal; what is missing is printed as the matrix with its holes."""
    found = story["holes"]
    drawn = "\n".join(
        f"{service:<11}" + "  ".join(f"{s}: {found[service][s] or 'there'}" for s in SIGNALS)
        for service in SERVICES
    )
    assert not any(found[service][signal] for service in SERVICES for signal in SIGNALS), drawn


def test_every_line_of_every_log_is_json(story: dict[str, Any]) -> None:
    for service, lines in story["lines"].items():
        assert lines, service
        for line in lines:
            record = json.loads(line)
            assert record["service"] == service
            assert {"time", "level", "logger", "message"} <= record.keys()


def test_a_label_is_kept_in_the_trace_of_whoever_sent_it(story: dict[str, Any]) -> None:
    spans = {span["span_id"]: span for span in story["feedback"]}
    (kept,) = [span for span in spans.values() if span["name"] == "feedback digits"]
    assert spans[kept["parent_id"]]["name"] == "POST /v1/feedback"


def test_the_served_model_has_learned_digits(story: dict[str, Any]) -> None:
    right = sum(a == b for a, b in zip(story["answer"]["label"], story["labels"], strict=True))
    assert right >= 40
    assert story["answer"]["version"] == "1"


def test_each_step_is_a_descendant_of_the_step_before(story: dict[str, Any]) -> None:
    """The directed edges of the loop, in spans that the collector received."""
    spans = {span["span_id"]: span for span in story["spans"]}

    def ancestors(span: dict[str, Any]) -> set[str]:
        services = set()
        todo = [span]
        seen = set()
        while todo:
            one = todo.pop()
            above = [one["parent_id"], *(link["span_id"] for link in one["links"])]
            for parent in (spans[a] for a in above if a in spans and a not in seen):
                seen.add(parent["span_id"])
                services.add(parent["service"])
                todo.append(parent)
        return services

    missing = [
        (before, after)
        for before, after in EDGES
        if not any(before in ancestors(s) for s in spans.values() if s["service"] == after)
    ]
    assert not missing


def test_the_prediction_links_the_version_that_answered(story: dict[str, Any]) -> None:
    spans = {span["span_id"]: span for span in story["spans"]}
    (predicted,) = [s for s in spans.values() if s["trace_id"] == "7" * 32 and s["links"]]
    followed = [spans[link["span_id"]] for link in predicted["links"]]
    assert "registry" in {span["service"] for span in followed}
    assert {span["trace_id"] for span in followed} == {story["published"]}


def test_no_span_is_an_orphan(story: dict[str, Any]) -> None:
    """Only the prediction's caller, who exports nowhere, is missing."""
    known = {span["span_id"] for span in story["spans"]}
    orphans = [
        f"{span['service']} {span['name']}"
        for span in story["spans"]
        if span["parent_id"] and span["parent_id"] not in known and span["parent_id"] != "8" * 16
    ]
    assert not orphans


def test_the_prediction_is_in_the_log_with_its_trace(story: dict[str, Any]) -> None:
    assert story["prediction"]["trace_id"] == "7" * 32
    assert story["prediction"]["number"] == "1"


def test_ten_lines_of_a_stranger_publish_and_predict(story: dict[str, Any]) -> None:
    """examples/ten_lines.py: only nats-py and tritonclient."""
    assert story["said"].startswith("[")
    assert 0 <= int(story["said"].strip("[]")) <= 9
