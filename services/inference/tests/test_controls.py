"""What a client may change of a server: its repository, its traces and its log."""

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import Any

import grpc
import pytest

from libs.contracts.protos import open_inference_pb2 as oip
from services.inference.tests.desk import (
    RATES,
    Desk,
    double,
    opened,
    refused,
    request,
    row,
    three,
)
from services.inference.tests.fronts import kinds
from stack.testing import eventually


@pytest.fixture(params=kinds())
async def desk(request: pytest.FixtureRequest) -> AsyncIterator[Desk]:
    async with three(request.param) as made:
        yield made


def is_left(desk: Desk, count: str) -> bool:
    return desk.service.controls.settings("double")["trace_count"] == [count]


async def test_deployments_decide_what_is_loaded(desk: Desk) -> None:
    index = await desk.stub.RepositoryIndex(oip.RepositoryIndexRequest(ready=True))
    assert {(one.name, one.version, one.state) for one in index.models} == {
        ("double", "1", "READY"),
        ("counter", "1", "READY"),
        ("sum", "1", "READY"),
    }
    load = desk.stub.RepositoryModelLoad(oip.RepositoryModelLoadRequest(model_name="m"))
    assert await refused(load) == (
        "FAILED_PRECONDITION",
        "failed to load 'm': deployments decide what is served here",
    )
    unload = desk.stub.RepositoryModelUnload(oip.RepositoryModelUnloadRequest(model_name="m"))
    assert (await refused(unload))[0] == "FAILED_PRECONDITION"
    named = oip.RepositoryIndexRequest(repository_name="other")
    assert (await refused(desk.stub.RepositoryIndex(named)))[0] == "UNIMPLEMENTED"


class Shelf:
    """A repository that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def load(self, name: str, config: str = "", files: Mapping[str, bytes] = {}) -> None:
        self.asked.append((name, config, dict(files)))

    async def unload(self, name: str) -> None:
        self.asked.append(name)

    async def index(self, ready_only: bool) -> list[tuple[str, str, str, str]]:
        return [("m", "", "UNAVAILABLE", "unloaded")]


async def test_a_repository_is_told_what_to_load() -> None:
    shelf = Shelf()
    async with opened(shelf) as desk:
        load = oip.RepositoryModelLoadRequest(model_name="m")
        load.parameters["config"].string_param = "{}"
        load.parameters["file:1/model.onnx"].bytes_param = b"graph"
        await desk.stub.RepositoryModelLoad(load)
        unload = oip.RepositoryModelUnloadRequest(model_name="m")
        unload.parameters["unload_dependents"].bool_param = True
        await desk.stub.RepositoryModelUnload(unload)
        assert shelf.asked == [("m", "{}", {"file:1/model.onnx": b"graph"}), "m"]
        index = await desk.stub.RepositoryIndex(oip.RepositoryIndexRequest())
        assert index.models[0].reason == "unloaded"
        load.parameters["config"].bytes_param = b"{}"
        code, said = await refused(desk.stub.RepositoryModelLoad(load))
        expected = "invalid value type for 'config' parameter, expected string_param."
        assert (code, said) == ("INVALID_ARGUMENT", expected)
        load.parameters["other"].bool_param = True
        assert (await refused(desk.stub.RepositoryModelLoad(load)))[0] == "INVALID_ARGUMENT"


async def trace(desk: Desk, model: str = "", **changes: list[str]) -> dict[str, list[str]]:
    asked = oip.TraceSettingRequest(model_name=model)
    for name, values in changes.items():
        asked.settings[name].value.extend(values)
        asked.settings[name].SetInParent()
    found = await desk.stub.TraceSetting(asked)
    return {name: list(one.value) for name, one in found.settings.items()}


async def test_trace_settings_change_what_is_traced(desk: Desk) -> None:
    def rates(model: str) -> float:
        return desk.endpoints.served(model, "").rates.traces_per_s

    before = await trace(desk)
    assert before == {
        "trace_level": ["TIMESTAMPS"],
        "trace_rate": ["1"],
        "trace_count": ["-1"],
        "log_frequency": ["0"],
        "trace_file": [""],
        "trace_mode": ["opentelemetry"],
    }
    assert (await trace(desk, trace_rate=["3"]))["trace_rate"] == ["3"]
    assert rates("double") == rates("sum") == RATES.traces_per_s / 3
    assert (await trace(desk, "double", trace_level=["OFF"]))["trace_level"] == ["OFF"]
    assert (rates("double"), rates("sum")) == (0, RATES.traces_per_s / 3)
    await desk.serve("double", double(), version="2")
    assert rates("double") == 0
    assert (await trace(desk, "double", trace_level=[]))["trace_level"] == ["TIMESTAMPS"]
    assert await trace(desk, trace_rate=[]) == before
    assert rates("double") == RATES.traces_per_s


async def test_so_many_traces_and_no_more(desk: Desk) -> None:
    served = desk.endpoints.served("double", "")
    assert (await trace(desk, "double", trace_count=["2"]))["trace_count"] == ["2"]
    for count in ("1", "0", "0"):
        await desk.stub.ModelInfer(request("double", row(1, 2), [1, 2]))
        await eventually(partial(is_left, desk, count))
    assert served.rates.traces_per_s == 0
    assert desk.endpoints.served("sum", "").rates == RATES
    assert (await trace(desk, "double", trace_count=[]))["trace_count"] == ["-1"]
    assert served.rates == RATES


@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("", {"trace_rate": ["0"]}, "trace_rate: one whole number from 1"),
        ("", {"trace_rate": ["1", "2"]}, "trace_rate: one whole number"),
        ("", {"trace_level": ["TENSORS"]}, "trace_level: OFF or TIMESTAMPS, got TENSORS"),
        ("", {"trace_file": ["/tmp/x"]}, "trace_file is '' here and cannot be changed"),  # noqa: S108 - refused
        ("", {"trace_count": ["-2"]}, "trace_count: one whole number, or -1 for no end"),
        ("", {"else": ["5"]}, "unknown trace setting: 'else'"),
        ("nobody", {}, "Request for unknown model: 'nobody'"),
    ],
)
async def test_trace_settings_that_mean_nothing_are_refused(
    desk: Desk, model: str, changes: dict[str, list[str]], said: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await trace(desk, model, **changes)
    assert said in str(error.value.details())


@pytest.fixture
def log_level() -> Iterator[None]:
    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    yield
    logging.getLogger().setLevel(before)


async def log(desk: Desk, **changes: Any) -> dict[str, Any]:
    asked = oip.LogSettingsRequest()
    for name, value in changes.items():
        kinds = {bool: "bool_param", int: "uint32_param", str: "string_param"}
        setattr(asked.settings[name], kinds[type(value)], value)
    found = await desk.stub.LogSettings(asked)
    return {n: getattr(v, v.WhichOneof("parameter_choice")) for n, v in found.settings.items()}


async def test_log_settings_change_what_is_written(log_level: None) -> None:
    root = logging.getLogger()
    async with opened() as desk:
        assert await log(desk) == {
            "log_file": "",
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
        }
        assert (await log(desk, log_verbose_level=1))["log_verbose_level"] == 1
        assert root.level == logging.DEBUG
        assert not (await log(desk, log_verbose_level=0, log_info=False))["log_info"]
        assert root.level == logging.WARNING
        await log(desk, log_warning=False, log_error=False)
        assert not root.isEnabledFor(logging.CRITICAL)
        for name, value in {
            "log_file": "x",
            "log_info": 1,
            "log_verbose_level": "1",
            "no": 1,
        }.items():
            with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
                await log(desk, **{name: value})
