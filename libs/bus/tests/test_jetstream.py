"""What only the real broker's client does."""

import asyncio
import contextlib
import gc

import msgspec
import psutil

from libs.bus import RECORDS, Stream
from libs.bus.jetstream import JetStreamBus, cancellable, connect, insisting
from stack.testing import eventually

TRIES = 15


async def test_a_fetch_that_runs_out_of_time_is_empty(bus: JetStreamBus) -> None:
    """nats-py raises two kinds of timeout: the second in about 1 of 20 waits as short as these."""
    subscription = await bus.subscribe(RECORDS, "reader", ["records.>"])
    for n in range(150):
        assert await subscription.fetch(10, 0.002 + 0.0001 * (n % 100)) == []


async def test_a_cancellation_is_kept_although_an_answer_came_with_it() -> None:
    """What a fetch waits for and the end of the service, in one turn of the event loop."""
    answer = asyncio.get_running_loop().create_future()

    @cancellable
    async def fetch() -> None:
        await asyncio.tasks.wait_for(answer, 60)  # as nats-py does

    fetching = asyncio.create_task(fetch())
    await asyncio.sleep(0)
    answer.set_result(b"")
    fetching.cancel()
    await asyncio.wait([fetching])
    assert fetching.cancelled()


async def test_what_is_done_after_a_cancellation_is_done() -> None:
    @cancellable
    async def clean() -> str:
        await asyncio.sleep(0)
        return "done"

    async def tidy() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return await clean()
        return ""

    tidying = asyncio.create_task(tidy())
    await asyncio.sleep(0)
    tidying.cancel()
    assert await tidying == "done"


async def test_who_forgets_that_it_is_to_end_is_told_again() -> None:
    forgot = 0

    async def connect_for_ever() -> None:
        nonlocal forgot
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                forgot += 1
                if forgot == 3:
                    raise

    connecting = asyncio.create_task(insisting(connect_for_ever()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    connecting.cancel()
    await asyncio.wait([connecting])
    assert connecting.cancelled()
    assert forgot == 3


async def test_a_server_that_hangs_up_costs_no_socket_a_try() -> None:
    tries = 0

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal tries
        tries += 1
        writer.close()

    async def connected(port: int) -> None:
        async with connect(f"nats://127.0.0.1:{port}"):
            raise AssertionError("to nobody")

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        gc.disable()  # it would close some of them, some time
        connecting = asyncio.create_task(connected(server.sockets[0].getsockname()[1]))
        try:
            before = psutil.Process().num_fds()
            await eventually(lambda: tries > TRIES)
            assert psutil.Process().num_fds() < before + TRIES / 2
        finally:
            gc.enable()
            connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await connecting


async def size_of(bus: JetStreamBus, stream: Stream) -> int | None:
    return (await bus.context.stream_info(stream.name)).config.max_bytes


async def test_a_stream_stays_as_an_operator_changed_it(bus: JetStreamBus, nats_url: str) -> None:
    known = (await bus.context.stream_info(RECORDS.name)).config
    await bus.context.update_stream(known, max_bytes=4096)
    async with connect(nats_url) as again:
        assert await size_of(again, RECORDS) == 4096


async def test_a_queue_grows_and_never_shrinks(bus: JetStreamBus) -> None:
    queue = Stream("QUEUE", ("queue.>",), 0, 2000, is_queue=True)
    try:
        for asked, has in ((2000, 2000), (3000, 3000), (1000, 3000)):
            await bus.create_streams([msgspec.structs.replace(queue, size_max_bytes=asked)])
            assert await size_of(bus, queue) == has
    finally:
        await bus.context.delete_stream(queue.name)
