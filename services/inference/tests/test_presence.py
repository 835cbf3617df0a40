"""A request finds its model: it waits for one that sleeps, and goes where there is time."""

import asyncio
import json
import threading
from typing import Any

import pytest

from libs.contracts.pipeline import Batching
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference import native, presence
from services.inference.bodies import Exchange
from services.inference.loads import Load
from services.inference.peers import Told
from services.inference.tests import stage
from services.inference.tests.desk import (
    STATEFUL,
    counter,
    double,
    number,
    numbers,
    opened,
    refused,
    request,
    row,
    running_sum,
)
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
from services.inference.tests.web import listening
from stack.testing import eventually

__all__ = ["never_stale", "one", "two"]


async def test_a_request_waits_for_a_model_that_sleeps_and_is_answered(one: Replica) -> None:
    one.deploy()
    assert (await one.desk.stub.ModelReady(ready("double"))).ready, "whoever asks is answered"
    asking = [asyncio.ensure_future(one.desk.stub.ModelInfer(ASKED)) for _ in range(5)]
    await eventually(lambda: one.presence.waiting == {KEY: 5})
    assert one.called_out >= 1
    await one.serve("double", double())
    for answer in asking:
        assert numbers(await answer) == [2, 4]
    assert not one.presence.waiting


async def test_waiting_calls_for_a_replica_once_a_while_whatever_is_heard(
    one: Replica, two: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two nodes that both wait would call ever faster if what one says made the other say it."""
    monkeypatch.setattr(presence, "CALL_S", 600.0)
    for each in (one, two):
        each.deploy()
    asking = [asyncio.ensure_future(each.desk.stub.ModelInfer(ASKED)) for each in (one, two, two)]
    await eventually(lambda: (one.presence.waiting, two.presence.waiting) == ({KEY: 1}, {KEY: 2}))
    for _ in range(20):
        one.hear(two, Load(*KEY, 2000, ready=False))
        two.hear(one, Load(*KEY, 1000, ready=False))
        await asyncio.sleep(0)
    assert (one.called_out, two.called_out) == (1, 1)
    await two.serve("double", double())
    one.hear(two, Load(*KEY, 0))
    await asyncio.gather(*asking)
    assert not one.presence.called, "the next one that waits calls at once"


async def test_what_another_process_of_the_node_has_to_do_is_the_node_s(one: Replica) -> None:
    """And is said by whoever speaks for it, who calls for no replica itself."""
    busy = Load(*KEY, 3000, 20, 7)
    one.presence.overhear(Told("one", "", [busy], "second"), 10.0)
    assert (one.called_out, one.heard_out) == (0, 0), "the next heartbeat is soon enough"
    waiting = Load(*KEY, 1000, ready=False)
    one.presence.overhear(Told("one", "", [waiting], "third"), 11.0)
    assert (one.called_out, one.heard_out) == (0, 1)
    assert one.presence.of_others(11.0) == [[busy], [waiting]]
    one.presence.overhear(Told("one", "", [], "third"), 11.5)
    assert one.presence.of_others(12.0) == [[busy], []]
    assert one.presence.of_others(12.5) == [[]]


async def test_it_may_come_to_another_replica(one: Replica, two: Replica) -> None:
    one.deploy()
    asking = asyncio.ensure_future(one.desk.stub.ModelInfer(ASKED))
    await eventually(lambda: one.presence.waiting)
    await two.serve("double", double())
    one.hear(two, Load(*KEY, 0))
    assert numbers(await asking) == [2, 4]


async def test_every_door_waits(one: Replica) -> None:
    """JSON of HTTP and of the bus, and a stream of requests."""
    for model in ("double", "counter"):
        one.deploy(model)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    exchange = Exchange(one.desk.endpoints, one.desk.service.memory)
    posted = asyncio.create_task(
        exchange.infer("double", "", json.dumps(body).encode(), None, "", 60)
    )
    counting = request("counter", number(2), [1], "INT32")
    streamed = one.desk.stub.ModelStreamInfer(iter([ASKED, counting]))
    await eventually(lambda: one.presence.waiting[KEY] == 2)
    await one.serve("double", double())
    assert json.loads((await posted).payload)["outputs"][0]["data"] == [2, 4]
    await eventually(lambda: one.presence.waiting["default", "counter"] == 1)
    await one.serve("counter", counter())
    answers = [answer.infer_response async for answer in streamed]
    assert [answer.model_name for answer in answers] == ["double", "counter", "counter"]


async def test_a_stream_s_next_request_waits_for_no_model_of_another(one: Replica) -> None:
    """Answers of models with one answer come in the order of the requests, others when there."""
    one.deploy()
    await one.serve("counter", counter())
    counting = request("counter", number(2), [1], "INT32")
    answers = one.desk.stub.ModelStreamInfer(iter([ASKED, counting, ASKED]))
    for _ in range(2):
        assert (await answers.read()).infer_response.model_name == "counter"
    assert one.presence.waiting == {KEY: 2}
    await one.serve("double", double())
    for _ in range(2):
        assert numbers((await answers.read()).infer_response) == [2, 4]


@pytest.mark.parametrize("path", ["infer", "generate", "generate_stream"])
async def test_who_has_gone_waits_for_nothing(one: Replica, path: str) -> None:
    one.deploy()
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    async with listening(one.desk) as http:
        asking = asyncio.create_task(http.post(f"/v2/models/double/{path}", json=body))
        await eventually(lambda: one.presence.waiting == {KEY: 1})
        asking.cancel()
        await eventually(lambda: not one.presence.waiting)
        unknown = await http.post(f"/v2/models/nobody/{path}", json=body)
        assert unknown.status_code == 404


async def test_so_many_wait_and_no_more(one: Replica) -> None:
    one.deploy(max_queue_size=2)
    asking = [asyncio.ensure_future(one.desk.stub.ModelInfer(ASKED)) for _ in range(2)]
    await eventually(lambda: one.presence.waiting[KEY] == 2)
    assert await refused(one.desk.stub.ModelInfer(ASKED)) == (
        "RESOURCE_EXHAUSTED",
        "2 requests wait already for a replica of 'double'",
    )
    asking[0].cancel()
    await eventually(lambda: one.presence.waiting[KEY] == 1)
    asking[0] = asyncio.ensure_future(one.desk.stub.ModelInfer(ASKED))
    await eventually(lambda: one.presence.waiting[KEY] == 2)
    await one.serve("double", double())
    for answer in asking:
        assert numbers(await answer) == [2, 4]


async def test_who_waits_in_vain_is_told_so(one: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    one.deploy()
    late = await refused(one.desk.stub.ModelInfer(ASKED, timeout=0.2))
    assert late[0] == "DEADLINE_EXCEEDED"
    monkeypatch.setattr(presence, "WAKE_S", 0.1)
    status, text = await refused(one.desk.stub.ModelInfer(ASKED))
    assert status == "UNAVAILABLE"
    assert text.startswith("no replica of model 'double' was ready within 0.1 s")


async def test_nobody_waits_for_what_is_not_deployed_or_never_sleeps(one: Replica) -> None:
    assert (await refused(one.desk.stub.ModelInfer(ASKED)))[0] == "NOT_FOUND"
    one.known[KEY] = stage.deployment(1, model="double"), ""
    assert await refused(one.desk.stub.ModelInfer(ASKED)) == (
        "UNAVAILABLE",
        "no replica of model 'double' answers at the moment",
    )
    assert not (await one.desk.stub.ModelReady(ready("double"))).ready


async def test_a_replica_that_does_not_serve_it_asks_the_one_with_least_to_do(
    one: Replica, two: Replica
) -> None:
    async with replica("three") as three:
        await two.serve("double", double())
        await three.serve("double", double())
        one.hear(two, Load(*KEY, 5000))
        one.hear(three, Load(*KEY, 1000))
        for _ in range(3):
            assert numbers(await one.desk.stub.ModelInfer(ASKED)) == [2, 4]
        assert answered(two) == 0
        assert answered(three) == 3
        one.hear(three, Load(*KEY, 9000))
        await one.desk.stub.ModelInfer(ASKED)
        assert answered(two) == 1


async def test_a_replica_that_has_gone_is_passed_over(one: Replica, two: Replica) -> None:
    await two.serve("double", double())
    async with replica("gone") as gone:
        one.hear(gone, Load(*KEY, 0))
    one.hear(two, Load(*KEY, 1000))
    assert numbers(await one.desk.stub.ModelInfer(ASKED)) == [2, 4]
    assert set(one.presence.peers.told) == {"two"}


async def test_what_is_sent_on_is_answered_there_or_not_at_all(one: Replica, two: Replica) -> None:
    """Two that each believe the other serves it do not send it to and fro."""
    one.hear(two, Load(*KEY, 0))
    two.hear(one, Load(*KEY, 0))
    status, _ = await refused(one.desk.stub.ModelInfer(ASKED))
    assert status == "NOT_FOUND"
    assert len(one.presence.forwarder.channels) == 1
    assert not two.presence.forwarder.channels


async def test_a_version_nobody_has_is_the_client_s_mistake(one: Replica, two: Replica) -> None:
    await two.serve("double", double())
    one.hear(two, Load(*KEY, 0))
    asked = request("double", row(1, 2), [1, 2])
    asked.model_version = "9"
    assert (await refused(one.desk.stub.ModelInfer(asked)))[0] == "NOT_FOUND"
    assert set(one.presence.peers.told) == {"two"}


async def test_a_decoupled_model_elsewhere_says_what_it_is(one: Replica, two: Replica) -> None:
    await two.serve("counter", counter())
    one.hear(two, Load("default", "counter", 0))
    status, text = await refused(
        one.desk.stub.ModelInfer(request("counter", number(2), [1], "INT32"))
    )
    assert (status, "decoupled" in text) == ("UNIMPLEMENTED", True)


async def test_the_requests_of_a_sequence_meet_at_one_replica(one: Replica, two: Replica) -> None:
    key = ("default", "sum")
    async with replica("three") as three:
        for other in (two, three):
            await other.serve("sum", running_sum(), STATEFUL)
            one.hear(other, Load(*key, 0))
        sums = []
        for place in range(4):
            marks = {"sequence_start": place == 0, "sequence_end": place == 3}
            asked = request("sum", number(place), [1, 1], "INT32", sequence_id=7, **marks)
            sums.append(numbers(await one.desk.stub.ModelInfer(asked), "int32")[0])
            for other, work in ((two, place % 2), (three, 1 - place % 2)):
                one.hear(other, Load(*key, 1000 * work))
    assert sums == [0, 1, 3, 6]


async def test_what_waits_behind_a_whole_batch_goes_where_there_is_time(
    one: Replica, two: Replica
) -> None:
    release = threading.Event()
    await one.serve("double", gated(release))
    await two.serve("double", double())
    served = one.desk.endpoints.served("double", "")
    served.configure(Batching(max_batch_size=8, max_queue_size=100), 0)
    one.hear(two, Load(*KEY, 0))
    exchange = Exchange(one.desk.endpoints, one.desk.service.memory)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    payload = json.dumps(body).encode()
    asking = [
        asyncio.create_task(exchange.infer("double", "", payload, None, "")) for _ in range(60)
    ]
    await eventually(lambda: answered(two) > 10)
    assert served.counts().waiting >= 8, "as much as a batch waits here, not more elsewhere"
    release.set()
    for one_answer in asking:
        assert json.loads((await one_answer).payload)["outputs"]
    assert answered(one) + answered(two) == 60


def ready(name: str) -> Any:
    return oip.ModelReadyRequest(name=name)


@pytest.mark.parametrize("kind", ["native", "python"])
async def test_the_front_hands_over_what_others_have_time_for(kind: str, two: Replica) -> None:
    if kind == "native" and not native.available():
        pytest.skip("leptonic_native is not built: make native")
    release = threading.Event()
    async with opened(kind=kind) as desk:
        one = Replica("one", desk)
        await one.serve("double", gated(release))
        await two.serve("double", double())
        served = desk.endpoints.served("double", "")
        served.configure(Batching(max_batch_size=8, max_queue_size=100), 0)
        one.hear(two, Load(*KEY, 1000))
        asking = [asyncio.ensure_future(desk.stub.ModelInfer(ASKED)) for _ in range(40)]
        await eventually(lambda: served.counts().waiting > 8)
        assert answered(two) == 0, "the front answers by itself"
        endpoint = desk.endpoints.find("double")
        for milli, p95_ms in ((10_000, 500), (40_000, 10)):
            one.presence.share([Load(*KEY, milli, p95_ms)])
            assert not endpoint.shared, "not much more to do than there, or soon done"
        one.presence.share([Load(*KEY, 40_000, 500)])
        assert numbers(await desk.stub.ModelInfer(ASKED)) == [2, 4]
        assert answered(two) == 1
        one.presence.share([Load(*KEY, 8001, 10)])
        assert endpoint.shared, "it may go to and fro no faster than the line empties"
        one.presence.share([Load(*KEY, 8000, 500)])
        assert not endpoint.shared
        asking.append(asyncio.ensure_future(desk.stub.ModelInfer(ASKED)))
        release.set()
        await asyncio.gather(*asking)
        assert (answered(one), answered(two)) == (41, 1)
        await one.presence.forwarder.close()
