"""What goes to another replica comes back as if from here, and runs once, whatever fails there."""

import asyncio
import json
import threading

import grpc
import pytest

from libs.contracts.pipeline import Batching
from libs.doors import Exhausted, Internal, NotFound, Unavailable
from services.inference import forward
from services.inference.bodies import Exchange
from services.inference.forward import Unreached, Untaken
from services.inference.loads import Load
from services.inference.models import Crashed
from services.inference.tensors import Arrays
from services.inference.tests.desk import double, numbers, refused, request, row
from services.inference.tests.neighbours import (
    ASKED,
    KEY,
    Replica,
    answered,
    never_stale,
    one,
    replica,
    two,
)
from services.inference.tests.test_busdoor import gated
from stack.testing import eventually

__all__ = ["never_stale", "one", "two"]

MANY = 60


def body(**output: int) -> bytes:
    given = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 4, 3]}
    wanted = {"name": "y", "parameters": output}
    return json.dumps({"inputs": [given], "outputs": [wanted]}).encode()


async def test_classes_are_made_once_by_whoever_answers(one: Replica, two: Replica) -> None:
    """Of what it made of 40 scores, another would make classes again."""
    await two.serve("double", double())
    one.hear(two, Load(*KEY, 0))
    asked = request("double", row(1, 2, 4, 3), [2, 2])
    asked.outputs.add(name="y").parameters["classification"].int64_param = 1
    there, here = [await each.desk.stub.ModelInfer(asked) for each in (one, two)]
    assert there.outputs == here.outputs
    assert there.raw_output_contents == here.raw_output_contents
    exchange = Exchange(one.desk.endpoints, one.desk.service.memory)
    answer = json.loads(
        (await exchange.infer("double", "", body(classification=1), None, "")).payload
    )
    assert answer["outputs"][0]["data"] == ["4.000000:1:right", "8.000000:0:left"]
    assert answer["outputs"][0]["shape"] == [2, 1]


async def test_a_request_that_ends_its_replica_is_not_tried_on_the_next(
    one: Replica, two: Replica
) -> None:
    def dies(_: Arrays) -> Arrays:
        raise Crashed("the worker process died")

    async with replica("three") as three:
        for other in (two, three):
            model = double()
            model.function = dies
            await other.serve("double", model)
            one.hear(other, Load(*KEY, 0))
        status, text = await refused(one.desk.stub.ModelInfer(ASKED))
        assert (status, "died" in text) == ("UNAVAILABLE", True)
        faults = [each.desk.endpoints.served("double", "").faults() for each in (two, three)]
        assert sorted(faults) == [0, 1]
    assert one.presence.serves(KEY), "both are still asked"


async def test_who_does_not_serve_one_model_is_asked_for_others(one: Replica, two: Replica) -> None:
    await two.serve("double", double())
    one.hear(two, Load("default", "other", 0), Load(*KEY, 0))
    assert (await refused(one.desk.stub.ModelInfer(request("other", row(1, 2), [1, 2]))))[0] == (
        "NOT_FOUND"
    )
    assert not one.presence.serves(("default", "other"))
    assert numbers(await one.desk.stub.ModelInfer(ASKED)) == [2, 4]


@pytest.mark.parametrize("trouble", ["another version", "full"])
async def test_what_another_cannot_help_with_is_answered_here(
    trouble: str, one: Replica, two: Replica
) -> None:
    release = threading.Event()
    await one.serve("double", gated(release))
    await two.serve("double", gated(release), "", "1" if trouble == "full" else "2")
    roomy = Batching(max_batch_size=8, max_queue_size=100)
    one.desk.endpoints.served("double", "").configure(roomy, 0)
    two.desk.endpoints.served("double", "").configure(Batching(max_queue_size=1), 0)
    one.hear(two, Load(*KEY, 0))
    exchange = Exchange(one.desk.endpoints, one.desk.service.memory)
    asking = [
        asyncio.create_task(exchange.infer("double", "1", body(), None, "")) for _ in range(MANY)
    ]
    await eventually(lambda: one.desk.endpoints.served("double", "").counts().waiting > MANY // 3)
    release.set()
    for answer in await asyncio.gather(*asking):
        assert json.loads(answer.payload)["outputs"][0]["data"] == [1, 2, 4, 3]
    assert answered(one) >= MANY // 3


async def test_what_is_quarantined_here_is_answered_where_it_is_not(
    one: Replica, two: Replica
) -> None:
    one.deploy()
    await one.serve("double", double())
    endpoint = one.desk.endpoints.find("double")
    endpoint.quarantined["1"] = "quarantined after 3 crashes"
    endpoint.direct({})
    status, text = await refused(one.desk.stub.ModelInfer(ASKED))
    assert (status, "after 3 crashes" in text) == ("UNAVAILABLE", True), "nothing to wait for"
    await two.serve("double", double())
    one.hear(two, Load(*KEY, 0))
    assert numbers(await one.desk.stub.ModelInfer(ASKED)) == [2, 4]


async def test_a_replica_with_another_project_is_told_which(one: Replica, two: Replica) -> None:
    await two.serve("double", double())
    for two.project in ("default", "another", ""):
        one.hear(two, Load(*KEY, 0))
        assert (await one.desk.stub.ModelInfer(ASKED)).model_name == "double"
    assert one.presence.peers.name_at("two", KEY) == "default.double"


async def test_who_has_gone_keeps_no_connection(one: Replica, two: Replica) -> None:
    release = threading.Event()
    await two.serve("double", gated(release))
    one.hear(two, Load(*KEY, 0))
    asking = asyncio.ensure_future(one.desk.stub.ModelInfer(ASKED))
    await eventually(lambda: two.desk.endpoints.served("double", "").running)
    one.presence.forwarder.keep(set())
    assert not one.presence.forwarder.channels
    release.set()
    assert numbers(await asking) == [1, 2], "it was asked before"


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error", Unreached),
        (grpc.StatusCode.UNAVAILABLE, "model 'm' version 1 is being unloaded", Untaken),
        (grpc.StatusCode.UNAVAILABLE, "model 'm' version 1: the worker died", Unavailable),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", Unavailable),
        (grpc.StatusCode.UNAUTHENTICATED, "no token", Unreached),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", Exhausted),
        (grpc.StatusCode.NOT_FOUND, "", NotFound),
        (grpc.StatusCode.CANCELLED, "", Internal),
    ],
)
def test_what_another_said(code: grpc.StatusCode, text: str, expected: type[Exception]) -> None:
    assert type(forward.refusal_of(code, text)) is expected
