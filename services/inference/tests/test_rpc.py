"""Generated servicers answer over any front: every kind of RPC, every end, one status each."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic_ns
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client import REGISTRY

from libs import telemetry
from libs.contracts.protos import open_inference_pb2 as oip
from libs.contracts.protos import open_inference_pb2_grpc
from libs.doors import Exhausted, NotFound
from services.inference import fronts, native, python_front
from services.inference.modelconfig import Misconfigured
from services.inference.rpc import REFLECTION_V1, WATCH, Host, health_and_reflection
from stack.testing import eventually

SERVICE = "/inference.GRPCInferenceService"
OK, UNKNOWN_ARGUMENT, LATE, MISSING, FULL, UNIMPLEMENTED, INTERNAL, AWAY = 0, 3, 4, 5, 8, 12, 13, 14


class Recorded:
    """A front's call whose client has sent `sent` already."""

    peer = "ipv4:127.0.0.1:1"

    def __init__(
        self,
        method: str,
        sent: Sequence[bytes] = (),
        deadline_ns: int = 0,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.method = method
        self.metadata = metadata
        self.deadline_ns = deadline_ns
        self.left = list(sent)
        self.written: list[bytes] = []
        self.ended = asyncio.Event()
        self.status: tuple[int, str, Sequence[tuple[str, str]]] | None = None
        self.vanish: Callable[[], None] = lambda: None

    async def read(self) -> bytes | None:
        return self.left.pop(0) if self.left else None

    async def write(self, message: bytes) -> None:
        self.written.append(message)

    def finish(self, code: int, text: str = "", trailing: Sequence[tuple[str, str]] = ()) -> None:
        assert self.status is None, "finished twice"
        self.status = (code, text, trailing)
        self.ended.set()

    def on_gone(self, gone: Callable[[], None]) -> None:
        self.vanish = gone

    async def end(self) -> tuple[int, str]:
        async with asyncio.timeout(10):
            await self.ended.wait()
        assert self.status is not None
        return self.status[:2]


class Servicer(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Behaves as the request's name says."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.seen: Any = None

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802 - generated
        self.seen = context
        match request.name:
            case "missing":
                raise NotFound("no such model")
            case "full":
                raise Exhausted("too many")
            case "bug":
                raise KeyError("oops")
            case "aborted":
                await context.abort(grpc.StatusCode.DATA_LOSS, "torn", (("why", "tests"),))
            case "coded":
                context.set_code(grpc.StatusCode.OUT_OF_RANGE)
                context.set_details("too far")
            case "slow":
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
        context.set_trailing_metadata((("model", request.name),))
        return oip.ModelReadyResponse(ready=True)

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802 - generated
        return oip.ServerLiveResponse(live=True)

    async def ModelStreamInfer(  # noqa: N802 - generated
        self, request_iterator: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[Any]:
        async for request in request_iterator:
            for _ in range(2):
                named = oip.ModelInferResponse(id=request.id)
                yield oip.ModelStreamInferResponse(infer_response=named)
            if request.id == "last":
                raise NotFound("no more")


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def host(servicer: Servicer) -> Host:
    made = Host()
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, made)
    return made


def asking(name: str, **about: Any) -> Recorded:
    message = oip.ModelReadyRequest(name=name).SerializeToString()
    return Recorded(f"{SERVICE}/ModelReady", [message], **about)


async def answered(host: Host, call: Recorded) -> tuple[int, str]:
    host.host(call)
    return await call.end()


async def test_a_coroutine_answers_with_its_message_and_trailing_metadata(host: Host) -> None:
    call = asking("digits")
    assert await answered(host, call) == (OK, "")
    assert [oip.ModelReadyResponse.FromString(one).ready for one in call.written] == [True]
    assert call.status == (OK, "", (("model", "digits"),))


async def test_a_plain_function_answers(host: Host) -> None:
    call = Recorded(f"{SERVICE}/ServerLive", [b""])
    assert await answered(host, call) == (OK, "")
    assert oip.ServerLiveResponse.FromString(call.written[0]).live


async def test_a_stream_is_answered_message_by_message_until_it_is_refused(host: Host) -> None:
    sent = [oip.ModelInferRequest(id=one).SerializeToString() for one in ("a", "b", "last")]
    call = Recorded(f"{SERVICE}/ModelStreamInfer", sent)
    assert await answered(host, call) == (MISSING, "no more")
    answers = [oip.ModelStreamInferResponse.FromString(one) for one in call.written]
    assert [one.infer_response.id for one in answers] == ["a", "a", "b", "b", "last", "last"]


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("missing", MISSING, "no such model"),
        ("full", FULL, "too many"),
        ("bug", INTERNAL, "Unexpected <class 'KeyError'>: 'oops'"),
        ("aborted", 15, "torn"),
        ("coded", 11, "too far"),
    ],
)
async def test_each_way_to_fail_has_its_status(host: Host, name: str, code: int, text: str) -> None:
    call = asking(name)
    assert await answered(host, call) == (code, text)
    assert call.written == []


async def test_a_full_queue_says_when_to_come_back(host: Host) -> None:
    call = asking("full")
    await answered(host, call)
    assert call.status is not None
    assert call.status[2] == (("retry-after", "1"),)


async def test_an_abort_keeps_its_trailing_metadata(host: Host) -> None:
    call = asking("aborted")
    await answered(host, call)
    assert call.status is not None
    assert call.status[2] == (("why", "tests"),)


async def test_what_is_not_written_is_unimplemented(host: Host) -> None:
    call = Recorded(f"{SERVICE}/RepositoryIndex", [b""])
    assert await answered(host, call) == (UNIMPLEMENTED, "Method not implemented!")


async def test_an_unknown_method_is_unimplemented_and_counted(host: Host) -> None:
    labels = {
        "service": telemetry.service(),
        "door": "grpc",
        "method": "unmatched",
        "code": "UNIMPLEMENTED",
    }
    before = REGISTRY.get_sample_value("leptonic_requests_total", labels) or 0
    code, text = await answered(host, Recorded("/no.Such/Method"))
    assert (code, text) == (UNIMPLEMENTED, "unknown method /no.Such/Method")
    assert REGISTRY.get_sample_value("leptonic_requests_total", labels) == before + 1


async def test_bytes_that_are_no_message_are_the_callers_mistake(host: Host) -> None:
    call = Recorded(f"{SERVICE}/ModelReady", [b"\xff\xff"])
    expected = f"2 bytes are no message of {SERVICE}/ModelReady"
    assert await answered(host, call) == (UNKNOWN_ARGUMENT, expected)


async def test_a_call_without_a_message_is_the_callers_mistake(host: Host) -> None:
    call = Recorded(f"{SERVICE}/ModelReady")
    assert await answered(host, call) == (UNKNOWN_ARGUMENT, "no message came")


async def test_a_deadline_ends_the_servicer(host: Host, servicer: Servicer) -> None:
    call = asking("slow", deadline_ns=monotonic_ns() + 20_000_000)
    code, text = await answered(host, call)
    assert (code, servicer.cancelled) == (LATE, 1)
    assert text == f"the deadline of {SERVICE}/ModelReady has passed"


async def test_a_client_that_goes_ends_the_servicer(host: Host, servicer: Servicer) -> None:
    call = asking("slow")
    host.host(call)
    await eventually(lambda: servicer.seen is not None)
    call.vanish()
    await eventually(lambda: servicer.cancelled == 1 and not host.running)
    assert servicer.seen.cancelled()


async def test_who_is_left_at_the_end_is_told(host: Host, servicer: Servicer) -> None:
    call = asking("slow")
    host.host(call)
    await eventually(lambda: servicer.seen is not None)
    await host.end()
    assert await call.end() == (AWAY, "the server is leaving")


async def ready() -> bool:
    return True


async def test_health_answers_and_its_watchers_are_let_go(host: Host) -> None:
    service = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    watched = Recorded(WATCH, [b""])
    async with health_and_reflection(host, [service], ready):
        question = health_pb2.HealthCheckRequest(service=service.full_name).SerializeToString()

        async def serving() -> bool:
            call = Recorded("/grpc.health.v1.Health/Check", [question])
            known = await answered(host, call) == (OK, "")
            serves = health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
            return known and call.written == [serves]

        await eventually(serving)
        host.host(watched)
        await eventually(lambda: len(watched.written) == 1)
        await host.end(WATCH)
    assert await watched.end() == (AWAY, "the server is leaving")


@pytest.mark.parametrize("method", [REFLECTION_V1, REFLECTION_V1.replace("v1", "v1alpha")])
async def test_reflection_lists_the_services(host: Host, method: str) -> None:
    service = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    question = reflection_pb2.ServerReflectionRequest(list_services="*").SerializeToString()
    async with health_and_reflection(host, [service], ready):
        call = Recorded(method, [question])
        assert await answered(host, call) == (OK, "")
    answer = reflection_pb2.ServerReflectionResponse.FromString(call.written[0])
    names = {one.name for one in answer.list_services_response.service}
    assert {service.full_name, "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize("kind", ["", "Native", "cpp"])
def test_a_front_that_nobody_knows_is_refused(kind: str) -> None:
    with pytest.raises(Misconfigured, match="not one of auto, native, python"):
        fronts.make(kind, lambda call: None, [])


async def test_the_native_front_speaks_where_it_is_and_else_the_python_one_which_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if native.available():
        assert isinstance(fronts.make("auto", lambda call: None, []), native.NativeFront)
        assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    monkeypatch.setattr(native, "EXTENSION", "leptonic_native_of_nowhere")
    assert isinstance(fronts.make("auto", lambda call: None, []), python_front.PythonFront)
    (said,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert said.getMessage() == (
        "the Python front speaks gRPC: the extension leptonic_native is not installed"
    )
