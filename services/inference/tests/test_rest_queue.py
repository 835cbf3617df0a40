"""Requests over HTTP in the queue: they share batches, are refused, are late, and leave."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic_ns

import httpx
import pytest
import pytest_asyncio

from libs.contracts.pipeline import Batching
from services.inference.tests.desk import Desk
from services.inference.tests.web import Gate, asked, listening, served, tensor
from stack.testing import eventually


@pytest_asyncio.fixture
async def desk() -> AsyncIterator[Desk]:
    async with served() as one:
        yield one


async def test_a_full_queue_is_503_and_says_when_to_try_again(desk: Desk) -> None:
    gate = Gate()
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    served.configure(Batching(max_batch_size=1, max_queue_size=1), 0)
    one = asked(tensor(shape=[1, 1], data=[1]))
    async with listening(desk) as http:
        tasks = [
            asyncio.create_task(http.post("/v2/models/gate/infer", json=one)) for _ in range(40)
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        refused = done.pop().result()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "exceeds maximum queue size" in refused.json()["error"]
        gate.opened.set()
        codes = {(await task).status_code for task in tasks}
    assert codes == {200, 503}


async def test_who_waits_too_long_in_the_queue_is_told(desk: Desk) -> None:
    gate = Gate()
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    served.configure(Batching(max_batch_size=1), 0)
    one = asked(tensor(shape=[1, 1], data=[1]))
    async with listening(desk) as http:

        def ask(**parameters: int) -> "asyncio.Task[httpx.Response]":
            body = {**one, "parameters": parameters}
            return asyncio.create_task(http.post("/v2/models/gate/infer", json=body))

        running = [ask() for _ in served.threads]
        await eventually(lambda: len(gate.model.rows) == len(served.threads))
        late = ask(timeout=1000)
        await eventually(lambda: served.counts().waiting == 1)
        over_ns = monotonic_ns() + 1_000_000
        await eventually(lambda: monotonic_ns() > over_ns)
        gate.opened.set()
        assert {(await task).status_code for task in running} == {200}
        answer = await late
    assert (answer.status_code, answer.json()) == (503, {"error": "Request timeout expired"})


async def test_who_has_gone_leaves_the_queue(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    served.configure(Batching(max_batch_size=1), 0)
    one = asked(tensor(shape=[1, 1], data=[1]))
    async with listening(desk) as http:

        def ask() -> "asyncio.Task[httpx.Response]":
            return asyncio.create_task(http.post("/v2/models/gate/infer", json=one))

        running = [ask() for _ in served.threads]
        await eventually(lambda: len(gate.model.rows) == len(served.threads))
        gone = ask()
        await eventually(lambda: served.counts().waiting == 1)
        gone.cancel()
        await eventually(lambda: served.counts().waiting == 0)
        await half_a_request(http)
        gate.opened.set()
        assert {(await task).status_code for task in running} == {200}
    assert sum(gate.model.rows) == len(served.threads)
    assert "Exception" not in caplog.text


async def half_a_request(http: httpx.AsyncClient) -> None:
    """And then nothing."""
    assert http.base_url.port is not None
    _, writer = await asyncio.open_connection("127.0.0.1", http.base_url.port)
    head = "POST /v2/models/gate/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
    writer.write(head.encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()


async def test_requests_of_http_share_batches(desk: Desk) -> None:
    gate = Gate()
    await desk.serve("gate", gate.model)
    served = desk.endpoints.served("gate", "")
    one = asked(tensor(shape=[1, 1], data=[1]))
    async with listening(desk) as http:
        tasks = [
            asyncio.create_task(http.post("/v2/models/gate/infer", json=one)) for _ in range(20)
        ]
        busy = len(served.threads)
        await eventually(lambda: served.counts().waiting >= 20 - busy * 8)
        gate.opened.set()
        assert {(await task).status_code for task in tasks} == {200}
    assert sum(gate.model.rows) == 20
    assert max(gate.model.rows) > 1
