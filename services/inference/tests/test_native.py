"""What only the extension has: rows of every datatype gathered in C++, from sockets and from Python
in one batch; a thread that leaves the signals to Python; and its checks under sanitizers."""

import asyncio
import importlib.util
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.contracts.protos import open_inference_pb2 as oip
from services.inference import frames, tensors
from services.inference.front import Batch, Lane, Sampling, ServerCall
from services.inference.rpcs import MODEL_INFER, TEXT_BYTES_MAX
from services.inference.tensors import Arrays
from services.inference.tests.callers import Caller, asked, configured, native, run, taken
from services.inference.tests.fronts import (
    ECHO,
    POST,
    SILENT,
    digits,
    opened,
    place,
    prefixed,
    refusal,
    request,
    times,
    values,
)
from stack.testing import eventually

ROOT = Path(__file__).resolve().parents[3]
HEADER = Path("/usr/include/nghttp2/nghttp2.h")
INTERNAL = 13
UNAVAILABLE = 14
PATIENCE_S = 120.0
CHECKED_ROUNDS = 3000
METADATA_BYTES = 60_000
DATATYPES = sorted(set(tensors.DTYPES) - {"BYTES"})

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("leptonic_native") is None, reason="the extension is not built here"
)


def echo_lane(datatype: str) -> Lane:
    takes, gives = (Tensor(name, datatype, [-1, -1]) for name in ("x", "y"))
    return Lane("echo", "1", Signature([takes], [gives]), batched=True, opaque=False)


def echo_request(datatype: str, array: tensors.Array) -> oip.ModelInferRequest:
    kind = oip.ModelInferRequest.InferInputTensor
    return oip.ModelInferRequest(
        model_name="echo",
        inputs=[kind(name="x", datatype=datatype, shape=array.shape)],
        raw_input_contents=[tensors.to_raw(datatype, array)],
    )


@pytest.mark.parametrize("datatype", DATATYPES)
async def test_rows_of_every_datatype_come_back_in_shapes_that_the_signature_leaves_open(
    datatype: str,
) -> None:
    seen: list[Arrays] = []

    def echo(inputs: Arrays) -> Arrays:
        seen.append(inputs)
        return {"y": inputs["x"]}

    async with place("native") as here, here.client() as client:
        here.front.route("echo", {"1": 100}, {"1": here.serve(echo_lane(datatype), echo)})
        arrays = [
            np.arange(rows * width).reshape(rows, width).astype(tensors.DTYPES[datatype])
            for rows, width in ((1, 1), (2, 3), (3, 3), (1, 7), (4, 1))
        ]
        here.go.clear()
        asked = [
            asyncio.ensure_future(client.ModelInfer(echo_request(datatype, array)))
            for array in arrays
        ]
        here.go.set()
        for array, answer in zip(arrays, await asyncio.gather(*asked), strict=True):
            assert answer.outputs[0].shape == list(array.shape)
            assert answer.outputs[0].datatype == datatype
            assert answer.raw_output_contents[0] == tensors.to_raw(datatype, array)
    assert {one["x"].dtype for one in seen} == {tensors.DTYPES[datatype]}
    assert all(one["x"].flags.c_contiguous for one in seen)


async def test_a_byte_that_is_not_0_is_true() -> None:
    """numpy counts on 0 and 1."""
    async with place("native") as here, here.client() as client:
        lane = echo_lane("BOOL")
        here.front.route("echo", {"1": 100}, {"1": here.serve(lane, lambda i: {"y": ~i["x"]})})
        asked = echo_request("BOOL", np.zeros((1, 4), np.bool_))
        asked.raw_input_contents[0] = b"\x00\x01\x02\xff"
        answer = await client.ModelInfer(asked)
        assert answer.raw_output_contents[0] == b"\x01\x00\x00\x00"


async def test_requests_from_sockets_and_from_python_share_a_batch() -> None:
    told: list[tuple[Arrays, int, int, int]] = []

    class Waiter:
        def answered(
            self, outputs: Arrays, start: int, stop: int, batch_rows: int, *rest: object
        ) -> None:
            told.append((outputs, start, stop, batch_rows))

        def failed(self, code: int, text: str) -> None:
            raise AssertionError(text)

    async with place("native") as here, here.client() as client:
        batcher = here.front.batcher(digits("2"))
        here.front.route("digits", {"2": 100}, {"2": batcher})
        limits = Batching(max_batch_size=3, max_queue_delay_microseconds=10_000_000)
        batcher.configure(limits, SILENT)
        strided = np.full((2, 8), 5.0, np.float32)[:, ::2]
        assert batcher.join({"x": strided}, 2, Waiter()) > 0
        asked = asyncio.ensure_future(client.ModelInfer(request(7.0)))
        batch = await asyncio.to_thread(taken, batcher)
        assert batch.rows == 3
        inputs = batch.inputs()
        assert inputs["x"][:, 0].tolist() == [5.0, 5.0, 7.0]
        batch.answer(times(2)(inputs))
        assert values(await asked) == [14.0] * 4
    ((outputs, start, stop, batch_rows),) = told
    assert outputs["y"][start:stop].tolist() == [[10.0] * 4] * 2
    assert batch_rows == 3


def test_a_batch_that_is_forgotten_fails_its_requests() -> None:
    batcher = configured(native, Batching())
    caller = Caller(1)
    caller.join(batcher)
    taken(batcher)
    assert caller.told == [(INTERNAL, "the batch ended without an answer")]


def test_a_batch_answers_once() -> None:
    batcher = configured(native, Batching())
    Caller(1).join(batcher)
    batch = taken(batcher)
    outputs = run(batch.inputs())
    batch.answer(outputs)
    with pytest.raises(ValueError, match="has been answered"):
        batch.answer(outputs)


def test_a_tensor_may_have_many_dimensions() -> None:
    deep = [-1, *[1] * 20]
    signature = Signature([Tensor("x", "FP32", deep)], [Tensor("y", "FP32", deep)])
    batcher = native(Lane("deep", "1", signature, batched=True, opaque=False))
    batcher.configure(Batching(), SILENT)
    told: list[Arrays] = []

    class Waiter:
        def answered(self, outputs: Arrays, *rest: object) -> None:
            told.append(outputs)

        def failed(self, code: int, text: str) -> None:
            raise AssertionError(text)

    for mark in (1, 2):
        assert batcher.join({"x": np.full([1] * 21, mark, np.float32)}, 1, Waiter()) > 0
    batch = taken(batcher)
    inputs = batch.inputs()
    assert inputs["x"].reshape(-1).tolist() == [1.0, 2.0]
    batch.answer({"y": inputs["x"]})
    assert len(told) == 2


def said(stream: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    head = frames.frame(frames.HEADERS, frames.END_HEADERS, stream, frames.block(headers))
    return head + frames.frame(frames.DATA, frames.END_STREAM, stream, body)


async def test_a_traceparent_of_any_bytes_is_noted() -> None:
    async with place("native") as here:
        batcher = here.front.batcher(digits("1"))
        batcher.configure(Batching(), Sampling(0.0, 100, 1000.0))
        here.front.route("digits", {"1": 100}, {"1": batcher})
        raw = await here.raw()
        body = prefixed(request(1.0).SerializeToString())
        path, parent = (b":path", MODEL_INFER.encode()), (b"traceparent", b"\xff")
        await raw.say(raw.hello() + said(1, [path, *POST, parent], body))
        batch = await asyncio.to_thread(taken, batcher)
        assert [note.parent for note in batch.notes] == ["\ufffd"]
        batch.answer(times(1)(batch.inputs()))
        assert (await raw.headers())[":status"] == "200"


async def test_a_method_of_any_bytes_costs_nobody_elses_call() -> None:
    async with place("native") as here:
        raw = await here.raw()
        calls = said(1, [(b":path", b"/\xff"), *POST], b"")
        calls += said(3, [(b":path", ECHO.encode() + b"Unary"), *POST], prefixed(b"well"))
        await raw.say(raw.hello() + calls)
        assert await raw.answer(3) == prefixed(b"well")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_a_stream_that_is_always_ahead_of_its_client_keeps_no_more_than_it_is_ahead() -> None:
    grant, all_bytes = 1 << 19, 128 << 20
    async with place("native") as here:
        raw = await here.raw()
        window = struct.pack(">HI", frames.INITIAL_WINDOW, 0)
        opening = frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, window)
        await raw.say(opening + raw.ask(ECHO + "Flood", prefixed(b"")))
        before = resident_bytes()
        word = frames.WORD.pack(grant)
        more = b"".join(frames.frame(frames.WINDOW_UPDATE, 0, at, word) for at in (0, 1))
        for come in range(0, all_bytes, grant):

            def is_ahead(come: int = come) -> bool:
                return here.echo.written << 20 >= come

            await eventually(is_ahead)
            await raw.say(more)
            got = 0
            while got < grant:
                got += len(await raw.until(frames.DATA, 1))
        assert resident_bytes() - before < all_bytes / 2
        raw.vanish()


async def refused_with(text: str, trailing: Sequence[tuple[str, str]]) -> tuple[object, str]:
    """What a client hears of it."""

    def answer(call: ServerCall) -> None:
        call.finish(INTERNAL, text, trailing)

    front = await opened("native", answer)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}") as channel:
        call: Any = channel.unary_unary(ECHO + "Unary")
        said = await refusal(call(b"", timeout=20))
    await front.close(1)
    return said


async def test_a_long_text_is_cut_between_two_characters() -> None:
    fit = TEXT_BYTES_MAX // len("%C3%BC")
    assert await refused_with("ü" * 50_000, ()) == (grpc.StatusCode.INTERNAL, "ü" * fit)


async def test_an_answer_whose_headers_are_too_large_ends_its_call() -> None:
    code, text = await refused_with("broken", [("x", "y" * 200_000)])
    assert code is grpc.StatusCode.INTERNAL
    assert "broken" not in text


def test_who_waits_in_a_batcher_that_nobody_holds_is_told() -> None:
    caller = Caller(1)
    batcher = configured(native, Batching())
    caller.join(batcher)
    del batcher
    assert [told[0] for told in caller.told] == [UNAVAILABLE]


class Raises:
    def answered(self, *rest: object) -> None:
        raise RuntimeError("of a waiter")

    def failed(self, code: int, text: str) -> None:
        raise RuntimeError("of a waiter")


@pytest.mark.parametrize(
    "ends", [lambda b: b.fail(INTERNAL, "broken"), lambda b: b.answer(run(b.inputs()))]
)
def test_a_waiter_that_raises_keeps_nobody_from_hearing(
    ends: Callable[[Batch], None],
) -> None:
    raised: list[object] = []
    batcher = configured(native, Batching(max_batch_size=8))
    assert batcher.join(asked(1), 1, Raises()) > 0
    caller = Caller(1)
    caller.join(batcher)
    before = sys.unraisablehook
    sys.unraisablehook = lambda found: raised.append(str(found.exc_value))
    try:
        ends(taken(batcher))
    finally:
        sys.unraisablehook = before
    assert len(caller.told) == 1
    assert raised == ["of a waiter"]


async def test_calls_that_python_has_not_heard_of_are_bounded() -> None:
    """Nothing yields to the event loop before all is asked."""
    heard: list[ServerCall] = []
    front = await opened("native", heard.append)
    large = [(b":path", b"/a"), *POST, (b"x", b"y" * METADATA_BYTES)]
    block = frames.block(large)
    parts = [block[at : at + 16384] for at in range(0, len(block), 16384)]
    client = socket.create_connection(("127.0.0.1", front.port))
    client.settimeout(PATIENCE_S)
    client.sendall(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, b""))
    for stream in range(1, 3000, 2):
        client.sendall(frames.frame(frames.HEADERS, 0, stream, parts[0]))
        for part in parts[1:]:
            flags = frames.END_HEADERS if part is parts[-1] else 0
            client.sendall(frames.frame(frames.CONTINUATION, flags, stream, part))
        client.sendall(frames.frame(frames.DATA, frames.END_STREAM, stream, b"\x02" + bytes(4)))
    client.sendall(frames.frame(frames.PING, 0, 0, bytes(8)))
    said = b""
    while frames.frame(frames.PING, 1, 0, bytes(8)) not in said:
        said += client.recv(1 << 16)
    client.close()
    await eventually(lambda: heard)
    assert len(heard) * METADATA_BYTES <= 65 << 20
    await front.close(0)


def test_an_array_of_other_bytes_than_its_rows_need_never_joins() -> None:
    batcher = configured(native, Batching(max_batch_size=8))
    inputs = asked(1, rows=2)
    for rows in (1, 3):
        with pytest.raises(ValueError, match=r"input 'x' has shape \[2, 2\]"):
            batcher.join(inputs, rows, Caller(1))
    assert batcher.join(inputs, 2, Caller(1)) > 0


async def test_the_method_that_is_allowed_is_said() -> None:
    async with place("native") as here:
        raw = await here.raw()
        get = [(b":path", b"/"), *POST]
        get = [(name, b"GET" if name == b":method" else value) for name, value in get]
        await raw.say(raw.hello() + said(1, get, b""))
        assert await raw.headers() == {":status": "405", "allow": "POST"}


async def test_who_came_while_there_were_no_descriptors_is_accepted_later() -> None:
    async with place("native") as here:
        client = socket.socket()
        client.settimeout(PATIENCE_S)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            client.connect(("127.0.0.1", here.front.port))
            client.sendall(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, b""))
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client.settimeout(PATIENCE_S)
        assert await asyncio.to_thread(client.recv, 1)
        client.close()


def blocked_signals(thread: str) -> int:
    """As a mask, of the only thread of this process with this name."""
    named = [path.parent for path in Path("/proc/self/task").glob("*/comm")]
    (found,) = [path for path in named if (path / "comm").read_text().strip() == thread]
    status = (found / "status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("SigBlk")).split()[1], 16)


async def test_signals_are_pythons() -> None:
    async with place("native"):
        assert blocked_signals("front") >> (signal.SIGTERM - 1) & 1


async def test_a_connection_that_came_late_and_asked_nothing_does_not_hold_up_the_end() -> None:
    async with place("native") as here:
        here.front.say_goodbye()
        raw = await here.raw()
        await raw.say(raw.hello())
        assert await raw.until(frames.SETTINGS) is not None
        async with asyncio.timeout(PATIENCE_S / 2):
            closing = asyncio.ensure_future(here.front.close(PATIENCE_S))
            assert await raw.until(frames.GOAWAY)
            raw.vanish()
            await closing


async def test_the_front_knows_where_the_time_went() -> None:
    async with place("native") as here, here.client() as client:
        here.serve_digits({"1": 100})
        for _ in range(130):
            await client.ModelInfer(request(1.0))
        stages = here.front.stages()  # type: ignore[attr-defined]
    assert set(stages) == {"read", "parse", "queue", "batch", "compute", "serialise", "write"}
    assert all(us > 0 for us in stages.values()), stages


@pytest.mark.resilience  # compiling it three times takes longer than running it
@pytest.mark.skipif(
    shutil.which("g++") is None or not HEADER.exists(), reason="no compiler or no libnghttp2-dev"
)
def test_broken_messages_broken_http2_and_many_threads_under_sanitizers() -> None:
    """`make native-sanitized` does many more, and watches the threads for races."""
    checked = subprocess.run(
        [sys.executable, str(ROOT / "native" / "build.py"), "sanitized", str(CHECKED_ROUNDS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr[-4000:]
    assert checked.stdout.count("mutated requests fitted") == 2
