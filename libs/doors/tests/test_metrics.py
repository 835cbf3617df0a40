"""Every request at a door is counted once, under a name from a bounded set."""

import asyncio
from typing import Any

import grpc
import pytest
from prometheus_client import REGISTRY

from libs import telemetry
from libs.contracts.protos import registry_pb2 as pb
from libs.contracts.protos import registry_pb2_grpc
from libs.doors import NotFound
from libs.doors.tests.desk import Desk
from libs.doors.tests.test_serve import LIST, both_doors, models
from stack.testing import eventually

RPC = "leptonic.v1.Registry/ListModels"
TEMPLATE = "GET /v1/projects/{project}/models"


@pytest.fixture(autouse=True)
def named() -> None:
    telemetry.identify("desk")


def counted(door: str, method: str, code: str) -> float:
    labels = {"service": "desk", "door": door, "method": method, "code": code}
    return REGISTRY.get_sample_value("leptonic_requests_total", labels) or 0.0


def timed(door: str, method: str) -> float:
    labels = {"service": "desk", "door": door, "method": method}
    return REGISTRY.get_sample_value("leptonic_request_seconds_count", labels) or 0.0


async def test_an_answer_and_a_refusal_are_counted_on_both() -> None:
    desk = Desk()
    places = [("grpc", RPC, "OK"), ("http", TEMPLATE, "200")]
    places += [("grpc", RPC, "NOT_FOUND"), ("http", TEMPLATE, "404")]
    before = [counted(*place) for place in places]
    before_timed = [timed("grpc", RPC), timed("http", TEMPLATE)]
    async with both_doors(desk) as (channel, http):
        await models(channel)
        await http.get(LIST)
        desk.refusal = NotFound("no such model", "model")
        with pytest.raises(grpc.aio.AioRpcError):
            await models(channel)
        await http.get(LIST)
    assert [counted(*place) for place in places] == [one + 1 for one in before]
    assert [timed("grpc", RPC), timed("http", TEMPLATE)] == [one + 2 for one in before_timed]


async def test_what_no_route_takes_has_one_name() -> None:
    before = counted("http", "unmatched", "404"), counted("http", "unmatched", "405")
    unknown = counted("grpc", "unmatched", "UNIMPLEMENTED")
    async with both_doors(Desk()) as (channel, http):
        await http.get("/v1/anything/else")
        await http.get("/v1/anything/more")
        await http.request("BREW", LIST)
        unknown_call: Any = channel.unary_unary("/no.Service/Method")
        with pytest.raises(grpc.aio.AioRpcError):
            await unknown_call(b"")
    assert counted("http", "unmatched", "404") == before[0] + 2
    assert counted("http", "unmatched", "405") == before[1] + 1
    assert counted("grpc", "unmatched", "UNIMPLEMENTED") == unknown + 1


async def test_a_caller_who_leaves_is_counted() -> None:
    desk = Desk()
    desk.may_answer.clear()
    before = counted("grpc", RPC, "CANCELLED")
    async with both_doors(desk) as (channel, _):
        stub: Any = registry_pb2_grpc.RegistryStub(channel)
        call = stub.ListModels(pb.ListModelsRequest(project="p"))
        async with asyncio.timeout(5):
            await desk.asked.wait()
        call.cancel()
        await eventually(lambda: counted("grpc", RPC, "CANCELLED") == before + 1)
