"""A story reads from the prediction back to the publish."""

from typing import Any

from leptonic import story
from rich.console import Console

REQUEST, LOOP, PUBLISH, LATER = (letter * 32 for letter in "abcd")


def span(trace: str, number: int, service: str, name: str, **more: Any) -> dict[str, Any]:
    return {
        "trace_id": trace, "span_id": f"{number:016x}", "parent_id": "", "service": service,
        "name": name, "kind": "internal", "start_ns": number * 1_000_000,
        "end_ns": number * 1_000_000 + 5_000_000, "status": "unset", "status_message": "",
        "attributes": {}, "events": [], "links": [], **more,
    }  # fmt: skip


def link(trace: str, number: int) -> dict[str, str]:
    return {"trace_id": trace, "span_id": f"{number:016x}"}


def drawn(spans: list[dict[str, Any]], everything: bool = False) -> list[str]:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(story.tree({"trace_id": REQUEST, "spans": spans}, everything))
    return capture.get().splitlines()


def loop() -> list[dict[str, Any]]:
    infer = span(REQUEST, 9, "inference", "ModelInfer", links=[link(LOOP, 4)])
    receive = span(LOOP, 3, "ingest", "receive", links=[link(PUBLISH, 1), link(PUBLISH, 2)])
    train = span(LOOP, 4, "trainer", "train", parent_id=f"{3:016x}")
    publish = [span(PUBLISH, n, "stranger", "publish", parent_id="f" * 16) for n in (1, 2)]
    return [infer, train, receive, *publish]


def test_links_lead_from_the_prediction_to_the_publish() -> None:
    lines = drawn(loop())
    order = ["ModelInfer", "receive", "train", "publish"]
    found = [next(n for n, line in enumerate(lines) if f" {word} " in line) for word in order]
    assert found == sorted(found)
    assert lines[found[1]].index("ingest") < lines[found[2]].index("trainer")
    infer, receive = lines[found[0]], lines[found[1]]
    assert f"<- {LOOP[:8]}" in infer
    assert f"<- {PUBLISH[:8]}" in receive
    assert [f"came from trace {trace}" in "".join(lines) for trace in (LOOP, PUBLISH)] == [True] * 2
    assert sum("publish" in line for line in lines) == 2


def test_what_came_of_it_comes_last_and_a_trace_is_drawn_once() -> None:
    feedback = span(LATER, 20, "inference", "feedback", links=[link(REQUEST, 9), link(LOOP, 3)])
    lines = drawn([*loop(), feedback])
    assert f"led to trace {LATER}" in lines[-2]
    assert sum("receive" in line for line in lines) == 1


def test_traces_that_look_alike_are_counted() -> None:
    publishes = [span(f"{n:032x}", n, "ingest", "publish") for n in range(1, 8)]
    land = span(
        REQUEST, 9, "ingest", "ingest land", links=[link(f"{n:032x}", n) for n in range(1, 8)]
    )
    lines = drawn([land, *publishes])
    assert any("ingest land" in line and "and 4 more" in line for line in lines)
    assert any("5 more traces of ingest publish" in line for line in lines)
    assert sum("ingest publish  " in line for line in lines) == 2


def test_repetition_is_counted_unless_everything_is_asked_for() -> None:
    parent = span(REQUEST, 1, "trainer", "train")
    epochs = [span(REQUEST, n, "trainer", "epoch", parent_id=f"{1:016x}") for n in range(2, 12)]
    short = drawn([parent, *epochs])
    assert any("epoch: 7 more, 35.0 ms in all" in line for line in short)
    assert sum("epoch" in line for line in drawn([parent, *epochs], everything=True)) == 10


def test_a_link_to_a_trace_that_is_not_stored_and_an_error_are_said() -> None:
    lines = drawn(
        [span(REQUEST, 1, "ingest", "land", status="error", status_message="no S3",
              links=[link(LATER, 1)])]
    )  # fmt: skip
    assert any("no S3" in line for line in lines)
    assert any("(not stored)" in line for line in lines)


def test_services_are_in_the_order_the_story_came_to_them() -> None:
    told = {"spans": loop()}
    assert story.services_of(told) == ["stranger", "ingest", "trainer", "inference"]
