"""A front with models and a host behind it, and clients for it: those of grpc, and bare sockets."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import pytest
from hpack import Decoder

from libs.contracts.artifacts import Signature, Tensor
from libs.contracts.pipeline import Batching
from libs.contracts.protos import open_inference_pb2 as oip
from libs.contracts.protos import open_inference_pb2_grpc
from libs.doors import Invalid
from services.inference import frames, fronts
from services.inference import native as native_front
from services.inference.front import Batcher, Front, Lane, Sampling, ServerCall
from services.inference.rpc import Host
from services.inference.tensors import Arrays

PLAIN = Batching()
SILENT = Sampling(0.0, 0, 0.0)
DIGITS = Signature([Tensor("x", "FP32", [-1, 4])], [Tensor("y", "FP32", [-1, 4])])
PAIR = Signature(
    [Tensor("a", "FP32", [-1, 2]), Tensor("b", "INT64", [-1])],
    [Tensor("s", "FP32", [-1, 2]), Tensor("t", "INT64", [-1])],
)
SAID_BY_PYTHON = "said by Python"
ECHO = "/test.Echo/"


def kinds() -> list[Any]:
    missing = not native_front.available()
    native = pytest.mark.skipif(missing, reason="the extension leptonic_native is not built here")
    return ["python", pytest.param("native", marks=native)]


async def opened(
    kind: str, on_call: Callable[[ServerCall], None], tokens: Collection[str] = (), port: int = 0
) -> Front:
    """Listens, beside others where it is told the port."""
    front = fronts.make(kind, on_call, tokens)
    await front.listen("127.0.0.1", port, port != 0)
    return front


def digits(version: str) -> Lane:
    return Lane("digits", version, DIGITS, batched=True, opaque=False)


def times(number: int) -> Callable[[Arrays], Arrays]:
    return lambda inputs: {"y": inputs["x"] * np.float32(number)}


def pair(inputs: Arrays) -> Arrays:
    return {"s": inputs["a"] + 1, "t": inputs["b"] * 2}


class Place:
    """An open front, its host, and threads that run what its batchers give."""

    def __init__(self, front: Front, host: Host) -> None:
        self.front = front
        self.host = host
        self.echo = Echo()
        host.add_registered_method_handlers("test.Echo", self.echo.handlers())
        infer = grpc.unary_unary_rpc_method_handler(refused, bytes, bytes)
        service = "inference.GRPCInferenceService"
        host.add_registered_method_handlers(service, {"ModelInfer": infer})
        self.go = threading.Event()
        """Runners wait for it before each batch."""
        self.go.set()
        self.batchers: list[Batcher] = []
        self.threads: list[threading.Thread] = []
        self.sizes: list[int] = []
        self.raws: list[RawClient] = []

    def serve(
        self,
        lane: Lane,
        run: Callable[[Arrays], Arrays],
        limits: Batching = PLAIN,
        sampling: Sampling = SILENT,
    ) -> Batcher:
        batcher = self.front.batcher(lane)
        batcher.configure(limits, sampling)
        thread = threading.Thread(target=self.run, args=(batcher, run))
        thread.start()
        self.batchers.append(batcher)
        self.threads.append(thread)
        return batcher

    def run(self, batcher: Batcher, run: Callable[[Arrays], Arrays]) -> None:
        while True:
            self.go.wait()
            batch = batcher.take()
            if batch is None:
                return
            self.sizes.append(batch.rows)
            batch.answer(run(batch.inputs()))

    def serve_digits(self, shares: Mapping[str, int], **about: Any) -> dict[str, Batcher]:
        """Version n multiplies by n."""
        made = {v: self.serve(digits(v), times(int(v)), **about) for v in shares}
        self.front.route("digits", shares, made)
        return made

    def channel(self, **options: Any) -> Any:
        """Each has a connection of its own."""
        own = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        address = f"127.0.0.1:{self.front.port}"
        return grpc.aio.insecure_channel(address, options=own, **options)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        async with self.channel() as channel:
            yield open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def raw(self) -> "RawClient":
        reader, writer = await asyncio.open_connection("127.0.0.1", self.front.port)
        self.raws.append(RawClient(reader, writer))
        return self.raws[-1]

    def end(self) -> None:
        self.go.set()
        for batcher in self.batchers:
            batcher.close()
        for raw in self.raws:
            raw.vanish()

    async def join(self) -> None:
        for thread in self.threads:
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()


@contextlib.asynccontextmanager
async def place(kind: str, tokens: Collection[str] = (), port: int = 0) -> AsyncIterator[Place]:
    host = Host()
    front = await opened(kind, host.host, tokens, port)
    made = Place(front, host)
    try:
        yield made
    finally:
        await host.end()
        made.end()
        await front.close(2)
        await made.join()


async def refused(message: bytes, context: Any) -> bytes:
    raise Invalid(SAID_BY_PYTHON)


class Echo:
    """Methods of every kind. Messages are bare bytes."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.cancelled = 0
        self.written = 0

    def handlers(self) -> dict[str, Any]:
        return {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary, bytes, bytes),
            "Join": grpc.stream_unary_rpc_method_handler(self.joined, bytes, bytes),
            "Repeat": grpc.unary_stream_rpc_method_handler(self.repeat, bytes, bytes),
            "Talk": grpc.stream_stream_rpc_method_handler(self.talk, bytes, bytes),
            "Wait": grpc.unary_unary_rpc_method_handler(self.wait, bytes, bytes),
            "Flood": grpc.unary_stream_rpc_method_handler(self.flood, bytes, bytes),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail, bytes, bytes),
            "About": grpc.unary_unary_rpc_method_handler(self.about, bytes, bytes),
        }

    async def unary(self, message: bytes, context: Any) -> bytes:
        return message

    async def joined(self, messages: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([message async for message in messages])

    async def repeat(self, message: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(5):
            yield message

    async def talk(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message[::-1]

    async def wait(self, message: bytes, context: Any) -> bytes:
        self.seen["waiting"] = True
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return message

    async def flood(self, message: bytes, context: Any) -> AsyncIterator[bytes]:
        """1 GiB in all."""
        for _ in range(1024):
            yield bytes(1 << 20)
            self.written += 1

    async def fail(self, message: bytes, context: Any) -> bytes:
        raise Invalid(message.decode())

    async def about(self, message: bytes, context: Any) -> bytes:
        """What is known of the call."""
        known = {"metadata": list(context.invocation_metadata()), "peer": context.peer()}
        known["left_s"] = context.time_remaining()
        context.set_trailing_metadata((("trail", "of bytes"), ("odd-bin", "AAE=")))
        return json.dumps(known).encode()


def request(value: float = 1.0, rows: int = 1, **about: Any) -> oip.ModelInferRequest:
    array = np.full((rows, 4), value, np.float32)
    tensor: Any = {"name": "x", "datatype": "FP32", "shape": array.shape}
    given = {"model_name": "digits", "inputs": [tensor], "raw_input_contents": [array.tobytes()]}
    return oip.ModelInferRequest(**{**given, **about})


def values(response: oip.ModelInferResponse, index: int = 0) -> list[float]:
    return np.frombuffer(response.raw_output_contents[index], np.float32).tolist()  # type: ignore[no-any-return]


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), raised.value.details() or ""


POST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":authority", b"test"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]


def prefixed(message: bytes) -> bytes:
    return b"\x00" + len(message).to_bytes(4, "big") + message


class RawClient:
    """Says in HTTP/2 whatever a test wants to be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.decoder = Decoder()
        self.stream = -1

    def hello(self) -> bytes:
        return frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, b"")

    def ask(self, method: str, body: bytes, split: int = 16384) -> bytes:
        """A whole request on the next stream; `body` with its prefix."""
        head = frames.block([(b":path", method.encode()), *POST])
        self.stream += 2
        parts = [body[at : at + split] for at in range(0, len(body), split)] or [b""]
        sent = [frames.frame(frames.HEADERS, frames.END_HEADERS, self.stream, head)]
        sent += [frames.frame(frames.DATA, 0, self.stream, part) for part in parts[:-1]]
        sent.append(frames.frame(frames.DATA, frames.END_STREAM, self.stream, parts[-1]))
        return b"".join(sent)

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def frame(self) -> tuple[int, int, int, bytes]:
        """(type, flags, stream, payload) of the next. Raises `IncompleteReadError` at the end."""
        async with asyncio.timeout(10):
            head = await self.reader.readexactly(frames.FRAME_HEAD_BYTES)
            word, flags, stream = frames.FRAME.unpack(head)
            return word & 255, flags, stream, await self.reader.readexactly(word >> 8)

    async def headers(self) -> dict[str, str]:
        """Those of the next header block."""
        block = await self.until(frames.HEADERS)
        return {str(name): str(value) for name, value in self.decoder.decode(block)}

    async def until(self, kind: int, stream: int | None = None) -> bytes:
        """The payload of the next frame of this type."""
        while True:
            found, _, at, payload = await self.frame()
            if found == kind and stream in (None, at):
                return payload

    async def answer(self, stream: int) -> bytes:
        """The data of a stream until its end."""
        data = b""
        while True:
            kind, flags, at, payload = await self.frame()
            if at == stream and kind == frames.DATA:
                data += payload
            if at == stream and flags & frames.END_STREAM and kind in (frames.DATA, frames.HEADERS):
                return data

    async def fault(self) -> int:
        """The code of the GOAWAY that ends the connection."""
        code = -1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
            while True:
                kind, _, _, payload = await self.frame()
                if kind == frames.GOAWAY:
                    code = int.from_bytes(payload[4:8], "big")
        return code

    def vanish(self) -> None:
        self.writer.transport.abort()


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


async def still_answers(here: Place) -> None:
    async with here.client() as client:
        answer = await client.ModelInfer(request(7.0), timeout=20)
        assert values(answer) == [7.0] * 4
